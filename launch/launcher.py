"""What starts the ranks of a trial, and how that ended."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from scalestudy.cluster.host import Topology
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial


class Exit(NamedTuple):
    """How the ranks of a trial ended; `codes` are exit codes by rank, negative for a signal."""

    codes: tuple[int, ...]
    timed_out: bool
    first_failed: int | None


class Launcher(Protocol):
    """Starts every rank of a trial and leaves none behind."""

    name: str

    def capacity(self) -> Topology:
        """Return the nodes and devices on offer."""

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        """Start every rank, wait, calling `tick` now and then, and kill the whole group on the deadline."""


def processes(trial: Trial) -> int:
    """Return how many processes a trial has: one a device, or one a node."""
    return trial.world_size if TRAINERS[trial.trainer].process_per_device else trial.nodes
