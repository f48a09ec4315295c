"""Records to data frames: one row a trial, a window, a loss, a phase, a process."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scalestudy.analysis import contention, devices, placement
from scalestudy.analysis.causes import part_times, rank_steps
from scalestudy.analysis.conditions import conditions, device_models
from scalestudy.analysis.losses import curve, unlearned
from scalestudy.analysis.quantiles import median
from scalestudy.analysis.steadiness import steadiness
from scalestudy.trainers.files import RECORD_NAME, DamagedError, read_record, record_paths
from scalestudy.trainers.options import changes
from scalestudy.trainers.record import Memory, RankReport, Record
from scalestudy.trainers.trainer import series_name
from scalestudy.trainers.trial import Trial

SETUP_PHASES = ("import", "rendezvous", "build", "first_step")
PHASES = (*SETUP_PHASES, "warm_up")
# Percentiles of a rank's local steps, timed one by one; last: the share in which it was the last of all ranks.
RANK_COLUMNS = ["trial", "rank", "host", "last", "p05_s", "p25_s", "p50_s", "p75_s", "p95_s"]
_PHASE_WORDS = {"causes": "the parts of a step", "test": "the test accuracy"}


@dataclass(frozen=True, kw_only=True)
class Frames:
    """A study's records as data frames; every frame but `trials` holds trials that ended ok.

    trials: a row a trial. windows: trial, window, step_time_s (of the slowest rank). losses: trial, step, images, loss
    (mean over processes). phases: trial, phase, seconds (of the slowest rank). memory: trial, rank, peak_memory_bytes.
    devices: what each device did, by phase and window, see `devices.USE_COLUMNS`. notices: trial, kind, text: what a
    reader must know of the devices and of what is missing. ranks: a row a rank of how it steps alone, see
    `RANK_COLUMNS`.
    """

    trials: pd.DataFrame
    windows: pd.DataFrame
    losses: pd.DataFrame
    phases: pd.DataFrame
    memory: pd.DataFrame
    devices: pd.DataFrame
    notices: pd.DataFrame
    ranks: pd.DataFrame


def record_files(out: Path) -> list[Path]:
    """Return the records of a study's folder; raises ValueError where there are none."""
    files = record_paths(out / "trials")
    if not files:
        raise ValueError(
            f"{out}: no records there (trials/*/{RECORD_NAME}); give the --out folder of a `scalestudy run`"
        )
    return files


def read_records(files: Iterable[Path], damaged: list[DamagedError]) -> Iterator[Record]:
    """Yield the records one by one, so that a big study fits into memory; damaged ones are listed instead."""
    # A record is a tree of a thousand small values: the cycle collector walks them all, for nothing, and takes as long
    # as reading them.
    gc.disable()
    try:
        for file in files:
            try:
                yield read_record(file.parent)
            except FileNotFoundError:
                # Set aside or taken away since the files were listed.
                continue
            except DamagedError as error:
                damaged.append(error)
    finally:
        gc.enable()


