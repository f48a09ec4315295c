"""What is said of repeats that are not alike: planted drifts and groups are found, noise is not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scalestudy.analysis.frames import frames
from scalestudy.analysis.repeats import trend, two_groups
from scalestudy.analysis.tables import tables
from scalestudy.trainers.record import Record
from scalestudy.trainers.trial import Trial

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]
Values = NDArray[np.float64]


def noise(points: int, repeats: int, spread: float, pages: int = 1000) -> Values:
    found: Values = np.random.default_rng(0).normal(size=(pages, points, repeats)) * spread
    return found


def said(make_trial: MakeTrial, make_record: MakeRecord, factors: dict[int, list[float]]) -> list[str]:
    """Return what is said of step times by world size, whose repeats were started a minute after each other."""
    records = []
    for size, repeats in factors.items():
        for repeat, factor in enumerate(repeats):
            record = make_record(make_trial(world_size=size, repeat=repeat), 0.1 * factor)
            started = {"started_at": f"2026-01-01T00:{repeat:02}:00+00:00"}
            records.append(record.model_copy(update={"environment": record.environment.model_copy(update=started)}))
    return tables(frames(records, Path("/nowhere"))).unlike


def test_a_drift_of_the_machine_is_named(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    slower = [1.0, 1.02, 1.06, 1.09, 1.12, 1.1628]
    [sentence] = said(make_trial, make_record, {1: slower, 2: [1.3 * factor for factor in slower]})
    # 1 / 1.1628 is 14 % less.
    assert sentence.startswith("Throughput fell by 14% from the first to the last repeat, over all points")


def test_repeats_in_two_groups_are_named(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    [sentence] = said(make_trial, make_record, {1: [1.0, 1.1, 1.102, 1.001, 1.099, 0.999], 2: [1.0] * 6})
    assert "the 6 repeats of torch-ddp on 1 device lie in two groups, 3 of them slower, 10% apart" in sentence


def test_repeats_that_are_alike_are_not_accused(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    assert said(make_trial, make_record, {1: [1.0, 1.02, 0.99, 1.01, 0.98, 1.005], 2: [1.0] * 6}) == []


@pytest.mark.parametrize(("points", "repeats"), [(1, 6), (8, 6), (8, 20)])
def test_noise_drifts_no_more_often_than_stated(points: int, repeats: int) -> None:
    assert np.mean([trend([page])[1] <= 0.025 for page in noise(points, repeats, 0.02, 300)]) < 0.06


def test_what_slows_a_whole_repeat_is_no_drift() -> None:
    """All points of a repeat ran in the same hour: eight of them tell of a drift no more than one does."""
    hours = noise(1, 6, 0.03)
    assert (
        np.mean([trend([page + hour])[1] <= 0.025 for page, hour in zip(noise(8, 6, 0.01), hours, strict=True)]) < 0.04
    )


def test_a_drift_of_14_percent_is_found_at_a_noise_of_2() -> None:
    line = np.log(0.86) * np.arange(6) / 5
    found = [trend([page + line]) for page in noise(2, 6, 0.02, 300)]
    assert np.mean([p <= 0.025 for _, p in found]) > 0.85
    assert np.median([by for by, _ in found]) == pytest.approx(-0.14, abs=0.005)


def test_points_are_compared_with_themselves_alone() -> None:
    """One point was measured fast and early, another slow and late: nothing drifted."""
    by, p = trend([np.array([[9.0, 9.0, 9.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])])
    assert (by, p) == (0, 1)
    assert trend([]) == (0, 1)


def test_noise_falls_into_groups_no_more_often_than_stated() -> None:
    # Some repeats far slower than the others.
    tails = -0.02 * np.random.default_rng(1).pareto(2.5, size=(8000, 6))
    for draws in (noise(1, 6, 0.02, 8000)[:, 0], noise(1, 10, 0.02, 8000)[:, 0], tails):
        _, apart, p = two_groups(np.sort(draws, axis=1))
        assert ((p <= 0.025) & (apart >= np.log(1.02))).mean() < 0.03


def test_groups_that_lie_far_apart_are_found() -> None:
    draws = noise(1, 6, 0.005)[:, 0] + np.where(np.arange(6) < 3, 0, 0.1)
    below, apart, p = two_groups(np.sort(draws, axis=1))
    # On a page of eight points.
    assert (p <= 0.025 / 8).mean() > 0.95
    assert np.median(below) == 3
    assert np.median(apart) == pytest.approx(0.1, abs=0.005)
