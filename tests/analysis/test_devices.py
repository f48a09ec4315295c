"""What is made of telemetry: planted samples come out as planted, and what is not known stays unknown."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scalestudy.analysis import devices, metrics
from scalestudy.analysis.frames import Frames, frames
from scalestudy.analysis.report import write_report
from scalestudy.analysis.tables import tables
from scalestudy.cluster.clock import now_s
from scalestudy.cluster.sample_file import SampleWriter
from scalestudy.cluster.telemetry import Gpu, Sampling, Telemetry
from scalestudy.launch.folder import StudyFolder
from scalestudy.trainers.record import Costs, Record, Software, Window
from scalestudy.trainers.trial import Trial

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]

# A trial as its ranks see it: import for 10 s, rendezvous, build, first step and warm-up of 5 s each, two windows.
PHASES = {"import": 10.0, "rendezvous": 5.0, "build": 5.0, "first_step": 5.0, "warm_up": 5.0}
STARTS_S = {"import": 0.0, "rendezvous": 10.0, "build": 15.0, "first_step": 20.0, "warm_up": 25.0}
WINDOWS = (Window(30.0, 34.0, 10), Window(35.0, 39.0, 10))
ENDS_S = 41.0
OWN_PID = 100


def gpu_row(at_s: float, device: str = "gpu0", **changes: Any) -> dict[str, Any]:
    """Return a sample: 400 W and 90 % busy while windows are timed, 100 W and idle before."""
    timed = at_s >= 30
    usual = {
        "time_s": at_s,
        "device": device,
        "busy": 0.9 if timed else 0.0,
        "power_w": 400.0 if timed else 100.0,
        "energy_j": 100 * at_s + (300 * (at_s - 30) if timed else 0),
        "memory_used_bytes": 5_000 if timed else 1_000,
        "throttle_reasons": 0,
        "processes": [{"pid": OWN_PID, "memory_bytes": 4_000}] if at_s > 11 else [],
    }
    return usual | changes


def write_samples(trials_path: Path, trial: Trial, rows: Iterable[dict[str, Any]]) -> Telemetry:
    folder = trials_path / trial.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    writer = SampleWriter(folder / "telemetry-0-here.parquet")
    writer.add(rows)
    writer.close()
    gpus = tuple(Gpu(name=f"gpu{i}", uuid=f"GPU-{i}", model="planted") for i in range(8))
    names = tuple(gpu.name for gpu in gpus)
    return Telemetry(host="here", file="telemetry-0-here.parquet", rate_hz=10, gpus=gpus, visible=names)


def as_planted(record: Record, telemetry: Telemetry | None, **changes: Any) -> Record:
    """Return the record with the phases and windows above on every rank."""
    reports = tuple(
        report.model_copy(
            update={
                "phases": PHASES,
                "phase_starts_s": STARTS_S,
                "windows": WINDOWS,
                "pid": OWN_PID + report.rank.rank,
                "telemetry": telemetry if report.rank.rank == 0 else None,
                **changes,
            }
        )
        for report in record.reports
    )
    return record.model_copy(update={"reports": reports})


def times() -> list[float]:
    return np.arange(2, ENDS_S, 0.1).tolist()


@pytest.fixture
def analysed(
    tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord
) -> Callable[..., tuple[Frames, pd.DataFrame]]:
    """Return what the analysis makes of one trial on GPUs whose samples are given by a function of time and device."""

    def analyse(
        *planted: Callable[[float], dict[str, Any]], world_size: int = 1, **changes: Any
    ) -> tuple[Frames, pd.DataFrame]:
        trial = make_trial(device="gpu", world_size=world_size)
        telemetry = write_samples(tmp_path, trial, [row(at_s) for at_s in times() for row in planted])
        record = as_planted(make_record(trial), telemetry.model_copy(update=changes))
        found = frames([record], tmp_path)
        return found, tables(found).trials

    return analyse


def test_use_is_told_by_phase_and_by_window(analysed: Any) -> None:
    found, _ = analysed(gpu_row)
    use = found.devices.set_index(["phase", "window"])
    # Power steps from one sample to the next: a tenth of a second of 5 s may be of either kind.
    assert use.loc[("build", np.nan)].busy.item() == 0
    assert use.loc[("build", np.nan)].power_w.item() == pytest.approx(100)
    assert use.loc[("measure", np.nan)].busy.item() == pytest.approx(0.9)
    assert use.loc[("measure", np.nan)].busy_p95.item() == pytest.approx(0.9)
    assert use.loc[("measure", np.nan)].peak_memory_bytes.item() == 5_000
    for window in (0, 1):
        assert use.loc[("measure", window)].energy_j.item() == pytest.approx(4 * 400)
        assert use.loc[("measure", window)].seconds.item() == 4
    # The sampler was not there from the start of the import: what it did not see is not known.
    assert np.isnan(use.loc[("import", np.nan)].energy_j.item())


def test_a_ranks_samples_are_those_of_the_gpu_that_it_drives(
    tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    """Its devices are CUDA's numbers: here CUDA shows gpu6, gpu7 and gpu4, and the two ranks drive the last two."""
    trial = make_trial(device="gpu", world_size=2)
    rows = [gpu_row(at_s, f"gpu{gpu}", power_w=100.0 * gpu) for at_s in times() for gpu in (4, 6, 7)]
    telemetry = write_samples(tmp_path, trial, rows).model_copy(update={"visible": ("gpu6", "gpu7", "gpu4")})
    record = as_planted(make_record(trial), telemetry)

    def driven(*devices: tuple[int, ...]) -> list[str]:
        ranks = [
            report.rank.model_copy(update={"devices": own}) for report, own in zip(record.reports, devices, strict=True)
        ]
        reports = [report.model_copy(update={"rank": rank}) for report, rank in zip(record.reports, ranks, strict=True)]
        use = frames([record.model_copy(update={"reports": tuple(reports)})], tmp_path).devices
        return list(use[use["rank"].notna()].groupby("rank").device_name.unique().str.join(" "))

    assert driven((1,), (2,)) == ["gpu7", "gpu4"]
    # From before repeats took turns: that of the local rank.
    assert driven((), ()) == ["gpu6", "gpu7"]