def frames(records: Iterable[Record], trials_path: Path) -> Frames:
    """Return a study's data frames; the records' telemetry lies in `trials_path`, a folder a trial."""
    trials: list[dict[str, Any]] = []
    windows: list[tuple[str, *tuple[NDArray[Any], ...]]] = []
    losses: list[tuple[str, *tuple[NDArray[Any], ...]]] = []
    phases: list[tuple[str, str, float]] = []
    memory: list[tuple[str, int, int]] = []
    use: list[tuple[Any, ...]] = []
    notices: list[tuple[str, str, str]] = []
    ranks: list[tuple[Any, ...]] = []
    step_times_s: list[NDArray[np.float64]] = []
    warm_ups_s: list[NDArray[np.float64]] = []
    for record in records:
        row = trial_row(record.trial) | {
            "launcher": record.environment.launcher,
            "outcome": record.outcome,
            "reason": record.reason,
            "started_at": record.environment.started_at,
            "duration_s": record.environment.duration_s,
        }
        trials.append(row)
        if record.outcome != "ok":
            continue
        seconds, steps = window_seconds(record.reports)
        phase_s = slowest_phases(record.reports)
        processes = [
            (row["trial"], report.rank.rank, peak_memory_bytes(report)) for report in record.reports if report.memory
        ]
        # Slowest rank: the all-reduce makes every other rank wait for it.
        row["measured_s"] = seconds.sum(axis=1).max()
        row["measured_steps"] = steps.sum()
        row["median_step_s"] = float(median(seconds.max(axis=0) / steps))
        row |= part_times(record.reports)
        row["warm_up_steady"] = all(report.warm_up_steady for report in record.reports)
        row["first_step_s"] = phase_s.get("first_step")
        row["setup_s"] = sum(phase_s[phase] for phase in SETUP_PHASES if phase in phase_s)
        row["peak_memory_bytes"] = max((size for _, _, size in processes), default=None)
        row["warm_up_peak_bytes"] = max(
            (_peak_bytes(report.warm_up_memory) for report in record.reports if report.warm_up_memory), default=None
        )
        row["test_accuracy"] = record.reports[0].test_accuracy
        row["told_devices"] = sum(report.replicas for report in record.reports)
        row["told_processes"] = len(record.reports)
        row["conditions"] = conditions(record)
        row["device_models"] = device_models(record)
        row["sharing_ranks"] = len(placement.sharing(record.reports))
        row["far_ranks"] = len(placement.far_from_gpu(record.reports))
        row["throttled_share"] = contention.throttled_share(record.reports)
        step_times_s.append(seconds.max(axis=0) / steps)
        warm_ups_s.append(warm_up_seconds(record.reports))
        data = record.trial.data
        if data.real and (flat := unlearned(curve(record.reports), data)) is not None:
            row["flat_loss_first"], row["flat_loss_late"] = flat
        ranks += ((row["trial"], *rank) for rank in rank_steps(record.reports))
        row["training_images"] = record.reports[0].training_images
        phases += [(row["trial"], phase, phase_s[phase]) for phase in PHASES if phase in phase_s]
        memory += processes
        windows.append((row["trial"], np.arange(len(steps)), step_times_s[-1]))
        losses.append((row["trial"], *_losses(record)))
        sampled = devices.nodes(record, trials_path / row["folder_name"])
        use += devices.use(record, sampled)
        notices += devices.notices(record, sampled)
        notices += contention.notices(record)
        notices += missing_parts(record)
    if any(row["nodes"] > 1 for row in trials):
        # Eight devices of one node are not the same as one of eight nodes; on one node there is nothing to tell apart.
        for row in trials:
            row["workload"] += f", {row['devices_per_node']} device{'s' if row['devices_per_node'] > 1 else ''} a node"
    steady = steadiness(step_times_s, warm_ups_s)
    measured = [row for row in trials if row["outcome"] == "ok"]
    for row, found in zip(measured, steady.to_dict("records"), strict=True):
        row |= found
    return Frames(
        trials=pd.DataFrame(trials).reindex(columns=_TRIAL_COLUMNS),
        windows=_together(windows, ["trial", "window", "step_time_s"]),
        losses=_together(losses, ["trial", "step", "images", "loss"]),
        phases=pd.DataFrame(phases, columns=["trial", "phase", "seconds"]),
        memory=pd.DataFrame(memory, columns=["trial", "rank", "peak_memory_bytes"]),
        devices=_together(use, devices.USE_COLUMNS),
        notices=pd.DataFrame(notices, columns=devices.NOTICE_COLUMNS),
        ranks=pd.DataFrame(ranks, columns=RANK_COLUMNS),
    )


def trial_row(trial: Trial) -> dict[str, Any]:
    """Return what a trial is, as a row."""
    data, folder_name = trial.data, trial.folder_name
    source = data.source if data.folder is None else f"{data.source}:{_printable(Path(data.folder).name)}"
    weak = trial.scaling == "weak"
    work = [
        trial.model,
        f"{source} {data.channels}×{data.image_size}×{data.image_size}",
        f"{trial.per_device_batch} images a device" if weak else f"{trial.global_batch} images a step",
        trial.optimizer.name,
        trial.precision,
    ]
    if trial.device == "cpu":
        # Both threads of a core are less than two cores.
        kind = "hardware thread" if trial.hyper_threads else "CPU"
        work.append(f"{trial.threads_per_device} {kind}{'s' if trial.threads_per_device > 1 else ''} a device")
    return {
        # The id, which is the hash of a text, ends the name.
        "trial": folder_name.rpartition("-")[2],
        "folder_name": folder_name,
        "trainer": trial.trainer,
        "model": trial.model,
        "world_size": trial.world_size,
        "nodes": trial.nodes,
        "devices_per_node": trial.devices_per_node,
        "repeat": trial.repeat,
        "scaling": trial.scaling,
        "per_device_batch": trial.per_device_batch,
        "global_batch": trial.global_batch,
        "precision": trial.precision,
        "execution": trial.execution,
        "options": changes(trial.options),
        "series": series_name(trial),
        "data": data.name,
        "device": trial.device,
        "threads_per_device": trial.threads_per_device,
        # Trials of one workload are the same work, whoever does it: only those are set against each other.
        "workload": ", ".join(work),
    }


