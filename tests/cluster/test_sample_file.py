"""Samples on disk: what a torn tail costs, and that memory stays bounded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scalestudy.cluster import sample_file
from scalestudy.cluster.sample_file import SampleWriter, parts_path, read_samples


def row(at_s: float) -> dict[str, Any]:
    return {"time_s": at_s, "device": "gpu0", "power_w": at_s * 2, "processes": [{"pid": 7, "memory_bytes": None}]}


@pytest.fixture
def in_parts_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_file, "_PART_ROWS", 10)


@pytest.mark.usefixtures("in_parts_of_ten")
def test_a_file_is_whole_at_the_end_and_its_parts_are_gone(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path / "telemetry.parquet")
    for at_s in range(25):
        writer.add([row(at_s)])
        assert len(writer._rows) < 10
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["telemetry.parquet"]
    samples = read_samples(tmp_path / "telemetry.parquet")
    assert samples.time_s.tolist() == list(range(25))
    assert samples.power_w.tolist() == [2 * at_s for at_s in range(25)]
    assert samples.processes.iloc[3][0]["pid"] == 7
    assert samples.energy_j.isna().all()


@pytest.mark.usefixtures("in_parts_of_ten")
def test_a_torn_tail_costs_the_last_part_alone(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.parquet"
    writer = SampleWriter(path)
    for at_s in range(25):
        writer.add([row(at_s)])
    # The machine went down in the middle of a third part.
    (parts_path(path) / "000002.unfinished").write_bytes((parts_path(path) / "000001.parquet").read_bytes()[:100])
    assert read_samples(path).time_s.tolist() == list(range(20))


def test_parts_grow_with_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    writer = SampleWriter(tmp_path / "telemetry.parquet")
    sizes = []
    for minute in range(60 * 24):
        now_s = 60.0 * minute
        writer.add([row(now_s)])
        sizes.append(len(writer._rows))
    # At first a part every half a minute, at last one every ten minutes: a day is some 150 of them, not 1,440.
    assert sizes[:3] == [1, 0, 0]
    assert max(sizes) == 9
    assert len(list(parts_path(tmp_path / "telemetry.parquet").iterdir())) < 200


def test_no_samples_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"telemetry\.parquet: no samples there"):
        read_samples(tmp_path / "telemetry.parquet")


# pyarrow looks for pandas when it first converts something.
WRITE = """
import sys
from pathlib import Path
from scalestudy.cluster import sampler
from scalestudy.cluster.sample_file import SampleWriter, warm_up

class NoPandas:
    def find_spec(self, name, path=None, target=None):
        if name == "pandas":
            raise ModuleNotFoundError(name)

if {without_pandas}:
    sys.meta_path.insert(0, NoPandas())
assert not {{"pandas", "scipy"}} & sys.modules.keys()
warm_up()
writer = SampleWriter(Path(sys.argv[1]))
before = set(sys.modules)
writer.add([{{"time_s": 1.0, "device": "host", "cpu_busy_s": [0.5]}}])
writer.close()
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.parametrize("without_pandas", [True, False])
def test_the_sampler_writes_without_pandas_and_imports_nothing_amid_what_is_measured(
    without_pandas: bool, tmp_path: Path
) -> None:
    path = tmp_path / "telemetry.parquet"
    code = WRITE.format(without_pandas=without_pandas)
    told = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert told.stdout.split() == []
    assert read_samples(path).cpu_busy_s.iloc[0].tolist() == [0.5]


@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1, 2**64 - 1, "N/A", [1]])
def test_a_value_that_no_column_holds_costs_itself(tmp_path: Path, bad: object) -> None:
    writer = SampleWriter(tmp_path / "telemetry.parquet")
    writer.add([row(0), row(1) | {"nvlink_tx_bytes": bad, "net_rx_bytes": [1, 2]}, row(2) | {"nvlink_tx_bytes": 5}])
    writer.close()
    samples = read_samples(tmp_path / "telemetry.parquet")
    assert samples.nvlink_tx_bytes.fillna(-1).tolist() == [-1, -1, 5]
    assert samples.power_w.tolist() == [0, 2, 4]
    assert samples.net_rx_bytes.iloc[1].tolist() == [1, 2]
