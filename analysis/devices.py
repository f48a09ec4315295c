"""Telemetry to data frames: what every device of a trial did, by phase and by window, and what it should not have done.

A rank's device is its GPU; on CPU it is the CPUs that it is pinned to. Samples are joined to phases and windows by
their times: both are read from one clock.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.integrate import cumulative_trapezoid

from scalestudy.analysis.quantiles import quantiles
from scalestudy.cluster.sample_file import read_samples
from scalestudy.cluster.telemetry import Telemetry
from scalestudy.cluster.throttling import POWER_CAP, THROTTLE_REASONS
from scalestudy.trainers.devices import own_devices
from scalestudy.trainers.record import RankReport, Record

Values = NDArray[np.float64]

USE_COLUMNS = [
    "trial",
    "rank",
    "host",
    "device_name",
    "phase",
    "window",
    "seconds",
    "busy",
    "busy_p95",
    "sm_active",
    "peak_memory_bytes",
    "power_w",
    "energy_j",
    "throttled_s",
    "power_capped_s",
]
_READ = [
    "time_s",
    "device",
    "busy",
    "sm_active",
    "memory_used_bytes",
    "power_w",
    "energy_j",
    "throttle_reasons",
    "xid",
    "processes",
    "cpu_busy_s",
    "cpu_steal_s",
]
NOTICE_COLUMNS = ["trial", "kind", "text"]
# A device that is busier than this before the trial has taken it works for somebody else.
_BUSY_BEFORE = 0.05
# So much of a rank's CPUs taken by the hypervisor, or of the host's other CPUs by other work, may show in the results.
_STOLEN, _OTHERS_BUSY = 0.02, 0.10
# What the host adds around a window is microseconds.
_CLOCKS_DIFFER = 0.01
_MEASURE = "measure"


@dataclass(frozen=True, kw_only=True)
class Track:
    """One device over time; all arrays are as long as `time_s`, and NaN where nothing is known.

    busy_s and energy_j are sums since the first sample, unwrapped.
    """

    name: str
    time_s: Values
    busy: Values
    busy_s: Values
    sm_active: Values
    memory_bytes: Values
    power_w: Values
    energy_j: Values
    throttle_reasons: Values


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node's telemetry with its samples by device, and the ranks that ran there."""

    telemetry: Telemetry
    samples: Mapping[str, pd.DataFrame]
    reports: tuple[RankReport, ...]

    @cached_property
    def by_cpu(self) -> Mapping[str, tuple[NDArray[np.bool_], Values]]:
        """By column which of the host's samples list what its CPUs have counted, and those as samples × CPUs."""
        found = {}
        for column in ("cpu_busy_s", "cpu_steal_s"):
            listed = self.samples["host"][column]
            known = listed.notna().to_numpy()
            if known.any():
                found[column] = known, np.stack(listed.to_numpy()[known]).astype(np.float64)
        return found


def nodes(record: Record, trial_path: Path) -> list[Node]:
    """Return the nodes of a trial that have samples."""
    found: list[Node] = []
    for first in record.reports:
        if first.telemetry is None:
            continue
        try:
            samples = read_samples(trial_path / first.telemetry.file, _READ)
        except (OSError, ValueError):
            # Taken away since, or damaged: `notices` says so.
            continue
        own = tuple(report for report in record.reports if report.rank.node_rank == first.rank.node_rank)
        by_device = {str(name): samples[samples.device == name] for name in samples.device.unique()}
        found.append(Node(telemetry=first.telemetry, samples=by_device, reports=own))
    return found


def use(record: Record, found: list[Node]) -> Iterator[tuple[Any, ...]]:
    """Yield USE_COLUMNS of every device: a value for each phase, then for each window of the phase `measure`.

    What is the same in all of them is yielded once. `rank` is NaN of the device `host` of a node: its energy is that of
    all its processors.
    """
    trial = record.trial.id if found else ""
    for node in found:
        for report in node.reports:
            for track in rank_tracks(record, report, node):
                yield _use(trial, report.rank.rank, node, report, track)
        if (host := _host_track(node)) is not None:
            yield _use(trial, np.nan, node, node.reports[0], host)


