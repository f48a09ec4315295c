"""The real sampler, as a process, on the NVML stand-in (nvml_standin.c says what each GPU does) and on this host."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from scalestudy.cluster.clock import now_s
from scalestudy.cluster.nvml import visible_gpus
from scalestudy.cluster.sample_file import parts_path, read_samples
from scalestudy.cluster.telemetry import Gpu, Sampling, Telemetry

# Past all that the stand-in does: its last change is after one second.
_LONG_ENOUGH_S = 2.5


class Sampled(NamedTuple):
    telemetry: Telemetry
    samples: pd.DataFrame

    def of(self, device: str) -> pd.DataFrame:
        return self.samples[self.samples.device == device]


@pytest.fixture(scope="module")
def sampled(nvml_standin: Path, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    folder = tmp_path_factory.mktemp("sampled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(nvml_standin))
        patch.setenv("NVML_STANDIN_PID", str(os.getpid()))
        patch.setenv("CUDA_VISIBLE_DEVICES", "1,0,MIG-0001")
        sampling = Sampling(folder, 0, "node", rate_hz=50)
        time.sleep(_LONG_ENOUGH_S)
        telemetry = sampling.stop()
    assert telemetry.error is None
    return Sampled(telemetry, read_samples(folder / telemetry.file))


def test_every_device_is_described_and_sampled(sampled: Sampled) -> None:
    names = [gpu.name for gpu in sampled.telemetry.gpus]
    assert names == [*(f"gpu{i}" for i in range(6)), "gpu5/mig0", "gpu5/mig1", "gpu6", "gpu7"]
    assert set(sampled.samples.device.unique()) == {*names, "host"}
    healthy = sampled.of("gpu0").iloc[-1]
    assert healthy.power_w == 400
    assert healthy.busy == pytest.approx(0.9)
    assert healthy.memory_busy == pytest.approx(0.4)
    assert healthy.sm_active == pytest.approx(0.2)
    assert (healthy.sm_clock_mhz, healthy.memory_clock_mhz, healthy.temperature_c) == (1980, 2600, 60)
    assert healthy.memory_used_bytes == 1_000_000_000
    assert healthy.nvlink_tx_bytes > 0
    assert healthy.pcie_rx_bytes > 0
    assert healthy.ecc_uncorrected == 0 or pd.isna(healthy.ecc_uncorrected)


def test_samples_come_at_the_rate_and_are_stamped_with_our_clock(sampled: Sampled) -> None:
    times = sampled.of("host").time_s
    assert times.iloc[-1] < now_s() < times.iloc[-1] + 3600
    # At the start it may be held up by its own imports, later by a busy machine: the grid stays.
    assert np.median(np.diff(times)) == pytest.approx(0.02, rel=0.2)
    assert len(times) == sampled.telemetry.samples


def test_what_a_driver_does_not_support_is_null_with_the_reason_once(sampled: Sampled) -> None:
    old = sampled.of("gpu1")
    unsupported = ["power_w", "energy_j", "busy", "sm_clock_mhz", "throttle_reasons", "ecc_corrected", "pcie_tx_bytes"]
    assert old[[*unsupported, "sm_active"]].isna().all(axis=None)
    assert {sampled.telemetry.missing[f"gpu1 {column}"] for column in unsupported} == {"Not Supported"}
    assert old.temperature_c.eq(60).all()
    # What it does not count is watched instead.
    assert old.pcie_tx_bytes_per_s.dropna().eq(1_000_000).all()
    assert old.pcie_rx_bytes_per_s.notna().any()


def test_a_lost_device_ends_there_and_the_others_go_on(sampled: Sampled) -> None:
    lost, healthy = sampled.of("gpu2"), sampled.of("gpu0")
    assert lost.time_s.max() < healthy.time_s.max() - 0.5
    assert lost.power_w.eq(400).all()
    assert "GPU is lost" in sampled.telemetry.missing["gpu2"]


def test_an_answer_that_fails_now_and_then_is_null_only_then(sampled: Sampled) -> None:
    temperature = sampled.of("gpu6").temperature_c
    assert 0.3 < temperature.isna().mean() < 0.7
    assert sampled.telemetry.missing["gpu6 temperature_c"] == "Unknown Error"


def test_throttling_and_errors_are_on_record(sampled: Sampled) -> None:
    hot = sampled.of("gpu4")
    assert hot.throttle_reasons.iloc[0] == 0
    assert hot.throttle_reasons.iloc[-1] == 0x48
    assert hot.sm_clock_mhz.iloc[-1] == 600
    assert sampled.of("gpu6").xid.dropna().tolist() == [79]
    assert sampled.of("gpu6").ecc_uncorrected.max() == 1
    assert sampled.samples[sampled.samples.device != "gpu6"].xid.isna().all()


def test_mig_instances_have_rows_of_their_own(sampled: Sampled) -> None:
    for name in ("gpu5/mig0", "gpu5/mig1"):
        instance = sampled.of(name)
        assert instance.memory_used_bytes.eq(500_000_000).all()
        assert instance[["busy", "power_w"]].isna().all(axis=None)
    assert sampled.of("gpu5").busy.isna().all()
    assert sampled.of("gpu5").power_w.eq(400).all()
    assert "gpu5/mig2" not in sampled.telemetry.missing


def test_processes_are_told_apart(sampled: Sampled) -> None:
    def pids(device: str) -> set[int]:
        return {entry["pid"] for listed in sampled.of(device).processes.dropna() for entry in listed}

    assert pids("gpu0") == {os.getpid()}
    assert pids("gpu7") == {4242}
    assert pids("gpu3") == set()


def test_links_say_how_gpus_reach_each_other(sampled: Sampled) -> None:
    links = {(link.a, link.b): link for link in sampled.telemetry.links}
    assert len(links) == 8 * 7 / 2
    assert (links["gpu0", "gpu1"].nvlinks, links["gpu0", "gpu1"].path) == (4, "one NUMA node")
    # Both on a switch, by two links each.
    assert links["gpu6", "gpu7"].nvlinks == 2
    assert (links["gpu0", "gpu7"].nvlinks, links["gpu0", "gpu7"].path) == (0, "between NUMA nodes")


def test_ranks_find_their_gpu_by_cudas_order(sampled: Sampled) -> None:
    assert sampled.telemetry.visible == ("gpu1", "gpu0", "gpu5/mig1")


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        (None, ("gpu0", "gpu1")),
        ("", ()),
        ("1", ("gpu1",)),
        ("GPU-b,0", ("gpu1", "gpu0")),
        # CUDA sees nothing behind what it does not know.
        ("0,-1,1", ("gpu0",)),
        ("0,7,1", ("gpu0",)),
        # Both GPUs' UUIDs begin so.
        ("GPU-", ()),
    ],
)
def test_visible_gpus_are_those_cuda_would_show(listed: str | None, found: tuple[str, ...]) -> None:
    gpus = [Gpu(name="gpu0", uuid="GPU-a1", model="x"), Gpu(name="gpu1", uuid="GPU-b1", model="x")]
    assert visible_gpus(listed, gpus) == found


def test_without_nvidia_the_host_alone_is_sampled(tmp_path: Path) -> None:
    sampling = Sampling(tmp_path, 3, "here", rate_hz=20)
    ends_s = time.monotonic() + 1.5
    while time.monotonic() < ends_s:
        # At work, that its processors show it: what they count moves in hundredths of a second.
        sum(range(10_000))
    telemetry = sampling.stop()
    assert telemetry.error is None
    assert telemetry.file == "telemetry-3-here.parquet"
    if not telemetry.gpus:
        assert "gpu" in telemetry.missing
    host = (samples := read_samples(tmp_path / telemetry.file))[samples.device == "host"]
    assert len(host) == telemetry.samples > 5
    cpu_s = np.stack(host.cpu_busy_s.to_numpy())
    assert cpu_s.shape[1] == len(telemetry.cpus or ()) == os.cpu_count()
    assert (np.diff(cpu_s.sum(axis=1)) >= 0).all()
    assert cpu_s[-1].sum() > cpu_s[0].sum()
    # Once a second.
    assert len(host.net_rx_bytes.iloc[0]) == len(telemetry.interfaces)
    assert 1 <= host.net_rx_bytes.notna().sum() <= 4
    assert "lo" in telemetry.interfaces
    assert host.memory_used_bytes.min() > 0


# Put where the interpreter looks when it starts: a host that answers in the middle of a run as nobody has thought of.
_BROKEN = """
import itertools, psutil
asked = itertools.count()
whole = psutil.net_io_counters
def failing(**named):
    if next(asked) > 1:
        raise PermissionError(13, "Permission denied", "/proc/net/dev")
    return whole(**named)
