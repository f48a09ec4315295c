"""What one trial left: raw windows of every rank and how it ended; no statistic is stored.

Schema history: 1 = first.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from scalestudy.cluster.cpu_use import CpuUse
from scalestudy.cluster.frozen import Frozen, Given
from scalestudy.cluster.host import Host
from scalestudy.cluster.rank import Rank
from scalestudy.cluster.telemetry import Telemetry
from scalestudy.trainers.trial import Trial

Outcome = Literal["ok", "failed", "timeout", "oom", "diverged", "skipped"]
ErrorKind = Literal["failed", "oom"]


class Window(NamedTuple):
    """`steps` consecutive steps, the device idle at both ends; times in seconds since the Unix epoch.

    device_s is the same span by the device's own clock, null where it has none.
    """

    start_s: float
    end_s: float
    steps: int
    device_s: float | None = None


class Collective(NamedTuple):
    """All-reduces of a message of so many bytes; a window's steps are all-reduces."""

    size_bytes: int
    windows: tuple[Window, ...]


class LossPoint(NamedTuple):
    """The loss of the rank's own shard in its `step`-th step; null where it was no finite number."""

    step: int
    loss: float | None


class Memory(Frozen):
    """Peaks of one process in bytes: resident since it began, allocated and reserved since the allocator's last reset.

    Those two are null where no device has an allocator. Records without `warm_up_memory` were never reset.
    """

    peak_resident_bytes: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None


class Software(Frozen):
    """Versions, the framework's settings and the environment variables that govern a rank."""

    python: str
    versions: dict[str, str]
    settings: dict[str, str | int]
    cpus: tuple[int, ...]
    variables: dict[str, str]


class Placement(Frozen):
    """Where on its host a rank was pinned.

    `cores` has the core of each CPU, named by the core's lowest CPU: ranks of one host that name the same core share
    it. `gpu_numa_nodes` has the NUMA node of each GPU that the rank drives, null where it is not known. `claimed_by`
    says which other trial had claimed some of its CPUs or GPUs before.
    """

    cpus: tuple[int, ...]
    cores: tuple[int, ...]
    numa_nodes: tuple[int, ...]
    gpu_numa_nodes: tuple[int | None, ...] = ()
    claimed_by: str | None = None


class RankError(Frozen):
    """Why a rank failed, or one of its phases did, in one line."""

    kind: ErrorKind
    message: str
    # What the device's allocator held when memory ran out, as the framework prints it.
    allocator: str | None = None


# Of a phase that a rank had begun when it wrote its report for safety.
CUT_SHORT = RankError(kind="failed", message="its process ended before it was done; see its log")


class RankReport(Frozen):
    """What one process measured; it drives `replicas` devices.

    Phases are seconds, in order; phase_starts_s is when each began. A node's first rank has its host and telemetry.
    """

    rank: Rank
    pid: int | None = None
    replicas: int = 1
    phases: dict[str, float] = {}
    phase_starts_s: dict[str, float] = {}
    warm_up_windows: tuple[Window, ...] = ()
    warm_up_steady: bool = False
    windows: tuple[Window, ...] = ()
    # Parts of a step, timed in turns: the whole of it, that on a batch which lies on the device, and the same with
    # nothing exchanged. Synthetic data lie on the device: whole and resident are then one.
    whole_windows: tuple[Window, ...] = ()
    resident_windows: tuple[Window, ...] = ()
    local_windows: tuple[Window, ...] = ()
    # A batch without a step; in old records alone.
    input_windows: tuple[Window, ...] = ()
    # The exchange of as many bytes as a step reduces, and no step; without where there is nobody to exchange with.
    exchange_windows: tuple[Window, ...] = ()
    exchanged_bytes: int | None = None
    # Local steps timed one by one, all ranks beginning each together; in old records only the first.
    local_step_times_s: tuple[float, ...] = ()
    # Of a sweep, in the place of all other windows.
    collectives: tuple[Collective, ...] = ()
    losses: tuple[LossPoint, ...] = ()
    test_accuracy: float | None = None
    # Of an epoch; null where the data are synthetic and never end.
    training_images: int | None = None
    # Up to the end of the warm-up, when cuDNN has tried all its algorithms; and in the timed windows alone. What comes
    # after them, checks, parts of a step and test, is in neither.
    warm_up_memory: Memory | None = None
    # Of the folder of images, in words; null where nothing is, and on ranks but the first.
    left_out: str | None = None
    memory: Memory | None = None
    parameter_count: int | None = None
    parameter_checksums: tuple[str, ...] = ()
    host: Host | None = None
    telemetry: Telemetry | None = None
    software: Software | None = None
    # Null in records from before it was told.
    placement: Placement | None = None
    # From the pinning to the end of the warm-up, and in the timed windows; null in records from before it was told.
    cpu_before: CpuUse | None = None
    cpu_measured: CpuUse | None = None
    # By phase, why what comes after the timed windows and the checks was not done. The trial stands without it.
    missing: dict[str, RankError] = {}
    error: RankError | None = None


