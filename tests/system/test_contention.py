"""What shares a host with a study: another study, busy loops on its CPUs, a quota. Real runs of the command line."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from scalestudy.analysis import contention
from scalestudy.cluster.host import usable_cpus
from scalestudy.trainers.files import read_record, record_paths
from scalestudy.trainers.record import Record

pytestmark = pytest.mark.slow

SCALESTUDY = [sys.executable, "-c", "from scalestudy.launch.cli import main; main()"]


def study(folder: Path, name: str, world_sizes: list[int]) -> Path:
    path = folder / f"{name}.yaml"
    content = {
        "name": name,
        "trainers": ["torch-ddp"],
        "models": [{"name": "cnn", "data": "digits", "batch": 8}],
        "world_sizes": world_sizes,
        "repeats": 1,
        "measurement": {"window_s": 0.1, "windows": 10, "warm_up_max_s": 2, "cause_windows": 0},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def records(out: Path) -> list[Record]:
    return [read_record(path.parent) for path in record_paths(out / "trials")]


def test_two_runs_at_once_take_turns(tmp_path: Path) -> None:
    """Each would pin its rank to the same CPUs, and measure half of them."""
    runs = [
        subprocess.Popen(
            [*SCALESTUDY, "run", study(tmp_path, name, [1]), "--out", tmp_path / name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for name in ("one", "two")
    ]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    spans = []
    for name in ("one", "two"):
        [record] = records(tmp_path / name)
        [report] = record.reports
        assert report.placement is not None
        assert report.placement.cpus == tuple(usable_cpus())
        assert report.placement.claimed_by is None
        spans.append((min(report.phase_starts_s.values()), report.windows[-1].end_s))
    first, second = sorted(spans)
    assert first[1] < second[0]
    waited = [text for text in said if "waiting for this host's devices: process" in text]
    assert len(waited) == 1
    assert waited[0].count("waiting") == 1


@pytest.fixture
def busy_loops() -> Iterator[None]:
    """Keep the CPUs of a study's first two ranks busy."""
    loops = [
        subprocess.Popen(
            [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"],
        )
        for cpu in usable_cpus()[:2]
    ]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.usefixtures("busy_loops")
def test_busy_loops_on_the_ranks_own_cpus_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv: list[str | Path] = [*SCALESTUDY, "run", study(tmp_path, "busy", [2]), "--out", out]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, timeout=120)
    [record] = records(out)
    said = [(kind, text) for _, kind, text in contention.notices(record)]
    for rank in (0, 1):
        for kind in ("shared", "busy before"):
            assert any(one == kind and f"of the CPUs of rank {rank} on" in text for one, text in said), said
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "of the time of the CPUs of rank 0 on" in html


def test_a_quota_leaves_fewer_cpus_to_a_study(tmp_path: Path) -> None:
    group = Path(f"/sys/fs/cgroup/cpu/scalestudy-study-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here, and no real quota is shown: {error}")
    try:
        (group / "cpu.cfs_quota_us").write_text("130000")
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        argv: list[str | Path] = [*SCALESTUDY, "run", study(tmp_path, "quota", [1, 2]), "--dry-run"]
        told = subprocess.run(["bash", "-c", enter, "_", *argv], capture_output=True, encoding="utf-8", timeout=120)
    finally:
        group.rmdir()
    assert told.returncode == 2
    assert f"(a quota gives 1.3 of {len(usable_cpus())} CPUs); use at most 1" in told.stderr.replace("\n", " ")