def test_energy_per_image_is_that_of_the_timed_windows(analysed: Any) -> None:
    _, trials = analysed(gpu_row)
    # 20 steps of 8 images.
    assert trials.energy_j.item() == pytest.approx(2 * 4 * 400)
    assert trials.joules_per_image.item() == pytest.approx(3200 / 160)
    assert trials.images_per_s_per_w.item() == pytest.approx(160 / 3200)
    assert trials.device_busy.item() == pytest.approx(0.9)
    assert trials.throttled_s.item() == 0


@pytest.mark.parametrize("at_s", [32.0, 36.52])
def test_a_counter_that_wraps_or_is_reset_costs_nothing(analysed: Any, at_s: float) -> None:
    def wrapping(now: float) -> dict[str, Any]:
        row = gpu_row(now)
        return row | {"energy_j": row["energy_j"] - (4_000 if now >= at_s else 0)}

    _, trials = analysed(wrapping)
    assert trials.energy_j.item() == pytest.approx(3200)


def test_without_a_counter_energy_is_the_integral_of_power(analysed: Any) -> None:
    _, trials = analysed(lambda at_s: gpu_row(at_s, energy_j=None))
    # The first window begins on the step of the power: half a sample's time at 250 W.
    assert trials.energy_j.item() == pytest.approx(3200, rel=0.01)


def test_unknown_energy_is_empty_not_zero(analysed: Any) -> None:
    _, trials = analysed(lambda at_s: gpu_row(at_s, energy_j=None, power_w=None))
    assert trials[["energy_j", "joules_per_image"]].isna().all(axis=None)
    assert trials.device_busy.item() == pytest.approx(0.9)


