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
from scalestudy.cluster.cuda_devices import Failing, Inventory, offer, visible_gpus
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
        patch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        sampling = Sampling(folder, 0, "node", rate_hz=50)
        _wait(parts_path(folder / "telemetry-0-node.parquet").exists)
        time.sleep(_LONG_ENOUGH_S)
        telemetry = sampling.stop()
    assert telemetry.error is None
    return Sampled(telemetry, read_samples(folder / telemetry.file))


def test_every_device_is_described_and_sampled(sampled: Sampled) -> None:
    names = [gpu.name for gpu in sampled.telemetry.gpus]
    assert names == [*(f"gpu{i}" for i in range(6)), "gpu5/mig0", "gpu5/mig1", "gpu6", "gpu7"]
    assert set(sampled.samples.device.unique()) == {*names, "host"}
    healthy = sampled.of("gpu0").iloc[-1]
    assert healthy.power_w == 420
    assert healthy.busy == pytest.approx(0.9)
    assert healthy.memory_busy == pytest.approx(0.4)
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
    assert sampled.telemetry.visible == ("gpu1", "gpu0")


def test_power_is_that_of_the_moment_where_a_device_tells_it(sampled: Sampled) -> None:
    readings = {gpu.name: gpu.power for gpu in sampled.telemetry.gpus}
    assert (readings["gpu0"], readings["gpu3"], readings["gpu1"], readings["gpu5/mig0"]) == (
        *("instant", "usual"),
        *(None, None),
    )
    assert sampled.of("gpu0").power_w.eq(420).all()
    assert sampled.of("gpu3").power_w.eq(400).all()
    assert "gpu3 power_w" not in sampled.telemetry.missing


def test_what_a_chip_counts_inside_has_a_cadence_of_its_own(sampled: Sampled) -> None:
    """At 50 samples a second; the stand-in refuses samples that are less than 100 ms apart, as Hopper does."""
    healthy = sampled.of("gpu0")
    for column, share in {"sm_active": 0.2, "sm_occupancy": 0.3, "tensor_active": 0.5, "dram_active": 1.0}.items():
        known = healthy[healthy[column].notna()]
        # Every quarter of a second at most.
        assert 2 <= len(known) <= _LONG_ENOUGH_S / 0.25
        assert known[column].to_numpy() == pytest.approx(share)
        assert f"gpu0 {column}" not in sampled.telemetry.missing
        assert sampled.telemetry.missing[f"gpu1 {column}"] == "Not Supported"


def sample_beside_each_other(nvml_standin: Path, folder: Path, seconds: float, *each: dict[str, str]) -> list[Sampled]:
    samplings = []
    for node, variables in enumerate(each):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LD_LIBRARY_PATH", str(nvml_standin))
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            for name, value in variables.items():
                patch.setenv(name, value, prepend=os.pathsep if name == "PYTHONPATH" else None)
            samplings.append(Sampling(folder, node, "node", rate_hz=20))
    # What a sampler writes to is there once its devices have been found.
    _wait(lambda: all(parts_path(folder / f"telemetry-{node}-node.parquet").exists() for node in range(len(each))))
    time.sleep(seconds)
    told = [sampling.stop() for sampling in samplings]
    assert [telemetry.error for telemetry in told] == [None] * len(each)
    return [Sampled(telemetry, read_samples(folder / telemetry.file)) for telemetry in told]


def test_an_answer_is_given_up_only_where_it_will_never_come(nvml_standin: Path, tmp_path: Path) -> None:
    """INVALID_ARGUMENT and UNKNOWN twice cost two values; NOT_SUPPORTED is for good."""
    for_now, for_good = sample_beside_each_other(
        nvml_standin, tmp_path, 1.8, {"NVML_STANDIN_GPM": "2,999"}, {"NVML_STANDIN_GPM": "3"}
    )
    assert for_now.of("gpu0").sm_active.notna().any()
    assert for_now.telemetry.missing["gpu0 sm_active"] == "Invalid Argument"
    assert for_good.of("gpu0").sm_active.isna().all()
    assert for_good.telemetry.missing["gpu0 sm_active"] == "Not Supported"
    assert for_good.of("gpu0").busy.notna().all()


