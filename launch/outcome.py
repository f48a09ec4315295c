"""How a trial ended, judged from what its ranks left."""

import math
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from scalestudy.launch.launcher import Exit
from scalestudy.trainers.record import Outcome, RankError, RankReport
from scalestudy.trainers.trial import Trial

# The kernel's killer of processes uses SIGKILL, and so may others.
KILLED = "was killed by signal 9 (out of memory on the host?)"
_QUOTED_LINES = 5
# The first steps of training may be flat, and one batch's loss is noise: fewer steps say nothing of whether it falls.
_JUDGED_STEPS = 100


class Ending(NamedTuple):
    """An outcome, the reason unless it is ok, and whether the trial is to be run again."""

    outcome: Outcome
    reason: str | None = None
    retry: bool = False


def ending(trial: Trial, ended: Exit, reports: Sequence[RankReport], folder: Path) -> Ending:
    """Judge a trial: by what its ranks reported and, where that is not all or an error, by how their processes ended.

    A rank reports without an error once all is measured: what becomes of its process then is no matter, if it crashes
    or hangs in closing, is ended because another did, or is beyond the deadline. But on a node that failed nothing is
    to be believed.
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
        return (None if trial.sweep else _diverged(trial, reports)) or Ending("ok")
    if ended.timed_out:
        return Ending("timeout", f"not done within deadline_s = {trial.measurement.deadline_s:g}; {_last(folder, 0)}")
    if ended.first_failed is not None:
        return Ending("failed", _failure(ended.first_failed, ended, errors, folder))
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
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
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
    # Ranks step together: the mean over them is the global batch's loss.
    curve = [
        (points[0].step, fmean(loss or 0.0 for _, loss in points))
        for points in zip(*(report.losses for report in reports), strict=False)
    ]
    if trial.data.real and curve and curve[-1][0] >= _JUDGED_STEPS:
        first, late = curve[0][1], median(loss for step, loss in curve if step > curve[-1][0] / 2)
        if not late < first:
            return Ending("diverged", f"the loss did not fall on real data: {first:.4g} at first, {late:.4g} later")
    return None