def notices(record: Record, found: list[Node]) -> Iterator[tuple[str, str, str]]:
    """Yield NOTICE_COLUMNS: what a reader must know of the devices before quoting the trial."""
    read = {node.telemetry.file for node in found}
    for report in record.reports:
        if (telemetry := report.telemetry) is not None:
            if telemetry.error is not None:
                yield record.trial.id, "telemetry", f"no telemetry of {telemetry.host}: {telemetry.error}"
            elif telemetry.file not in read:
                yield record.trial.id, "telemetry", f"{telemetry.file} is missing or damaged"
        if (off := _clocks_differ(report)) is not None:
            yield record.trial.id, "clock", f"rank {report.rank.rank}'s windows are {off:+.1%} by its device's clock"
    for node in found:
        host = node.telemetry.host
        lost = node.telemetry.missing.keys() & node.telemetry.visible
        used = {track.name for report in node.reports for track in rank_tracks(record, report, node)} if lost else ()
        for name, why in node.telemetry.missing.items():
            if name in lost and name in used:
                yield record.trial.id, "lost", f"{name} of {host}: {why}"
        kinds = _gpu_notices if record.trial.device == "gpu" else _cpu_notices
        for kind, text in kinds(record, node):
            yield record.trial.id, kind, text


def timelines(record: Record, found: list[Node]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what the ranks' devices did from the trial's start on, and its phases as its first rank saw them.

    Samples: trial, rank, device_name, quantity (`busy` in percent, or `power` in watts), seconds, value. Spans: trial,
    phase, start_s, end_s.
    """
    spans = phase_spans(record.reports[0])
    began_s = min((start_s for start_s, _ in spans.values()), default=0.0)
    parts = [
        pd.DataFrame(
            {
                "trial": record.trial.id,
                "rank": report.rank.rank,
                "device_name": track.name,
                "quantity": quantity,
                "seconds": track.time_s - began_s,
                "value": values,
            }
        )
        for node in found
        for report in node.reports
        for track in rank_tracks(record, report, node)
        for quantity, values in (("busy", 100 * track.busy), ("power", track.power_w))
        if np.isfinite(values).any()
    ]
    ends = [(record.trial.id, phase, start_s - began_s, end_s - began_s) for phase, (start_s, end_s) in spans.items()]
    return (
        pd.concat(parts)
        if parts
        else pd.DataFrame(columns=["trial", "rank", "device_name", "quantity", "seconds", "value"]),
        pd.DataFrame(ends, columns=["trial", "phase", "start_s", "end_s"]),
    )


def _clocks_differ(report: RankReport) -> float | None:
    """Return by how much the windows last longer on the device's clock than on the host's, if it shows."""
    by_device_s = sum(filter(None, [window.device_s for window in report.windows]))
    if not by_device_s:
        return None
    by_host_s = sum(window.end_s - window.start_s for window in report.windows)
    off = by_device_s / by_host_s - 1 if by_host_s else 0.0
    return off if abs(off) > _CLOCKS_DIFFER else None


def phase_spans(report: RankReport) -> dict[str, tuple[float, float]]:
    """Return when each phase of a rank began and ended; `measure` is all its timed windows."""
    spans = {
        phase: (start_s, start_s + report.phases.get(phase, 0.0)) for phase, start_s in report.phase_starts_s.items()
    }
    if report.windows:
        spans[_MEASURE] = (report.windows[0].start_s, report.windows[-1].end_s)
    if report.windows and "warm_up" in spans:
        # Its phase counts the windows alone, not what is between them.
        spans["warm_up"] = (spans["warm_up"][0], report.windows[0].start_s)
    return spans


def rank_tracks(record: Record, report: RankReport, node: Node) -> list[Track]:
    """Return the tracks of the devices that a rank drives."""
    if record.trial.device == "cpu":
        cpus = list(report.software.cpus) if report.software else []
        return [_cpu_track(node, cpus)] if cpus and "host" in node.samples else []
    visible = node.telemetry.visible
    names = [visible[device] for device in own_devices(record.trial, report.rank) if device < len(visible)]
    return [_gpu_track(name, node.samples[name]) for name in names if name in node.samples]


def _gpu_track(name: str, samples: pd.DataFrame) -> Track:
    time_s, busy, power_w = (_values(samples, column) for column in ("time_s", "busy", "power_w"))
    return Track(
        name=name,
        time_s=time_s,
        busy=busy,
        busy_s=_integral(time_s, busy),
        sm_active=_values(samples, "sm_active"),
        memory_bytes=_values(samples, "memory_used_bytes"),
        power_w=power_w,
        energy_j=_energy_j(time_s, _values(samples, "energy_j"), power_w),
        throttle_reasons=_values(samples, "throttle_reasons"),
    )


def _cpu_track(node: Node, cpus: list[int] | None) -> Track:
    """Return what the given CPUs did, None: all of the host's."""
    name = "host"
    if cpus is not None:
        name = f"CPU {', '.join(map(str, cpus))}" if len(cpus) <= 4 else f"{len(cpus)} CPUs from {cpus[0]}"
    time_s = _values(node.samples["host"], "time_s")
    busy_s = _of_cpus(node, "cpu_busy_s", cpus)
    unknown = np.full(len(time_s), np.nan)
    # Of CPUs the kernel counts no energy one by one, and no memory.
    return Track(
        name=name,
        time_s=time_s,
        # The kernel counts in ticks of 10 ms: a short time may seem to hold more than there is.
        busy=np.minimum(_rate(time_s, busy_s), 1),
        busy_s=busy_s - busy_s[0],
        sm_active=unknown,
        memory_bytes=unknown,
        power_w=unknown,
        energy_j=unknown,
        throttle_reasons=unknown,
    )


def _host_track(node: Node) -> Track | None:
    if "host" not in node.samples:
        return None
    samples = node.samples["host"]
    energy_j = _values(samples, "energy_j")
    track = _cpu_track(node, None)
    return Track(
        **(
            vars(track)
            | {
                "memory_bytes": _values(samples, "memory_used_bytes"),
                "energy_j": energy_j,
                "power_w": _rate(track.time_s, energy_j),
            }
        )
    )


def _use(trial: str, rank: float, node: Node, report: RankReport, track: Track) -> tuple[Any, ...]:
    phases = phase_spans(report)
    spans = [*phases.values(), *((window.start_s, window.end_s) for window in report.windows)]
    starts_s, ends_s = np.array(spans).reshape(-1, 2).T
    seconds = ends_s - starts_s
    first, behind = np.searchsorted(track.time_s, starts_s), np.searchsorted(track.time_s, ends_s)
    between_s = np.concatenate([[0.0], np.diff(track.time_s)])
    busy_s, energy_j, throttled_s, capped_s = (
        _gained(track, sums, starts_s, ends_s)
        for sums in (
            track.busy_s,
            track.energy_j,
            np.cumsum(between_s * _held(track, sum(THROTTLE_REASONS))),
            np.cumsum(between_s * _held(track, POWER_CAP)),
        )
    )
    busy_p95 = np.full(len(spans), np.nan)
    for phase in range(len(phases)):
        busy_p95[phase] = _quantile(track.busy[first[phase] : behind[phase]], 0.95)
    return (
        trial,
        rank,
        node.telemetry.host,
        track.name,
        np.array([*phases, *[_MEASURE] * len(report.windows)], dtype=object),
        np.concatenate([np.full(len(phases), np.nan), np.arange(len(report.windows))]),
        seconds,
        np.minimum(busy_s / np.maximum(seconds, 1e-9), 1),
        busy_p95,
        _span_means(track.time_s, track.sm_active, starts_s, ends_s),
        _largest(track.memory_bytes, first, behind),
        energy_j / np.maximum(seconds, 1e-9),
        energy_j,
        throttled_s,
        capped_s,
    )


def _gpu_notices(record: Record, node: Node) -> Iterator[tuple[str, str]]:
    own = {report.pid for report in node.reports}
    for report in node.reports:
        spans = phase_spans(report)
        # What is there before the ranks have met is not theirs: until then no framework has touched a device.
        taken_s = spans["rendezvous"][0] if "rendezvous" in spans else -np.inf
        measure = spans.get(_MEASURE, (np.inf, np.inf))
        for track in rank_tracks(record, report, node):
            place = f"rank {report.rank.rank}'s {track.name} of {node.telemetry.host}"
            inside = (track.time_s >= measure[0]) & (track.time_s <= measure[1])
            named = [text for bit, text in THROTTLE_REASONS.items() if np.nansum(_held(track, bit)[inside])]
            if named:
                share = np.nanmean(_held(track, sum(THROTTLE_REASONS))[inside])
                yield "throttled", f"{place} was throttled {share:.0%} of the measured time: {', '.join(named)}"
            before = _mean(track.busy[track.time_s < taken_s])
            samples = node.samples[track.name]
            foreign = _foreign(samples[samples.time_s < taken_s], own, expected=0)
            if before > _BUSY_BEFORE:
                yield "busy before", f"{place} was {before:.0%} busy before the trial began"
            elif foreign:
                yield "busy before", f"{place} was held by {_processes(foreign)} before the trial began"
            during = samples[(samples.time_s >= measure[0]) & (samples.time_s <= measure[1])]
            if others := _foreign(during, own, expected=1):
                yield "shared", f"{place} was shared with {_processes(others)} while it was measured"
            if (xids := samples.xid.dropna()).size:
                yield "error", f"{place} reported XID {', '.join(f'{xid:.0f}' for xid in xids.unique())}"


def _cpu_notices(record: Record, node: Node) -> Iterator[tuple[str, str]]:
    if "host" not in node.samples:
        return
    samples = node.samples["host"]
    time_s = _values(samples, "time_s")
    pinned = {cpu for report in node.reports if report.software for cpu in report.software.cpus}
    others = [cpu for cpu in _listed(node, "cpu_busy_s") if cpu not in pinned]
    start_s, end_s = phase_spans(node.reports[0]).get(_MEASURE, (np.nan, np.nan))
    for kind, column, cpus, limit, text in (
        ("stolen", "cpu_steal_s", sorted(pinned), _STOLEN, "the hypervisor took {:.0%} of the ranks' CPUs of {}"),
        ("shared", "cpu_busy_s", others, _OTHERS_BUSY, "other work kept {:.0%} of the other CPUs of {} busy"),
    ):
        if cpus:
            gained = np.diff(np.interp([start_s, end_s], time_s, _of_cpus(node, column, cpus)))[0]
            # The kernel counts in ticks, and may count one too many.
            if (share := min(gained / (end_s - start_s), 1.0)) > limit:
                yield kind, text.format(share, node.telemetry.host)


def _foreign(samples: pd.DataFrame, own: set[int | None], expected: int) -> set[int]:
    """Return the processes on a device that are none of our ranks.

    In a container the driver's process numbers may not be ours: then one of them is taken for `expected` ranks.
    """
    seen = {process["pid"] for listed in samples.processes.dropna() for process in listed}
    if seen & own:
        return seen - own
    return seen if len(seen) > expected else set()


def _processes(pids: set[int]) -> str:
    return f"process{'es' if len(pids) > 1 else ''} {', '.join(map(str, sorted(pids)))}"


def _values(samples: pd.DataFrame, column: str) -> Values:
    values: Values = samples[column].to_numpy(np.float64, na_value=np.nan)
    return values


def _listed(node: Node, column: str) -> list[int]:
    """Return the numbers of the CPUs that a node's samples list, in their order; none where they are not known."""
    if node.telemetry.cpus is not None:
        return list(node.telemetry.cpus)
    # From before the numbers were kept: all that the host has, from 0 on.
    return list(range(node.by_cpu[column][1].shape[1])) if column in node.by_cpu else []


def _of_cpus(node: Node, column: str, cpus: list[int] | None) -> Values:
    """Return the mean over CPUs, None: all of them, of seconds that each has counted; NaN where one is not known."""
    mean: Values = np.full(len(node.samples["host"]), np.nan)
    listed = _listed(node, column)
    if column in node.by_cpu and (cpus is None or (cpus and set(cpus) <= set(listed))):
        known, by_cpu = node.by_cpu[column]
        chosen = by_cpu if cpus is None else by_cpu[:, [listed.index(cpu) for cpu in cpus]]
        # One that went offline counts no more, from its first sample on: a sum that loses a part would fall.
        chosen = chosen[:, ~np.isnan(chosen).any(axis=0)]
        mean[known] = chosen.mean(axis=1) if chosen.size else np.nan
    return mean


def _rate(time_s: Values, sums: Values) -> Values:
    """Return the change a second up to each sample; none at the first."""
    return np.concatenate([[np.nan], np.diff(sums) / np.maximum(np.diff(time_s), 1e-9)])


def _integral(time_s: Values, values: Values) -> Values:
    """Return the integral from the first known value on, by trapezoids over the known ones."""
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(time_s), np.nan)
    sums = cumulative_trapezoid(values[known], time_s[known], initial=0)
    integral: Values = np.interp(time_s, time_s[known], sums, left=np.nan, right=np.nan)
    return integral