def test_devices_that_fail_cost_themselves_alone(nvml_standin: Path, tmp_path: Path) -> None:
    forbidden, lost, broken, uncounted = sample_beside_each_other(
        nvml_standin,
        tmp_path,
        0.3,
        {"NVML_STANDIN_FAILING": "0:4,6:15,7:999"},
        {"NVML_STANDIN_LOST_S": "-1"},
        {"NVML_STANDIN_INIT": "18"},
        {"NVML_STANDIN_COUNT": "999"},
    )
    assert [gpu.name for gpu in forbidden.telemetry.gpus if not gpu.mig] == [f"gpu{index}" for index in range(1, 6)]
    assert {name: forbidden.telemetry.missing[name] for name in ("gpu0", "gpu6", "gpu7")} == {
        "gpu0": "Insufficient Permissions",
        "gpu6": "GPU is lost",
        "gpu7": "Unknown Error",
    }
    assert forbidden.telemetry.visible[:3] == ("gpu1", "gpu2", "gpu3")
    assert "GPU is lost" in lost.telemetry.missing["gpu2"]
    assert {gpu.name for gpu in lost.telemetry.gpus} >= {"gpu0", "gpu7"}
    assert ("gpu0", "gpu1", 4) in {(link.a, link.b, link.nvlinks) for link in lost.telemetry.links}
    assert "mismatch" in broken.telemetry.missing["gpu"]
    assert uncounted.telemetry.missing["gpu"] == "Unknown Error"
    for no_gpus in (broken, uncounted):
        assert set(no_gpus.samples.device.unique()) == {"host"}


# What is missing from nvidia-ml-py 12.535, and from pynvml 11.4.
NEWER = ["NVML_FI_DEV_PCIE_COUNT_TX_BYTES", "NVML_FI_DEV_PCIE_COUNT_RX_BYTES"]
NEWER_STILL = [*NEWER, "nvmlGpm*", "NVML_GPM*", "c_nvmlGpm*", "NVML_FI_DEV_POWER_*", "NVML_ERROR_ARGUMENT_VERSION*"]


def old_pynvml(folder: Path, *without: str) -> str:
    """Write a `pynvml` that is the installed one without some names, all texts in bytes; return its folder."""
    import pynvml

    folder.mkdir()
    (folder / "pynvml.py").write_text(
        f"""
import importlib.util, sys
from fnmatch import fnmatch
spec = importlib.util.spec_from_file_location("real", {pynvml.__file__!r})
real = sys.modules["real"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)
globals().update({{k: v for k, v in vars(real).items() if not any(fnmatch(k, old) for old in {without!r})}})
def nvmlDeviceGetName(handle): return real.nvmlDeviceGetName(handle).encode()
def nvmlDeviceGetUUID(handle): return real.nvmlDeviceGetUUID(handle).encode()
"""
    )
    return str(folder)