def test_energy_of_some_of_the_devices_is_not_the_trials(analysed: Any) -> None:
    both = [gpu_row, lambda at_s: gpu_row(at_s, "gpu1")]
    _, trials = analysed(*both, world_size=2)
    assert trials.energy_j.item() == pytest.approx(2 * 3200)
    _, trials = analysed(gpu_row, world_size=2)
    assert trials.energy_j.isna().item()


def test_a_device_that_is_lost_has_no_energy_after_it(analysed: Any) -> None:
    def lost(at_s: float) -> dict[str, Any]:
        return gpu_row(min(at_s, 36.0))

    found, trials = analysed(lost, missing={"gpu0": "lost at 36.0: GPU is lost"})
    assert trials.energy_j.isna().item()
    assert found.notices.kind.tolist() == ["lost"]
    assert found.notices.text.item() == "gpu0 of here: lost at 36.0: GPU is lost"


def test_a_throttled_device_is_named_with_the_reason(analysed: Any) -> None:
    found, trials = analysed(lambda at_s: gpu_row(at_s, throttle_reasons=0x40 if at_s >= 35 else 0x4))
    assert trials.throttled_s.item() == pytest.approx(4, abs=0.11)
    assert found.notices.kind.tolist() == ["throttled"]
    text = found.notices.text.item()
    assert text.startswith("rank 0's gpu0 of here was throttled 4")
    assert text.endswith("% of the measured time: heat (hardware)")
    # The power cap is how a GPU works at its limit: it is told apart.
    use = found.devices.set_index(["phase", "window"])
    assert use.loc[("measure", 0)].power_capped_s.item() == pytest.approx(4)
    assert use.loc[("measure", 0)].throttled_s.item() == 0


def test_throttling_that_is_not_told_is_unknown(analysed: Any) -> None:
    _, trials = analysed(lambda at_s: gpu_row(at_s, throttle_reasons=None))
    assert trials.throttled_s.isna().item()


def test_a_device_at_work_for_others_is_named(analysed: Any) -> None:
    def held(at_s: float, **more: Any) -> dict[str, Any]:
        row = gpu_row(at_s, **more)
        return row | {"processes": [*row["processes"], {"pid": 7, "memory_bytes": 1}]}

    found, _ = analysed(held)
    assert found.notices[["kind", "text"]].to_numpy().tolist() == [
        ["busy before", "rank 0's gpu0 of here was held by process 7 before the trial began"],
        ["shared", "rank 0's gpu0 of here was shared with process 7 while it was measured"],
    ]
    found, _ = analysed(lambda at_s: held(at_s, busy=0.5))
    assert found.notices.text.iloc[0] == "rank 0's gpu0 of here was 50% busy before the trial began"


def test_in_a_container_ranks_may_have_other_process_numbers(analysed: Any) -> None:
    def foreign_numbers(at_s: float, *pids: int) -> dict[str, Any]:
        return gpu_row(at_s, processes=[{"pid": pid, "memory_bytes": 1} for pid in pids] if at_s > 11 else [])

    found, _ = analysed(lambda at_s: foreign_numbers(at_s, 50_001))
    assert found.notices.empty
    found, _ = analysed(lambda at_s: foreign_numbers(at_s, 50_001, 50_002))
    assert found.notices.kind.tolist() == ["shared"]


def test_a_trial_without_telemetry_says_so(tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord) -> None:
    telemetry = Telemetry(host="here", file="telemetry-0-here.parquet", rate_hz=10)
    died = telemetry.model_copy(update={"error": "the sampler was killed by signal 9"})
    records = [
        as_planted(make_record(make_trial(repeat=repeat)), given)
        for repeat, given in enumerate((None, telemetry, died, telemetry))
    ]
    torn = tmp_path / records[3].trial.folder_name / telemetry.file
    torn.parent.mkdir()
    torn.write_bytes(b"PAR1 torn")
    found = frames(records, tmp_path)
    assert found.devices.empty
    assert found.notices.text.tolist() == [
        "telemetry-0-here.parquet is missing or damaged",
        "no telemetry of here: the sampler was killed by signal 9",
        "telemetry-0-here.parquet is missing or damaged",
    ]
    trials = metrics.with_devices(metrics.with_throughput(found.trials), found.devices)
    assert trials.device_busy.isna().all()


