"""How a trial ended, judged from what its ranks left."""

import math
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scalestudy.analysis.losses import curve, rise
from scalestudy.launch.launcher import Exit
from scalestudy.trainers.record import Outcome, RankError, RankReport, flaw
from scalestudy.trainers.standing import standings
from scalestudy.trainers.trial import Trial

# The kernel's killer of processes uses SIGKILL, and so may others.
KILLED = "was killed by signal 9 (out of memory on the host?)"
_QUOTED_LINES = 5


class Ending(NamedTuple):
    """An outcome, the reason unless it is ok, and whether the trial is to be run again."""

    outcome: Outcome
    reason: str | None = None
    retry: bool = False


def ending(
    trial: Trial, ended: Exit, reports: Sequence[RankReport], folder: Path, damaged: Sequence[str] = ()
) -> Ending:
    """Judge a trial: by what its ranks reported and, where that is not all or an error, by how their processes ended.

    A rank reports without an error once all is measured: what becomes of its process then is no matter, if it crashes
    or hangs in closing, is ended because another did, or is beyond the deadline. But on a node that failed nothing is
    to be believed. `damaged` says which reports cannot be read.
    """
    if ended.lost_nodes:
        several = len(ended.lost_nodes) > 1
        lost = ", ".join(ended.lost_nodes)
        return Ending("failed", f"node{'s' if several else ''} {lost} failed under the trial", retry=True)
    errors = {report.rank.rank: report.error for report in reports if report.error}
    for rank, error in errors.items():
        if error.kind == "oom":
            return Ending("oom", f"rank {rank}: {error.message}")
    if not errors and len(reports) == len(ended.codes):
        if reason := flaw(trial, reports):
            return Ending("failed", reason)
        return (None if trial.sweep else _diverged(trial, reports)) or Ending("ok")
    if ended.timed_out:
        where = standings(folder, len(ended.codes))
        return Ending("timeout", f"not done within deadline_s = {trial.measurement.deadline_s:g}: {where}")
    if ended.first_failed is not None:
        return Ending("failed", _failure(ended.first_failed, ended, errors, folder))
    if damaged:
        return Ending("failed", "; ".join(damaged))
    if errors:
        return Ending("failed", _failure(min(errors), ended, errors, folder))
    return Ending("failed", f"expected {len(ended.codes)} rank reports, got {len(reports)}")


def _failure(rank: int, ended: Exit, errors: Mapping[int, RankError], folder: Path) -> str:
    if rank in errors:
        return f"rank {rank}: {errors[rank].message}"
    code = ended.codes[rank]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    how = KILLED if code == -signal.SIGKILL else how
    return f"rank {rank} {how}; {_last(folder, rank)}"


def _last(folder: Path, rank: int) -> str:
    """Quote the end of a rank's log."""
    log = folder / f"rank-{rank}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    quoted = " | ".join(line.strip() for line in lines[-_QUOTED_LINES:] if line.strip())
    return f"{log.name} ends: {quoted}" if quoted else f"{log.name} is empty"


def _diverged(trial: Trial, reports: Sequence[RankReport]) -> Ending | None:
    checksums = {digest for report in reports for digest in report.parameter_checksums}
    if len(checksums) != 1:
        found = ", ".join(f"rank {report.rank.rank}: {'/'.join(report.parameter_checksums)}" for report in reports)
        return Ending("diverged", f"the ranks' parameters differ at the end: {found}")
    for report in reports:
        for step, loss in report.losses:
            if loss is None or not math.isfinite(loss):
                return Ending("diverged", f"rank {report.rank.rank}: the loss is not finite in step {step}")
    # Of data that cannot be learned the loss does not fall; the report says so, and the measurement stands.
    if (change := rise(curve(reports), trial.data)) is not None:
        step, before, after = change
        return Ending(
            "diverged", f"the loss rose beyond its noise: {before:.4g} up to step {step}, {after:.4g} after it"
        )
    return None