def test_an_old_pynvml_costs_the_columns_that_it_has_no_names_for(nvml_standin: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/pynvml.py").write_text("import gone_with_the_driver\n")
    # What an uninstalled package leaves behind: a folder without a module, in front of the real one.
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/pynvml.py").touch()
    paths = [
        old_pynvml(tmp_path / "old", *NEWER),
        old_pynvml(tmp_path / "older", *NEWER_STILL),
        *(str(tmp_path / name) for name in ("broken", "empty")),
    ]
    old, older, broken, empty = sample_beside_each_other(
        nvml_standin, tmp_path, 2.5, *({"PYTHONPATH": path} for path in paths)
    )
    for found in (old, older):
        assert [gpu.model for gpu in found.telemetry.gpus][:2] == ["Stand-in GPU"] * 2
        assert found.telemetry.gpus[3].uuid == "GPU-0003"
        healthy = found.of("gpu0")
        assert healthy[["busy", "power_w", "energy_j", "sm_clock_mhz", "nvlink_tx_bytes"]].notna().all(axis=None)
        assert healthy.pcie_tx_bytes.isna().all()
        assert healthy.pcie_tx_bytes_per_s.notna().any()
        assert "has no NVML_FI_DEV_PCIE_COUNT_TX_BYTES" in found.telemetry.missing["gpu0 pcie_tx_bytes"]
    assert old.of("gpu0").sm_active.notna().any()
    assert old.telemetry.gpus[0].power == "instant"
    assert older.of("gpu0").sm_active.isna().all()
    assert "has no nvmlGpmQueryDeviceSupport" in older.telemetry.missing["gpu0 sm_active"]
    assert older.telemetry.gpus[0].power == "usual"
    assert "has no NVML_FI_DEV_POWER_INSTANT" in older.telemetry.missing["gpu0 power of the moment"]
    assert older.of("gpu0").power_w.eq(400).all()
    for found, why in ((broken, "No module named 'gone_with_the_driver'"), (empty, "has no nvmlInit")):
        assert why in found.telemetry.missing["gpu"]
        assert found.samples.device.eq("host").all()


WHOLE = [Gpu(name="gpu0", uuid="GPU-a1", model="x"), Gpu(name="gpu1", uuid="GPU-b1", model="x")]


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        (None, ("gpu0", "gpu1")),
        ("", ()),
        ("NoDevFiles", ()),
        ("-1", ()),
        ("1", ("gpu1",)),
        (" 1 , 0", ("gpu1", "gpu0")),
        ("1st,0", ("gpu1", "gpu0")),
        ("GPU-b,GPU-a1", ("gpu1", "gpu0")),
        # CUDA sees nothing behind what it does not know.
        ("0,-1,1", ("gpu0",)),
        ("0,7,1", ("gpu0",)),
        ("GPU-b,GPU-c,GPU-a", ("gpu1",)),
        # Indices and UUIDs are not mixed.
        ("GPU-b,0", ("gpu1",)),
        ("1,GPU-a", ("gpu1",)),
        # Both GPUs' UUIDs begin so.
        ("GPU-", ()),
        # Named twice, even by other words: none at all.
        ("1,0,1", ()),
        ("GPU-a,GPU-a1", ()),
    ],
)
def test_visible_gpus_are_those_cuda_would_show(listed: str | None, found: tuple[str, ...]) -> None:
    assert visible_gpus(listed, WHOLE) == found


# gpu0 is whole; gpu1 is in MIG mode, with a GPU instance of two compute instances and one of one.
MIXED = [
    Gpu(name="gpu0", uuid="GPU-a1", model="x"),
    Gpu(name="gpu1", uuid="GPU-b1", model="x", mig_mode=True),
    *(
        Gpu(name=f"gpu1/mig{i}", uuid=f"MIG-{i}", model="x", mig=True, gpu_instance=gi, compute_instance=ci)
        for i, (gi, ci) in enumerate([(1, 0), (1, 1), (2, 0)])
    ),
]


@pytest.mark.parametrize(
    ("listed", "since_570", "before"),
    [
        # One compute instance of a GPU instance, and whole GPUs; before driver 570 one instance and nothing else.
        (None, ("gpu0", "gpu1/mig0", "gpu1/mig2"), ("gpu1/mig0",)),
        ("0", ("gpu0",), ("gpu0",)),
        ("1", ("gpu1/mig0",), ("gpu1/mig0",)),
        ("GPU-a", ("gpu0",), ("gpu0",)),
        ("GPU-b", ("gpu1/mig0", "gpu1/mig2"), ("gpu1/mig0",)),
        ("MIG-2,MIG-1,MIG-0", ("gpu1/mig2", "gpu1/mig1"), ("gpu1/mig2",)),
        # As drivers before 470 name instances.
        ("MIG-GPU-b1/1/1", ("gpu1/mig1",), ("gpu1/mig1",)),
        ("MIG-GPU-b1/2/0", ("gpu1/mig2",), ("gpu1/mig2",)),
        ("MIG-GPU-b1/3/0", (), ()),
    ],
)
def test_of_a_gpu_in_mig_mode_cuda_shows_instances(
    listed: str | None, since_570: tuple[str, ...], before: tuple[str, ...]
) -> None:
    assert visible_gpus(listed, MIXED, "570.26") == since_570
    assert visible_gpus(listed, MIXED, "550.54.15") == before


