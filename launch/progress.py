"""Tell a user how a study goes: a live bar on a terminal, plain lines elsewhere."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from scalestudy.trainers.record import Record
from scalestudy.trainers.trainer import series_name
from scalestudy.trainers.trial import Trial

# Before a trial has been measured here: what starting the ranks and building the model took on two cores.
_START_S = 8.0


def described(trial: Trial, last_repeat: int | None = None) -> str:
    """Return a trial in a few words, or all of its point's from its own repeat to the last."""
    nodes = f" on {trial.nodes} nodes" if trial.nodes > 1 else ""
    precision = f" · {trial.precision}" if trial.precision != "fp32" else ""
    which = f"repeat {trial.repeat + 1}"
    if last_repeat is not None and last_repeat > trial.repeat:
        which = f"repeats {trial.repeat + 1}–{last_repeat + 1}"
    return f"{trial.model} · {series_name(trial)}{precision} · world size {trial.world_size}{nodes} · {which}"


class Estimate:
    """How long trials will take: as long as their like took, or their time budget where none has run."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self._durations_s: dict[tuple[str, str, int], list[float]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Learn from a trial that is done."""
        self._durations_s.setdefault(_like(record.trial), []).append(record.environment.duration_s)

    def seconds(self, trial: Trial) -> float:
        """Return the expected seconds of one trial."""
        seen = self._durations_s.get(_like(trial))
        plan = trial.measurement
        # A warm-up is at least eight quarter windows.
        return median(seen) if seen else _START_S + plan.window_s * (2 + plan.windows)


class PlainLines:
    """One line a trial."""

    def __init__(self, console: Console, trials: Sequence[Trial], estimate: Estimate) -> None:
        self._console = console
        self._waiting = list(trials)
        self._count = len(trials)
        self._estimate = estimate

    def started(self, trial: Trial, folder: Path) -> None:
        """Say nothing: a line comes when it is done."""

    def tick(self) -> None:
        """Say nothing."""

    def finished(self, record: Record) -> None:
        """Print how the trial ended and the time left."""
        self._estimate.add(record)
        if not record.retry:
            self._waiting.remove(record.trial)
        done = self._count - len(self._waiting)
        self._console.print(
            f"\\[{done}/{self._count}] {escape(described(record.trial))}: {_ended(record)}; {self.left()}",
            soft_wrap=True,
            highlight=False,
        )

    def left(self) -> str:
        """Return the time left in words."""
        return f"about {duration(sum(map(self._estimate.seconds, self._waiting)))} left"


class LiveBar(PlainLines):
    """The same lines above a bar that shows the trial under way and its live throughput."""

    def __init__(self, console: Console, trials: Sequence[Trial], estimate: Estimate) -> None:
        super().__init__(console, trials, estimate)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[live]}"),
            console=console,
            # What the screen costs is taken from the ranks.
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("starting", total=len(trials), live="")
        self._folder: Path | None = None

    def __enter__(self) -> "LiveBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def started(self, trial: Trial, folder: Path) -> None:
        """Show the trial."""
        self._folder = folder
        self._started_s = time.monotonic()
        self._bar.update(self._task, description=described(trial), live=f"starting · {self.left()}")

    def tick(self) -> None:
        """Show the throughput that rank 0 wrote last."""
        with suppress(OSError, IndexError, KeyError, TypeError, ValueError):
            assert self._folder is not None
            line = json.loads((self._folder / "progress.jsonl").read_bytes().splitlines()[-1])
            self._bar.update(self._task, live=f"{line['phase']} · {line['images_per_s']:,.0f} images/s · {self.left()}")

    def finished(self, record: Record) -> None:
        """Print the line and move the bar."""
        super().finished(record)
        self._bar.update(self._task, completed=self._count - len(self._waiting))


class TriedLines:
    """One line a try of `batch: auto`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def started(self, trial: Trial, folder: Path) -> None:
        """Say nothing: a line comes when it is done."""

    def tick(self) -> None:
        """Say nothing."""

    def finished(self, record: Record) -> None:
        """Print what was tried and whether it fits."""
        if record.out_of_memory:
            ended = "does not fit" if record.outcome == "oom" else "fits, but not with the parts of a step"
        else:
            ended = "[green]fits[/]" if record.outcome == "ok" else _ended(record)
        self._console.print(
            f"tried {escape(described(record.trial))} · {record.trial.per_device_batch} images a device: {ended}",
            soft_wrap=True,
            highlight=False,
        )


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _like(trial: Trial) -> tuple[str, str, int]:
    return series_name(trial), trial.model, trial.world_size


def _ended(record: Record) -> str:
    if record.outcome != "ok":
        return f"[bold red]{record.outcome}[/]: {escape(record.reason or '')}"
    if record.trial.sweep:
        return f"[green]ok[/], {len(record.reports[0].collectives)} sizes, every sum right"
    missing = "".join(f"; without its phase {phase!r}: {escape(why)}" for phase, why in record.missing.items())
    return f"[green]ok[/], {record.throughput_images_per_s:,.0f} images/s{missing}"