class Costs(Given):
    """What devices and energy cost; images of an epoch where the data do not say it."""

    price_per_device_hour: float | None = Field(default=None, gt=0)
    currency: str = Field(default="USD", pattern=r"^[^\x00-\x1f\x7f]{1,8}$")
    carbon_g_per_kwh: float | None = Field(default=None, gt=0)
    images_per_epoch: int | None = Field(default=None, gt=0, le=2**63 - 1)


class Environment(Frozen):
    """Where and with what the trial ran, as its controller saw it; ranks report their own software."""

    started_at: str
    duration_s: float
    launcher: str
    # What the launcher's scheduler says of the job: its number, partition, nodes.
    scheduler: dict[str, str] = {}
    host: Host
    scalestudy: str
    git_commit: str | None
    study_name: str
    study: str
    costs: Costs = Costs()


class Record(Frozen):
    """The whole of one trial; it exists if and only if the trial is done."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    trial: Trial
    outcome: Outcome
    reason: str | None = None
    # The cluster's fault, not the trial's: it is run again once there are nodes enough.
    retry: bool = False
    reports: tuple[RankReport, ...] = ()
    environment: Environment

    @model_validator(mode="after")
    def _ok_is_whole(self) -> "Record":
        if self.outcome == "ok" and (reason := flaw(self.trial, self.reports)):
            raise ValueError(reason)
        return self

    @property
    def throughput_images_per_s(self) -> float:
        """Global batch × steps over the slowest rank's time, of a trial that ended ok."""
        slowest_s = max(sum(window.end_s - window.start_s for window in report.windows) for report in self.reports)
        return self.trial.global_batch * sum(window.steps for window in self.reports[0].windows) / slowest_s

    @property
    def missing(self) -> dict[str, str]:
        """By phase, which rank could not do what comes after the timed windows, and why."""
        found: dict[str, tuple[int, RankError]] = {}
        for report in self.reports:
            for phase, error in report.missing.items():
                # Ranks that waited for the one that failed were cut short.
                if phase not in found or found[phase][1] == CUT_SHORT:
                    found[phase] = report.rank.rank, error
        return {phase: f"rank {rank}: {error.message}" for phase, (rank, error) in found.items()}

    @property
    def out_of_memory(self) -> str | None:
        """Why the trial does not fit into memory, if it does not: all of it, or what comes after the timed windows."""
        if self.outcome == "oom":
            return self.reason
        return next(
            (
                f"rank {report.rank.rank}, in the phase {phase!r}: {error.message}"
                for report in self.reports
                for phase, error in report.missing.items()
                if error.kind == "oom"
            ),
            None,
        )


def flaw(trial: Trial, reports: Sequence[RankReport]) -> str | None:
    """Return why what the ranks reported is no measurement that can be counted, or None."""
    if not reports:
        return "no rank reported"
    numbers = [report.rank.rank for report in reports]
    if len(set(numbers)) < len(numbers):
        return f"the reports are of ranks {', '.join(map(str, numbers))}"
    devices = Counter((report.rank.node_rank, device) for report in reports for device in report.rank.devices)
    for (node, device), count in devices.items():
        if count > 1:
            # Ranks that did not see the same GPUs, as while one was lost.
            return f"{count} ranks of node {node} took its GPU {device}"
    for report in reports:
        for window in _windows(report):
            if not (window.steps > 0 and 0 <= window.end_s - window.start_s < math.inf):
                span = f"from {window.start_s} to {window.end_s}"
                return f"rank {report.rank.rank} reported a window of {window.steps} steps {span}"
    if trial.sweep:
        shapes = {tuple((one.size_bytes, len(one.windows)) for one in report.collectives) for report in reports}
        timed = len(shapes) == 1 and all(shape and all(min(one) > 0 for one in shape) for shape in shapes)
        return None if timed else "the ranks did not time the same sizes"
    if not all(any(window.end_s > window.start_s for window in report.windows) for report in reports):
        return "a rank timed no window"
    if len({tuple(window.steps for window in report.windows) for report in reports}) > 1:
        return "the ranks timed different windows"
    # Local steps may be missing of a rank, but those that are there are as many.
    if (
        len({len(report.losses) for report in reports}) > 1
        or len({len(report.local_step_times_s) for report in reports} - {0}) > 1
    ):
        return "the ranks kept different numbers of losses or steps"
    return None


def _windows(report: RankReport) -> Iterator[Window]:
    return chain(
        report.windows,
        report.whole_windows,
        report.resident_windows,
        report.local_windows,
        report.input_windows,
        report.exchange_windows,
        *(collective.windows for collective in report.collectives),
    )
