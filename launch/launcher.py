"""What starts the ranks of a trial, and how that ended."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from scalestudy.cluster.host import Topology
from scalestudy.launch.errors import InputError
from scalestudy.launch.study import Container
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial

# What runs a trainer's ranks: a Python, or a container that has one.
Program = str | Container


class Exit(NamedTuple):
    """How the ranks of a trial ended; `codes` are exit codes by rank, negative for a signal."""

    codes: tuple[int, ...]
    timed_out: bool
    first_failed: int | None
    lost_nodes: tuple[str, ...] = ()


class NoCapacityError(OSError):
    """A trial found no place within the time it may wait for one: what it needs, and what is there."""


class Launcher(Protocol):
    """Starts every rank of a trial and leaves none behind.

    Nodes of an `elastic` one come and go: a trial that is too large for now is skipped, not refused.
    """

    name: str
    elastic: bool

    def capacity(self) -> Topology:
        """Return the nodes and devices on offer now."""

    def scheduler(self) -> dict[str, str]:
        """Return what the scheduler says of the job that all this runs in."""

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        """Start every rank, wait, calling `tick` now and then, and kill the whole group on the deadline.

        Raises OSError where they cannot be started, NoCapacityError where there is no place for them.
        """

    def resume(self, *, advanced: bool) -> str | None:
        """Have a run that stops before its end started again by whoever started it, if it finished a trial at least.

        Returns in words how it goes on, or None where only the user can start it again.
        """


def processes(trial: Trial) -> int:
    """Return how many processes a trial has: one a device, or one a node."""
    return trial.world_size if TRAINERS[trial.trainer].process_per_device else trial.nodes


def unfit(trial: Trial) -> str | None:
    """Return why a trial cannot be run anywhere, or None."""
    if trial.nodes > 1 and not TRAINERS[trial.trainer].process_per_device:
        return (
            f"{trial.trainer} drives the devices of one node; {trial.world_size} devices, "
            f"{trial.devices_per_node} a node, need {trial.nodes} nodes"
        )
    return None


def nodes_needed(trial: Trial) -> int:
    """Return how many nodes a trial must be given; one that is only to be skipped holds no more than one."""
    return 1 if unfit(trial) else trial.nodes


def check_capacity(trials: Iterable[Trial], path: Path, launcher: str, topology: Topology) -> None:
    """Raise InputError where a trial needs more nodes than there are."""
    for trial in trials:
        if nodes_needed(trial) > topology.nodes:
            more = ""
            if trial.device == "cpu" and trial.devices_per_node == topology.cores_per_node != topology.cpus_per_node:
                more = f", or devices_per_node: {topology.cpus_per_node} to put a rank on every hardware thread"
            raise InputError(
                f"{path}: world_sizes: {trial.world_size} is above the capacity of launcher {launcher!r}: "
                f"{topology.nodes} node{'s' if topology.nodes > 1 else ''} with {trial.devices_per_node} "
                f"{trial.device} devices{topology.why_no_more(trial.device)}; "
                f"use at most {topology.nodes * trial.devices_per_node}{more}"
            )


def worker_command(program: Program, trial: Trial, folder: Path) -> list[str]:
    """Return the worker's command line; what it is to Pyxis stands first, as options of srun."""
    if isinstance(program, str):
        return [program, "-m", "scalestudy.trainers.worker", str(folder)]
    command = worker_command(program.python, trial, folder)
    mounts = [str(folder), *([trial.data.folder] if trial.data.folder else []), *program.mounts]
    if program.runtime == "pyxis":
        pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
        return [f"--container-image={program.image}", f"--container-mounts={','.join(pairs)}", *command]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *(["--nv"] if trial.device == "gpu" else []), *binds, program.image, *command]


def worker_variables(inherited: Mapping[str, str], trial: Trial, process_count: int) -> dict[str, str]:
    """Return what governs a rank under every launcher: its threads, and how its log is written."""
    threads = str(trial.threads_per_device * (trial.world_size // process_count))
    return {
        # As NVML numbers them, whose samples are told by rank.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Frameworks' chatter; an INFO line a step would be part of what is measured.
        "TF_CPP_MIN_LOG_LEVEL": inherited.get("TF_CPP_MIN_LOG_LEVEL", "1"),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
        # Logs are read as UTF-8, and no line that cannot be written costs a rank.
        "PYTHONIOENCODING": inherited.get("PYTHONIOENCODING", "utf-8:backslashreplace"),
        # The ranks' stdin ends when the controller does, however it does, and they end with it.
        "SCALESTUDY_LIFELINE": "stdin",
    }
