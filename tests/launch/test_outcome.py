import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalestudy.launch.launcher import Exit
from scalestudy.launch.outcome import ending
from scalestudy.trainers.record import LossPoint, RankError, RankReport, Record
from scalestudy.trainers.trial import Data, Trial

FINE = Exit(codes=(0, 0), timed_out=False, first_failed=None)


@pytest.fixture
def trial(make_trial: Callable[..., Trial]) -> Trial:
    return make_trial(world_size=2)


@pytest.fixture
def reports(make_record: Callable[..., Record], trial: Trial) -> tuple[RankReport, ...]:
    return make_record(trial).reports


def changed(reports: tuple[RankReport, ...], rank: int, **changes: Any) -> tuple[RankReport, ...]:
    return tuple(report.model_copy(update=changes) if i == rank else report for i, report in enumerate(reports))


def test_a_trial_whose_ranks_agree_is_ok(trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path) -> None:
    assert ending(trial, FINE, reports, tmp_path) == ("ok", None, False)


def test_unequal_parameters_are_divergence(trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path) -> None:
    outcome, reason, _ = ending(trial, FINE, changed(reports, 1, parameter_checksums=("xyz",)), tmp_path)
    assert (outcome, reason) == ("diverged", "the ranks' parameters differ at the end: rank 0: abc, rank 1: xyz")


def test_unequal_replicas_inside_one_process_are_divergence(
    trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path
) -> None:
    one = changed(reports, 0, parameter_checksums=("abc", "xyz"))[:1]
    assert ending(trial, Exit((0,), False, None), one, tmp_path).outcome == "diverged"


def test_a_loss_that_is_no_number_is_divergence(trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path) -> None:
    losses = (LossPoint(1, 2.0), LossPoint(7, None))
    outcome, reason, _ = ending(trial, FINE, changed(reports, 1, losses=losses), tmp_path)
    assert (outcome, reason) == ("diverged", "rank 1: the loss is not finite in step 7")


def losses_of(reports: tuple[RankReport, ...], *by_rank: np.ndarray, steps: int = 20) -> tuple[RankReport, ...]:
    """Return the reports with each rank's losses, in the first step and then every so many."""
    told = [tuple(LossPoint(1 + steps * i, float(loss)) for i, loss in enumerate(losses)) for losses in by_rank]
    return tuple(report.model_copy(update={"losses": losses}) for report, losses in zip(reports, told, strict=True))


@pytest.fixture
def real(make_trial: Callable[..., Trial]) -> Trial:
    return make_trial(world_size=2, data=Data(source="digits", channels=1, image_size=32, classes=10))


def test_a_loss_that_rises_beyond_its_noise_is_divergence(
    trial: Trial, real: Trial, reports: tuple[RankReport, ...], tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 20))
    risen = losses_of(reports, *(np.repeat([2.3, 8.0], 10) + noise))
    outcome, reason, _ = ending(real, FINE, risen, tmp_path)
    assert outcome == "diverged"
    assert reason is not None
    assert re.fullmatch(r"the loss rose beyond its noise: 2\.\d+ up to step 181, [78]\.\d+ after it", reason)
    # Noise on the device has nothing to learn.
    assert ending(trial, FINE, risen, tmp_path).outcome == "ok"
    # The mean over the ranks counts, and too few steps say nothing.
    apart = np.repeat([2.3, 8.0], 10)
    assert ending(real, FINE, losses_of(reports, apart + noise[0], apart[::-1] + noise[1]), tmp_path).outcome == "ok"
    early = losses_of(reports, *(np.repeat([2.3, 8.0], 10) + noise), steps=5)
    assert ending(real, FINE, early, tmp_path).outcome == "ok"


def test_a_loss_that_does_not_fall_is_no_divergence(
    real: Trial, reports: tuple[RankReport, ...], tmp_path: Path
) -> None:
    """Pictures of noise, as benchmarks of storage make them: 0.6931 at first, 0.694 later."""
    flat = 0.694 + np.random.default_rng(0).normal(0, 0.01, (2, 20))
    flat[:, 0] = 0.6931
    assert ending(real, FINE, losses_of(reports, *flat), tmp_path) == ("ok", None, False)


def test_a_failed_ranks_own_words_are_the_reason(trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path) -> None:
    failed = changed(reports, 1, error=RankError(kind="failed", message="ValueError: no"))
    assert ending(trial, Exit((-9, 1), False, 1), failed, tmp_path) == ("failed", "rank 1: ValueError: no", False)


def test_out_of_memory_on_any_rank_is_its_own_outcome(
    trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path
) -> None:
    failed = changed(reports, 1, error=RankError(kind="oom", message="OutOfMemoryError: 2 GiB"))
    assert ending(trial, Exit((1, 1), False, 0), failed, tmp_path) == ("oom", "rank 1: OutOfMemoryError: 2 GiB", False)


def test_a_rank_that_left_no_report_is_quoted(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "rank-1.log").write_text("first\nSegmentation fault\n")
    outcome, reason, _ = ending(trial, Exit((-9, -11), False, 1), [], tmp_path)
    assert outcome == "failed"
    assert reason == "rank 1 was killed by signal 11; rank-1.log ends: first | Segmentation fault"


def test_a_deadline_is_a_timeout_that_says_how_long_and_where_every_rank_stood(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "rank-1.log").write_text("scalestudy: phase start\nscalestudy: phase import\n")
    outcome, reason, _ = ending(trial, Exit((-9, -9), True, None), [], tmp_path)
    assert outcome == "timeout"
    assert reason == "not done within deadline_s = 120: rank 1 is in import; rank 0 never began"


def test_a_missing_report_is_a_failure(trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path) -> None:
    assert ending(trial, FINE, reports[:1], tmp_path) == ("failed", "expected 2 rank reports, got 1", False)


@pytest.mark.parametrize(
    "ended",
    [
        Exit((-6, 0), False, 0),
        Exit((0, 1), False, 1),
        Exit((-9, -11), False, 1),
        Exit((0, -9), True, None),
        Exit((-9, -9), True, None),
    ],
    ids=["crashed", "failed", "killed with the other", "hung", "all hung"],
)
def test_a_trial_with_every_report_is_measured_however_its_processes_end(
    trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path, ended: Exit
) -> None:
    assert ending(trial, ended, reports, tmp_path) == ("ok", None, False)
    # What was measured is still looked at.
    assert ending(trial, ended, changed(reports, 1, parameter_checksums=("xyz",)), tmp_path).outcome == "diverged"
    # And one report is not every report.
    assert ending(trial, ended, reports[:1], tmp_path).outcome in ("failed", "timeout")
    failed = changed(reports, 1, error=RankError(kind="failed", message="ValueError: no"))
    assert ending(trial, ended, failed, tmp_path).outcome in ("failed", "timeout")


def test_on_a_node_that_was_lost_nothing_is_measured(
    trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path
) -> None:
    lost = Exit((), False, None, lost_nodes=("node2",))
    assert ending(trial, lost, reports, tmp_path) == ("failed", "node node2 failed under the trial", True)


def test_an_error_that_no_exit_code_tells_of_is_the_reason_all_the_same(
    trial: Trial, reports: tuple[RankReport, ...], tmp_path: Path
) -> None:
    failed = changed(reports, 1, error=RankError(kind="failed", message="ValueError: no"))
    assert ending(trial, FINE, failed, tmp_path) == ("failed", "rank 1: ValueError: no", False)
