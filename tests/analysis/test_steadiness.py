"""What is said of one trial's windows: planted changes and outliers are found, noise is not, intervals hold."""

import numpy as np
import pytest
from numpy.typing import NDArray

from scalestudy.analysis.steadiness import SIGNIFICANCE, Movements, apart, mean_interval, movements, steadiness

Values = NDArray[np.float64]
NONE: Values = np.empty(0)


def autoregressive(count: int, correlation: float, rows: int = 2000) -> Values:
    """Return rows of values around 100, each as like the one before as `correlation` says."""
    noise = np.random.default_rng(0).normal(size=(rows, count))
    values = np.empty_like(noise)
    values[:, 0] = noise[:, 0]
    for place in range(1, count):
        values[:, place] = correlation * values[:, place - 1] + np.sqrt(1 - correlation**2) * noise[:, place]
    return 100 + values


def noise(count: int, spread: float, rows: int = 1000) -> Values:
    found: Values = np.random.default_rng(1).normal(size=(rows, count)) * spread
    return found


def named(moved: Movements) -> NDArray[np.bool_]:
    """Return which rows of a study of one trial would be told to have moved."""
    found: NDArray[np.bool_] = moved.p <= SIGNIFICANCE
    return found


@pytest.mark.parametrize(("count", "place", "factor"), [(10, 5, 1.1), (20, 14, 0.9), (40, 6, 1.08), (120, 60, 1.1)])
def test_a_planted_change_is_found_where_it_is(count: int, place: int, factor: float) -> None:
    values = np.exp(noise(count, 0.01, rows=1))
    values[:, place:] *= factor
    moved = movements(values)
    assert named(moved).all()
    # More than 50 windows are looked at three by three.
    assert moved.at[0] == pytest.approx(place, abs=0 if count <= 50 else 3)
    assert moved.changed_by[0] == pytest.approx(factor - 1, abs=0.015)
    assert np.isnan(moved.drifted_by).all()


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("count", [10, 20, 40])
def test_noise_is_called_a_movement_no_more_often_than_stated(count: int, correlation: float) -> None:
    """At a spread of 10 % ends and halves of a trial differ by 5 % often enough, by chance."""
    draws = np.exp(0.1 * (autoregressive(count, correlation, 4000) - 100))
    # Two standard deviations of 4,000 draws above 5 %; what does not depend on what was before errs less.
    assert named(movements(draws)).mean() < (0.057 if correlation else 0.01)


def test_windows_of_long_tails_or_two_levels_move_no_more_often() -> None:
    rng = np.random.default_rng(2)
    tails = np.exp(0.05 * rng.standard_t(3, size=(2000, 20)))
    levels = np.where(rng.random((2000, 20)) < 0.3, 1.2, 1.0) * np.exp(noise(20, 0.02, 2000))
    assert named(movements(tails)).mean() < 0.02
    assert named(movements(levels)).mean() < 0.02


def test_a_drift_is_found_and_not_called_a_change() -> None:
    draws = np.exp(noise(20, 0.02) + np.linspace(0, np.log(1.08), 20))
    moved = movements(draws)
    drifted = named(moved) & (moved.drifted_by > 0)
    assert drifted.mean() > 0.8
    assert (named(moved) & ~np.isnan(moved.changed_by)).mean() < 0.05
    assert np.median(moved.drifted_by[drifted]) == pytest.approx(0.085, abs=0.01)


def warming(tau_s: float, spread: float, rows: int = 1000, windows: int = 20) -> tuple[Values, Values]:
    """Return timed windows of 0.5 s and, a column, the end of a warm-up of 1.25 s, of a step that starts 30 % slow."""
    when_s = np.concatenate([[1.0], 1.25 + 0.5 * np.arange(windows)])
    draws = np.exp(noise(windows + 1, spread, rows)) * (1 + 0.3 * np.exp(-when_s / tau_s))
    return draws[:, 1:], draws[:, :1]


@pytest.mark.parametrize("tau_s", [5, 30, 100])
def test_a_warm_up_that_is_not_over_is_found(tau_s: float) -> None:
    moved = movements(*warming(tau_s, 0.005))
    assert (named(moved) & (moved.drifted_by < 0)).mean() > 0.85


@pytest.mark.parametrize(("tau_s", "spread"), [(0.1, 0.005), (0.1, 0.02), (1e9, 0.005), (1e9, 0.02)])
def test_a_warm_up_that_is_over_is_not_accused(tau_s: float, spread: float) -> None:
    assert named(movements(*warming(tau_s, spread))).mean() < 0.02


def test_what_is_no_noise_at_all_moves_only_where_it_does() -> None:
    alike, step = np.ones((1, 12)), np.repeat([[1.0, 1.5]], 6, axis=1)
    assert movements(alike).p == [1.0]
    assert movements(step).at == [6]
    assert movements(step).p < 1e-6


def test_of_many_trials_a_page_names_few_falsely() -> None:
    """Where nothing moved at all a page names one in 5 % of cases, however many trials it has."""
    draws = np.exp(0.1 * (autoregressive(10, 0.6, 4000) - 100))
    pages = [steadiness(list(page), [NONE] * 100) for page in draws.reshape(40, 100, 10)]
    assert np.mean([page[["changed_at", "drifted_by"]].notna().any(axis=None) for page in pages]) < 0.15
    # One by one 4 % of the trials are.
    assert named(movements(draws)).mean() > 0.03


def test_a_trial_that_moved_is_named_among_many() -> None:
    draws = np.exp(noise(20, 0.01, 100))
    draws[7, 10:] *= 1.2
    said = steadiness([*draws, np.ones(3)], [NONE] * 101)
    assert said.changed_at.dropna().to_dict() == {7: 10}


def test_one_window_far_off_is_no_change_and_is_flagged() -> None:
    values = np.random.default_rng(3).normal(1, 0.01, 12)
    values[7] = 3.0
    assert movements(values[None, :]).p == [1.0]
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
    [said] = steadiness([np.array([1.0, 2.0, 3.0])], [NONE]).to_dict("records")
    assert said.pop("apart") == 0
    assert np.isnan(list(said.values())).all()