def _printable(name: str) -> str:
    """Return a folder's name with what no page and no figure may hold written out: line breaks, control characters."""
    return name if name.isprintable() else repr(name)[1:-1]


def window_seconds(reports: tuple[RankReport, ...]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return each window's seconds, ranks × windows, and its steps, which are the same on every rank."""
    seconds = [[window.end_s - window.start_s for window in report.windows] for report in reports]
    return np.array(seconds), np.array([window.steps for window in reports[0].windows])


def warm_up_seconds(reports: tuple[RankReport, ...]) -> NDArray[np.float64]:
    """Return the slowest rank's seconds a step in every window of the warm-up; none where ranks have different ones."""
    if len({len(report.warm_up_windows) for report in reports}) > 1 or not reports[0].warm_up_windows:
        return np.empty(0)
    steps_s = [
        [(window.end_s - window.start_s) / max(window.steps, 1) for window in report.warm_up_windows]
        for report in reports
    ]
    found: NDArray[np.float64] = np.array(steps_s).max(axis=0)
    return found


def slowest_phases(reports: tuple[RankReport, ...]) -> dict[str, float]:
    """Return each phase's seconds on the rank that took longest."""
    names = {name: None for report in reports for name in report.phases}
    return {name: max(report.phases.get(name, 0.0) for report in reports) for name in names}


def peak_memory_bytes(report: RankReport) -> int:
    """Return the device's peak in the timed windows where the framework counts it, else the process' resident one."""
    assert report.memory is not None
    return _peak_bytes(report.memory)


def missing_parts(record: Record) -> Iterator[tuple[str, str, str]]:
    """Yield trial, kind and text of what a trial was to measure after its timed windows and could not."""
    for phase, why in record.missing.items():
        yield record.trial.id, "without", f"{_PHASE_WORDS.get(phase, phase)}: {why}"


def _peak_bytes(memory: Memory) -> int:
    return memory.peak_allocated_bytes or memory.peak_resident_bytes


def _losses(record: Record) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return steps, images seen by all ranks and the loss, the mean over processes."""
    by_rank = np.array([[point.loss for point in report.losses] for report in record.reports], dtype=np.float64)
    steps = np.array([point.step for point in record.reports[0].losses], dtype=np.int64)
    return steps, steps * record.trial.global_batch, by_rank.mean(axis=0)


def _together(parts: Sequence[tuple[Any, ...]], columns: list[str]) -> pd.DataFrame:
    """Stack the columns of every part, arrays or one value for all of its rows: a frame a part would take minutes."""
    if not parts:
        return pd.DataFrame(columns=columns)
    counts = [len(part[-1]) for part in parts]
    stacked = [
        np.concatenate(values) if isinstance(values[0], np.ndarray) else np.repeat(values, counts)
        for values in zip(*parts, strict=True)
    ]
    return pd.DataFrame(dict(zip(columns, stacked, strict=True)))


_TRIAL_COLUMNS = [
    "trial",
    "folder_name",
    "trainer",
    "model",
    "launcher",
    "world_size",
    "nodes",
    "devices_per_node",
    "repeat",
    "scaling",
    "per_device_batch",
    "global_batch",
    "precision",
    "execution",
    "options",
    "series",
    "data",
    "device",
    "threads_per_device",
    "workload",
    "outcome",
    "reason",
    "started_at",
    "duration_s",
    "measured_s",
    "measured_steps",
    "median_step_s",
    "whole_s",
    "resident_s",
    "resident_mean_s",
    "local_typical_s",
    "local_max_s",
    "expected_max_s",
    "exchange_s",
    "exchanged_bytes",
    "slowest_rank",
    "slowest_host",
    "warm_up_steady",
    "first_step_s",
    "setup_s",
    "peak_memory_bytes",
    "warm_up_peak_bytes",
    "test_accuracy",
    "training_images",
    "told_devices",
    "told_processes",
    "conditions",
    "device_models",
    "sharing_ranks",
    "far_ranks",
    "throttled_share",
    "within",
    "changed_at",
    "changed_by",
    "drifted_by",
    "apart",
    "flat_loss_first",
    "flat_loss_late",
]
