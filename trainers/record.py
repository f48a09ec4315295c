"""What one trial left: raw windows of every rank and how it ended; no statistic is stored.

Schema history: 1 = first.
"""

from typing import Literal, NamedTuple

from pydantic import Field

from scalestudy.cluster.frozen import Frozen
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
    """Memory of one process in bytes; allocated and reserved are the device allocator's, null without one."""

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


class RankError(Frozen):
    """Why a rank failed, in one line."""

    kind: ErrorKind
    message: str
    # What the device's allocator held when memory ran out, as the framework prints it.
    allocator: str | None = None


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
    # Parts of a step, timed in turns: the whole of it, that on a batch which lies on the device, the same with nothing
    # exchanged, and a batch without a step. Synthetic data lie on the device: whole and resident are then one.
    whole_windows: tuple[Window, ...] = ()
    resident_windows: tuple[Window, ...] = ()
    local_windows: tuple[Window, ...] = ()
    input_windows: tuple[Window, ...] = ()
    # The exchange of as many bytes as a step reduces, and no step; without where there is nobody to exchange with.
    exchange_windows: tuple[Window, ...] = ()
    exchanged_bytes: int | None = None
    # Local steps timed one by one.
    local_step_times_s: tuple[float, ...] = ()
    # Of a sweep, in the place of all other windows.
    collectives: tuple[Collective, ...] = ()
    losses: tuple[LossPoint, ...] = ()
    test_accuracy: float | None = None
    # Of an epoch; null where the data are synthetic and never end.
    training_images: int | None = None
    # Of the folder of images, in words; null where nothing is, and on ranks but the first.
    left_out: str | None = None
    memory: Memory | None = None
    parameter_count: int | None = None
    parameter_checksums: tuple[str, ...] = ()
    host: Host | None = None
    telemetry: Telemetry | None = None
    software: Software | None = None
    error: RankError | None = None


class Costs(Frozen):
    """What devices and energy cost; images of an epoch where the data do not say it."""

    price_per_device_hour: float | None = Field(default=None, gt=0)
    currency: str = Field(default="USD", pattern=r"^[^\x00-\x1f\x7f]{1,8}$")
    carbon_g_per_kwh: float | None = Field(default=None, gt=0)
    images_per_epoch: int | None = Field(default=None, gt=0)


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

    @property
    def throughput_images_per_s(self) -> float:
        """Global batch × steps over the slowest rank's time, of a trial that ended ok."""
        slowest_s = max(sum(window.end_s - window.start_s for window in report.windows) for report in self.reports)
        return self.trial.global_batch * sum(window.steps for window in self.reports[0].windows) / slowest_s