psutil.net_io_counters = failing
def broken():
    raise RuntimeError("couldn't find any physical disk")
psutil.disk_io_counters = broken
"""


def test_what_the_host_does_not_tell_costs_no_telemetry_of_gpus(
    nvml_standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml_standin))
    sampling = Sampling(tmp_path, 0, "here", rate_hz=20)
    time.sleep(_LONG_ENOUGH_S)
    telemetry = sampling.stop()
    assert telemetry.error is None
    samples = read_samples(tmp_path / telemetry.file)
    assert samples[samples.device == "gpu0"].power_w.eq(400).all()
    host = samples[samples.device == "host"]
    assert host.disk_read_bytes.isna().all()
    assert host.memory_used_bytes.notna().any()
    assert telemetry.missing["host disk_read_bytes"] == "RuntimeError: couldn't find any physical disk"
    assert telemetry.missing["host net_rx_bytes"] == "/proc/net/dev: Permission denied"


def test_a_killed_sampler_costs_only_its_telemetry(tmp_path: Path) -> None:
    sampling = Sampling(tmp_path, 0, "here", rate_hz=20)
    child = _child_of(os.getpid(), "scalestudy.cluster.sampler")
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    telemetry = sampling.stop()
    assert telemetry.error == f"the sampler was killed by signal {signal.SIGKILL}"
    assert telemetry.samples == 0


def test_a_sampler_that_cannot_write_says_where_to_look(tmp_path: Path) -> None:
    telemetry = Sampling(tmp_path / "gone", 0, "here", rate_hz=20).stop()
    assert telemetry.error == "the sampler ended with exit code 1, see the rank's log"


def test_a_sampler_ends_with_the_rank_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from scalestudy.cluster.telemetry import Sampling;"
        "Sampling(Path(sys.argv[1]), 0, 'here', 20); import time; time.sleep(1.5); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False, stderr=subprocess.DEVNULL)
    path = tmp_path / "telemetry-0-here.parquet"
    _wait(path.exists)
    assert len(read_samples(path)) > 1
    assert not parts_path(path).exists() or _wait(lambda: not parts_path(path).exists())


def _wait(done: Callable[[], bool]) -> bool:
    ends_s = time.monotonic() + 30
    while not done():
        assert time.monotonic() < ends_s
        time.sleep(0.05)
    return True


def _child_of(parent: int, words: str) -> int:
    import psutil

    found: list[int] = []

    def there() -> bool:
        found[:] = [child.pid for child in psutil.Process(parent).children() if words in " ".join(child.cmdline())]
        return bool(found)

    _wait(there)
    return found[0]