def _energy_j(time_s: Values, counter_j: Values, power_w: Values) -> Values:
    """Return the energy since the first sample: from the device's counter, else from its power.

    Where the counter falls it has wrapped or was reset, and where it is null there is none: that interval's energy is
    then the power's integral. How wide the counter is differs by driver.
    """
    gained, integrated = np.diff(counter_j), np.diff(_integral(time_s, power_w))
    return np.concatenate([[0.0], np.cumsum(np.where(gained >= 0, gained, integrated))])


def _held(track: Track, reasons: int) -> Values:
    """Return 1 where any of the reasons held the device's clock back, 0 where none did, NaN where it is not known."""
    known = np.isfinite(track.throttle_reasons)
    held: Values = np.where(known, np.where(known, track.throttle_reasons, 0).astype(np.int64) & reasons != 0, np.nan)
    return held


def _gained(track: Track, sums: Values, starts_s: Values, ends_s: Values) -> Values:
    """Return what sums gained in each span, interpolated between samples; NaN where a span is not covered."""
    ends, starts = (np.interp(at_s, track.time_s, sums, left=np.nan, right=np.nan) for at_s in (ends_s, starts_s))
    gained: Values = ends - starts
    return gained


def _quantile(values: Values, share: float) -> float:
    known = values[np.isfinite(values)]
    return float(quantiles(known, share)) if known.size else np.nan


def _span_means(time_s: Values, values: Values, starts_s: Values, ends_s: Values) -> Values:
    """Return the mean in each span of values that stand for the time since the one before; NaN where none is known."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known) < 2:
        return np.full(len(starts_s), np.nan)
    at_s = time_s[known]
    sums = np.concatenate([[0.0], np.cumsum(values[known][1:] * np.diff(at_s))])
    starts_s, ends_s = np.clip(starts_s, at_s[0], at_s[-1]), np.clip(ends_s, at_s[0], at_s[-1])
    covered_s = ends_s - starts_s
    gained = np.interp(ends_s, at_s, sums) - np.interp(starts_s, at_s, sums)
    means: Values = np.where(covered_s > 0, gained / np.maximum(covered_s, 1e-9), np.nan)
    return means


def _mean(values: Values) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else np.nan


def _largest(values: Values, first: NDArray[np.int64], behind: NDArray[np.int64]) -> Values:
    """Return the largest known value of each slice; NaN where there is none."""
    known = np.append(np.where(np.isfinite(values), values, np.nan), np.nan)
    found: Values = np.fmax.reduceat(known, np.stack([first, behind], axis=1).ravel())[::2]
    return np.where(first < behind, found, np.nan)
