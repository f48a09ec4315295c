"""The controller: run every trial that has no record yet, one after the other."""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from scalestudy.cluster.host import Host, this_host
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.launcher import Launcher, NoCapacityError, nodes_needed, processes, unfit
from scalestudy.launch.outcome import Ending, ending
from scalestudy.launch.study import Repeats
from scalestudy.trainers.record import Costs, Environment, RankReport, Record
from scalestudy.trainers.software import version_of
from scalestudy.trainers.trial import Trial

# So often a trial is tried that loses a node every time.
_ATTEMPTS = 3


class Observer(Protocol):
    """Who is told how the study goes."""

    def started(self, trial: Trial, folder: Path) -> None:
        """A trial's ranks are about to start."""

    def tick(self) -> None:
        """Half a second or so has passed while a trial runs."""

    def finished(self, record: Record) -> None:
        """A trial is done and its record written."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is the same for every trial of one run."""

    study_name: str
    study_text: str
    costs: Costs
    host: Host
    scalestudy: str
    git_commit: str | None

    @classmethod
    def of(cls, study_name: str, study_text: str, costs: Costs) -> "Origin":
        """Describe this run: the study file as it was written, this host, and the code's commit if it has one."""
        return cls(
            study_name=study_name,
            study_text=study_text,
            costs=costs,
            host=this_host(),
            scalestudy=version_of("scalestudy"),
            git_commit=git_commit(Path(__file__).resolve().parent),
        )


def pending(trials: Iterable[Trial], folder: StudyFolder, adaptive: Repeats | None = None) -> list[Trial]:
    """Return the trials to run, in their order: those that have no record, and those to be run again.

    Of adaptive repeats those that are known to be needed by now: when they are done, ask again.
    """
    waiting = [trial for trial in trials if (record := folder.record(trial)) is None or record.retry]
    if adaptive is None:
        return waiting
    if least := [trial for trial in waiting if trial.repeat < adaptive.min]:
        return least
    next_of: dict[str, Trial] = {}
    for trial in waiting:
        next_of.setdefault(trial.model_copy(update={"repeat": 0}).id, trial)
    return [trial for trial in next_of.values() if _still_wide(trial, folder, adaptive.until)]


def _still_wide(trial: Trial, folder: StudyFolder, until: float) -> bool:
    """Return whether the interval of a trial's point, over the repeats before it, is wider than ± `until`."""
    from scalestudy.analysis.intervals import median_intervals

    before = (folder.record(trial.model_copy(update={"repeat": repeat})) for repeat in range(trial.repeat))
    ok = [record for record in before if record is not None and record.outcome == "ok"]
    measured = np.array([record.throughput_images_per_s for record in ok])
    # A point that fails is not measured better by failing again.
    if len(measured) < 2:
        return False
    low, high = median_intervals([measured])
    return bool((high[0] - low[0]) / 2 > until * np.median(measured))


def run_trials(
    trials: Sequence[Trial], folder: StudyFolder, launcher: Launcher, origin: Origin, observer: Observer
) -> list[Trial]:
    """Run the given trials; a failed one costs its record, never the study.

    A trial that lost a node runs again after the others. Returns those for which there were too few nodes in the end:
    what is not on record of them is noted as skipped.
    """
    waiting = list(trials)
    attempts: Counter[str] = Counter()
    while waiting:
        nodes = launcher.capacity().nodes
        trial = next((trial for trial in waiting if nodes_needed(trial) <= nodes), None)
        if trial is None:
            break
        waiting.remove(trial)
        attempts[trial.id] += 1
        record = run_trial(trial, folder, launcher, origin, observer)
        observer.finished(record)
        if record.retry and record.outcome == "failed" and attempts[trial.id] < _ATTEMPTS:
            waiting.append(trial)
    for trial in waiting:
        if not attempts[trial.id]:
            why = f"needs {trial.nodes} nodes with {trial.devices_per_node} {trial.device} devices, {nodes} are there"
            observer.finished(run_trial(trial, folder, launcher, origin, observer, Ending("skipped", why, retry=True)))
    return waiting


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of several studies that are measured in turns: its trials, and how and where they run."""

    trials: Sequence[Trial]
    folder: StudyFolder
    launcher: Launcher
    origin: Origin


def run_in_turns(sides: Sequence[Side], observer: Observer) -> None:
    """Run what has no record of several studies repeat by repeat, the trials of all of them in one shuffled order.

    So what changes from minute to minute, or day to day, is in all of them alike.
    """
    for repeat in sorted({trial.repeat for side in sides for trial in side.trials}):
        block = [(side, trial) for side in sides for trial in side.trials if trial.repeat == repeat]
        random.Random(f"{block[0][1].seed} {repeat}").shuffle(block)
        for side, trial in block:
            run_trials(pending([trial], side.folder), side.folder, side.launcher, side.origin, observer)


def run_trial(
    trial: Trial,
    folder: StudyFolder,
    launcher: Launcher,
    origin: Origin,
    observer: Observer,
    known: Ending | None = None,
) -> Record:
    """Run one trial in a folder of its own, unless how it ends is known before, and write its record last."""
    path = folder.begin(trial)
    observer.started(trial, path)
    started_at, began_s = datetime.now(UTC), time.monotonic()
    reports: tuple[RankReport, ...] = ()
    if reason := unfit(trial):
        known = Ending("skipped", reason)
    try:
        if known is None:
            ended = launcher.run(trial, path, trial.measurement.deadline_s, observer.tick)
            reports, damaged = folder.reports(path, processes(trial))
            known = ending(trial, ended, reports, path, damaged)
    except NoCapacityError as error:
        known = Ending("skipped", str(error), retry=True)
    except OSError as error:
        known = Ending("failed", f"the ranks could not be started: {error}")
    record = Record(
        trial=trial,
        outcome=known.outcome,
        # It may name a file whose name is not UTF-8, as a record is.
        reason=known.reason and known.reason.encode(errors="backslashreplace").decode(),
        retry=known.retry,
        reports=reports,
        environment=Environment(
            started_at=started_at.isoformat(timespec="seconds"),
            duration_s=time.monotonic() - began_s,
            launcher=launcher.name,
            scheduler=launcher.scheduler(),
            host=origin.host,
            scalestudy=origin.scalestudy,
            git_commit=origin.git_commit,
            study_name=origin.study_name,
            study=origin.study_text,
            costs=origin.costs,
        ),
    )
    folder.finish(path, record)
    return record


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out there, '-dirty' behind it where files differ; None outside a checkout."""
    with suppress(OSError, subprocess.CalledProcessError):
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
        return answer.stdout.strip()
    return None