@pytest.mark.parametrize(
    ("listed", "found", "count", "fault", "limit"),
    [
        (None, Inventory(gpus=tuple(WHOLE)), 2, None, None),
        (None, Inventory(), 0, None, None),
        ("0", Inventory(gpus=tuple(WHOLE)), 1, None, "CUDA_VISIBLE_DEVICES='0' shows 1"),
        ("", Inventory(gpus=tuple(WHOLE)), 0, None, "CUDA_VISIBLE_DEVICES='' hides all GPUs"),
        ("NoDevFiles", Inventory(fault="broken"), 0, None, "hides all GPUs"),
        (
            "9",
            Inventory(gpus=tuple(WHOLE)),
            0,
            "none of this host's 2 GPUs can be used: CUDA_VISIBLE_DEVICES='9'",
            None,
        ),
        ("0", Inventory(fault="broken"), 0, "broken", None),
        # Ranks on MIG instances cannot exchange anything: whole GPUs, or one instance alone.
        (None, Inventory(gpus=tuple(MIXED), driver="570"), 1, None, "MIG instances cannot exchange gradients"),
        ("MIG-0,MIG-2", Inventory(gpus=tuple(MIXED), driver="570"), 1, None, "MIG instances cannot exchange"),
        ("GPU-b", Inventory(gpus=tuple(MIXED), driver="570"), 1, None, "MIG instances cannot exchange gradients"),
        (None, Inventory(gpus=(MIXED[1],)), 0, "a GPU in MIG mode has no instance", None),
        (
            None,
            Inventory(gpus=(WHOLE[0],), failing=(Failing("gpu1", "lost", "reset"),)),
            1,
            None,
            "not working: gpu1 (lost)",
        ),
        (
            None,
            Inventory(failing=(Failing("gpu0", "lost", "reset it"),)),
            0,
            "not working: gpu0 (lost); reset it",
            None,
        ),
    ],
)
def test_as_many_gpus_are_on_offer_as_ranks_can_use(
    listed: str | None, found: Inventory, count: int, fault: str | None, limit: str | None
) -> None:
    offered = offer(listed, found)
    assert offered.gpus == count
    for told, words in ((offered.fault, fault), (offered.limit, limit)):
        assert (words is None) == (told is None)
        assert (words or "") in (told or "")


def test_without_nvidia_the_host_alone_is_sampled(tmp_path: Path) -> None:
    sampling = Sampling(tmp_path, 3, "here", rate_hz=20)
    _wait(parts_path(tmp_path / "telemetry-3-here.parquet").exists)
    ends_s = time.monotonic() + 2.5
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


def test_what_ended_just_before_the_sampler_stops_is_sampled(tmp_path: Path) -> None:
    sampling = Sampling(tmp_path, 0, "here", rate_hz=0.2)
    _wait(parts_path(tmp_path / "telemetry-0-here.parquet").exists)
    time.sleep(1)
    ended_s = now_s()
    telemetry = sampling.stop()
    times = read_samples(tmp_path / telemetry.file).time_s
    assert times.max() >= ended_s
    assert len(times) == telemetry.samples


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
    assert samples[samples.device == "gpu0"].power_w.eq(420).all()
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
        "Sampling(Path(sys.argv[1]), 0, 'here', 20); import time; time.sleep(3); os._exit(9)"
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
