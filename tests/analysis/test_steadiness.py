"""What is said of one trial's windows: planted changes and outliers are found, noise is not, intervals hold."""

import numpy as np
import pytest
from numpy.typing import NDArray

from scalestudy.analysis.steadiness import SIGNIFICANCE, apart, change_point, mean_interval, steadiness

Values = NDArray[np.float64]


def autoregressive(count: int, correlation: float, rows: int = 2000) -> Values:
    """Return rows of values around 100, each as like the one before as `correlation` says."""
    noise = np.random.default_rng(0).normal(size=(rows, count))
    values = np.empty_like(noise)
    values[:, 0] = noise[:, 0]
    for place in range(1, count):
        values[:, place] = correlation * values[:, place - 1] + np.sqrt(1 - correlation**2) * noise[:, place]
    return 100 + values


@pytest.mark.parametrize(("count", "place", "factor"), [(10, 5, 1.1), (20, 14, 0.9), (40, 6, 1.08)])
def test_a_planted_change_is_found_where_it_is(count: int, place: int, factor: float) -> None:
    values = np.random.default_rng(1).normal(1, 0.01, count)
    values[place:] *= factor
    found = change_point(values)
    assert found is not None
    assert found[0] == place
    assert found[1] == pytest.approx(factor - 1, abs=0.015)


def test_noise_is_called_a_change_no_more_often_than_stated() -> None:
    """At a spread of 10 % half of a trial differs from the other by 5 % often enough, by chance."""
    draws = np.random.default_rng(2).normal(1, 0.1, (2000, 12))
    called = np.mean([change_point(values) is not None for values in draws])
    # Two standard deviations of 2,000 draws above.
    assert 0.005 < called < SIGNIFICANCE + 0.01


def test_one_window_far_off_is_no_change_and_is_flagged() -> None:
    values = np.random.default_rng(3).normal(1, 0.01, 12)
    values[7] = 3.0
    assert change_point(values) is None
    assert apart(values).tolist() == [False] * 7 + [True] + [False] * 4


def test_a_spread_below_five_percent_flags_nothing() -> None:
    values = np.ones(12)
    values[3] = 1.04
    assert not apart(values).any()


@pytest.mark.parametrize(("count", "correlation"), [(20, 0.0), (20, 0.3), (40, 0.0), (40, 0.3), (40, 0.6)])
def test_the_interval_of_a_mean_holds_it_as_often_as_it_says(count: int, correlation: float) -> None:
    draws = autoregressive(count, correlation)
    held = np.mean([abs(values.mean() - 100) <= mean_interval(values) for values in draws])
    assert 0.93 <= held <= 0.97


def test_windows_that_follow_each_other_widen_the_interval() -> None:
    plain, alike = (np.mean([mean_interval(values) for values in autoregressive(40, r, 200)]) for r in (0.0, 0.6))
    # By theory sqrt((1 + r) / (1 - r)) = 2.
    assert 1.6 < alike / plain < 3


def test_few_windows_have_no_interval_and_no_change() -> None:
    said = steadiness(np.array([1.0, 2.0, 3.0]))
    assert said == {"within": None, "changed_at": None, "changed_by": None, "apart": 0}