@pytest.mark.parametrize(
    ("by_device_s", "text"), [(3.98, None), (3.6, "rank 0's windows are -10.0% by its device's clock")]
)
def test_windows_that_host_and_device_time_differently_are_named(
    tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord, by_device_s: float, text: str | None
) -> None:
    windows = tuple(window._replace(device_s=by_device_s) for window in WINDOWS)
    found = frames([as_planted(make_record(make_trial(device="gpu")), None, windows=windows)], tmp_path)
    assert found.notices.text.tolist() == ([text] if text else [])


def test_on_cpu_a_device_is_the_ranks_cpus_and_energy_is_the_hosts(
    tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    trial = make_trial(world_size=2)
    # CPU 0 works in full, CPU 1 half the time; CPU 2 is no rank's, and works a fifth of it; a tenth of CPU 0 is stolen.
    telemetry = write_samples(
        tmp_path,
        trial,
        [
            {
                "time_s": at_s,
                "device": "host",
                "cpu_busy_s": [50 + at_s, at_s / 2, at_s / 5],
                "cpu_steal_s": [at_s / 10, 0.0, 0.0],
                "memory_used_bytes": 7,
                "energy_j": 30 * at_s,
            }
            for at_s in times()
        ],
    )
    record = as_planted(make_record(trial), telemetry)
    pinned = tuple(
        report.model_copy(
            update={"software": Software(python="3", versions={}, settings={}, cpus=(rank,), variables={})}
        )
        for rank, report in enumerate(record.reports)
    )
    found = frames([record.model_copy(update={"reports": pinned})], tmp_path)
    measured = found.devices[(found.devices.phase == "measure") & found.devices.window.isna()]
    assert measured.device_name.tolist() == ["CPU 0", "CPU 1", "host"]
    busy = measured.set_index("device_name").busy
    assert busy[["CPU 0", "CPU 1", "host"]].tolist() == pytest.approx([1, 0.5, 1.7 / 3])
    trials = metrics.with_devices(metrics.with_throughput(found.trials), found.devices)
    assert trials.device_busy.item() == pytest.approx(0.75)
    assert trials.energy_j.item() == pytest.approx(8 * 30)
    assert found.notices[["kind", "text"]].to_numpy().tolist() == [
        ["stolen", "the hypervisor took 5% of the ranks' CPUs of here"],
        ["shared", "other work kept 20% of the other CPUs of here busy"],
    ]


def on_cpus(
    tmp_path: Path, record: Record, pinned: tuple[tuple[int, ...], ...], row: Callable[[float], Any], **changes: Any
) -> Frames:
    """Return what the analysis makes of a trial on CPUs whose samples are given by a function of time."""
    samples = [{"time_s": at_s, "device": "host"} | row(at_s) for at_s in times()]
    telemetry = write_samples(tmp_path, record.trial, samples).model_copy(update=changes)
    record = as_planted(record, telemetry)
    software = [Software(python="3", versions={}, settings={}, cpus=cpus, variables={}) for cpus in pinned]
    reports = zip(record.reports, software, strict=True)
    told = tuple(report.model_copy(update={"software": own}) for report, own in reports)
    return frames([record.model_copy(update={"reports": told})], tmp_path)


def busy_measured(found: Frames) -> dict[str, float]:
    measured = found.devices[(found.devices.phase == "measure") & found.devices.window.isna()]
    return dict(zip(measured.device_name, measured.busy.round(3), strict=True))


@pytest.mark.parametrize(
    ("cpus", "pinned", "busy"),
    [
        # A container that sees CPUs 6 and 7 alone.
        ((6, 7), ((6,), (7,)), {"CPU 6": 1.0, "CPU 7": 0.5, "host": 0.75}),
        # CPU 1 is offline: the second column is CPU 2.
        ((0, 2), ((2,), (0,)), {"CPU 2": 0.5, "CPU 0": 1.0, "host": 0.75}),
        ((7, 6), ((6, 7), (6,)), {"CPU 6, 7": 0.75, "CPU 6": 0.5, "host": 0.75}),
        # A record from before the numbers were kept.
        (None, ((1,), (0,)), {"CPU 1": 0.5, "CPU 0": 1.0, "host": 0.75}),
    ],
)
def test_a_cpus_number_is_not_its_place(
    tmp_path: Path,
    make_trial: MakeTrial,
    make_record: MakeRecord,
    cpus: tuple[int, ...] | None,
    pinned: tuple[tuple[int, ...], ...],
    busy: dict[str, float],
) -> None:
    def row(at_s: float) -> dict[str, Any]:
        return {"cpu_busy_s": [at_s, at_s / 2], "cpu_steal_s": [0.0, at_s / 10]}

    found = on_cpus(tmp_path, make_record(make_trial(world_size=2)), pinned, row, cpus=cpus)
    assert busy_measured(found) == pytest.approx(busy)
    assert found.notices.text.tolist() == ["the hypervisor took 5% of the ranks' CPUs of here"]


@pytest.mark.parametrize(
    ("cpus", "row"),
    [
        # Not among those that are listed.
        ((0, 1), {"cpu_busy_s": [1.0, 2.0], "cpu_steal_s": [0.0, 0.0]}),
        # Nobody says which they are.
        ((), {"cpu_busy_s": [1.0, 2.0], "cpu_steal_s": [0.0, 0.0]}),
        (None, {"cpu_busy_s": [1.0, 2.0], "cpu_steal_s": [0.0, 0.0]}),
        # Gone offline.
        ((0, 6), {"cpu_busy_s": [1.0, None], "cpu_steal_s": [0.0, None]}),
        # The kernel does not say.
        ((), {"cpu_busy_s": None, "cpu_steal_s": None}),
        (None, {"cpu_busy_s": None, "cpu_steal_s": None}),
    ],
)
def test_a_cpu_that_nobody_has_counted_is_unknown_without_a_warning(
    tmp_path: Path,
    make_trial: MakeTrial,
    make_record: MakeRecord,
    cpus: tuple[int, ...] | None,
    row: dict[str, Any],
) -> None:
    found = on_cpus(tmp_path, make_record(make_trial()), ((6,),), lambda _: row, cpus=cpus)
    assert np.isnan(busy_measured(found)["CPU 6"])
    trials = metrics.with_devices(metrics.with_throughput(found.trials), found.devices)
    assert trials.device_busy.isna().all()


def test_costs_and_carbon_are_hand_worked(analysed: Any) -> None:
    _, trials = analysed(gpu_row, lambda at_s: gpu_row(at_s, "gpu1"), world_size=2)
    points = metrics.points(trials)
    # 320 images in 8 s on 2 devices: 40 images/s, and 20 J an image.
    assert points.throughput_images_per_s.item() == pytest.approx(40)
    priced = metrics.costs(
        points, Costs(price_per_device_hour=3.6, carbon_g_per_kwh=360, images_per_epoch=2_000_000)
    ).iloc[0]
    # 1e6 / 40 s = 25,000 s on 2 devices at 0.001 a second.
    assert priced.cost_per_million == pytest.approx(50)
    assert priced.cost_per_epoch == pytest.approx(100)
    # 20e6 J = 5.556 kWh.
    assert priced.carbon_g_per_million == pytest.approx(2000)
    assert priced.carbon_g_per_epoch == pytest.approx(4000)
    free = metrics.costs(points, Costs(carbon_g_per_kwh=360)).iloc[0]
    assert np.isnan(free.cost_per_million)
    assert np.isnan(free.carbon_g_per_epoch)


def test_the_report_of_eight_scripted_gpus_names_what_was_wrong(
    tmp_path: Path,
    make_trial: MakeTrial,
    make_record: MakeRecord,
    nvml_standin: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real sampler on the stand-in, its samples joined to windows that were timed by the same clock."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml_standin))
    monkeypatch.setenv("NVML_STANDIN_PID", str(os.getpid()))
    monkeypatch.setenv("NVML_STANDIN_LOST_S", "2")
    monkeypatch.setenv("NVML_STANDIN_BUSY_S", "2.5")
    # Eight whole GPUs: one in MIG mode would be none to its ranks.
    monkeypatch.setenv("NVML_STANDIN_MIG", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    trial = make_trial(device="gpu", world_size=8)
    path = folder.begin(trial)
    began_s = now_s()
    sampling = Sampling(path, 0, "here", rate_hz=50)
    time.sleep(5)
    windows = (Window(now_s() - 1.5, now_s() - 0.5, 5),)
    telemetry = sampling.stop()
    record = as_planted(
        make_record(trial),
        telemetry,
        windows=windows,
        phases={"import": 2.4, "rendezvous": 0.25},
        phase_starts_s={"import": began_s, "rendezvous": began_s + 2.4},
    )
    own = record.reports[0].model_copy(update={"pid": os.getpid()})
    record = record.model_copy(update={"reports": (own, *record.reports[1:])})
    folder.finish(path, record)

    html = write_report(folder.path, {"price_per_device_hour": 2.0}).html.read_text()
    assert (
        "rank 4&#39;s gpu4 of here was throttled 100% of the measured time: hardware slowdown, heat (hardware)" in html
    )
    assert "rank 7&#39;s gpu7 of here was 90% busy before the trial began" in html
    assert "rank 7&#39;s gpu7 of here was shared with process 4242" not in html
    assert "gpu2 of here: lost at" in html
    assert "rank 6&#39;s gpu6 of here reported XID 79" in html
    assert "gpu1 power_w: Not Supported" in html
    assert "on most GPUs the mean of the last second" in html
    assert "gpu0–gpu1: 4 NVLinks, one NUMA node" in html
    assert "USD per million images" in html
    for figure in ("timeline", "device_map"):
        assert (folder.path / f"figures/{figure}.svg").stat().st_size > 1000
    use = pd.read_parquet(folder.path / "devices.parquet")
    measured = use[(use.phase == "measure") & use.window.notna()].set_index("device_name")
    # gpu3's counter has wrapped by then, and gpu4 takes less.
    for name, watts in {"gpu0": 400, "gpu3": 400, "gpu4": 150, "gpu6": 400}.items():
        assert measured.power_w[name] == pytest.approx(watts, rel=0.03), name
    assert measured.energy_j[["gpu1", "gpu2"]].isna().all()
    results = pd.read_csv(folder.path / "results.csv")
    assert results.energy_j.isna().all()


@pytest.mark.parametrize("every_s", [0.1, 0.25, 1.0, 2.0])
def test_a_share_that_stands_for_the_time_before_its_sample_is_booked_there(every_s: float) -> None:
    """Idle up to 10 s, then at work: the span that begins there holds no idle time, however rare the samples are."""
    time_s = np.arange(0, 20 + every_s, every_s)
    share = np.where(time_s > 10 + 1e-9, 1.0, 0.0)
    # Between two shares others are sampled, and of the first nobody knows when its time began.
    time_s, share = np.repeat(time_s, 2) + np.tile([0, every_s / 3], len(time_s)), np.repeat(share, 2)
    share[1::2] = np.nan
    starts_s, ends_s = np.array([10.0, 4.0, 8.0, 30.0]), np.array([14.0, 8.0, 12.0, 31.0])
    means = devices._span_means(time_s, share, starts_s, ends_s)
    assert means[:3] == pytest.approx([1.0, 0.0, 0.5])
    assert np.isnan(means[3])
