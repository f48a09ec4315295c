"""Differences: what was planted is found, chance is not called one, and few repeats show nothing."""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import ttest_ind

from scalestudy.analysis.differences import (
    LEAST_DIFFERENCE,
    Difference,
    day_difference,
    detectable,
    difference,
    holm,
    judged,
    paired_log_ratio,
)

Noise = Callable[[np.random.Generator, int], NDArray[np.float64]]
# Logs of throughputs with a spread of about 1.5 %: as of clocks, of rare jams, of two states, of long stalls.
NOISE: dict[str, Noise] = {
    "lognormal": lambda rng, repeats: rng.normal(0, 0.015, repeats),
    "t": lambda rng, repeats: 0.015 / np.sqrt(3) * rng.standard_t(3, repeats),
    "bimodal": lambda rng, repeats: np.where(rng.random(repeats) < 0.3, -0.03, 0.0) + rng.normal(0, 0.003, repeats),
    "pareto": lambda rng, repeats: -np.log1p(0.01 * rng.pareto(2.5, repeats)),
}


def series(values: object, repeats: list[int] | None = None) -> pd.Series:
    return pd.Series(values, index=repeats, dtype=float)


def test_the_ratio_is_the_geometric_mean_of_paired_ratios_with_students_interval() -> None:
    below = series([100.0, 200, 50, 100, 100, 100])
    logs = np.array([0.04, 0.05, 0.06, 0.04, 0.05, 0.06])
    found = difference(below * np.exp(logs), below)
    # Mean 0.05, standard deviation sqrt(4e-4 / 5), t of five degrees 2.5706.
    half = 2.5706 * np.sqrt(4e-4 / 5) / np.sqrt(6)
    assert found[:3] == pytest.approx((np.exp(0.05), np.exp(0.05 - half), np.exp(0.05 + half)), rel=1e-6)
    assert found.pairs == 6
    assert found.p_value < 0.001


def test_a_repeat_that_was_slow_for_all_costs_nothing() -> None:
    slow = np.array([1, 1, 0.5, 1, 1, 0.8])
    below = series(100 * slow)
    above = series([103, 102, 103, 104, 103, 103] * slow)
    assert difference(above, below).p_value < 0.001
    assert difference(above, below, paired=False).p_value > 0.5


@pytest.mark.parametrize("repeats", [2, 3, 4, 5])
def test_fewer_than_six_repeats_of_either_can_never_show_a_difference(repeats: int) -> None:
    few, many = (series(np.linspace(200, 201, count)) for count in (repeats, 12))
    for above, below in ((few, few / 2), (few, many / 2), (many, few / 2)):
        assert np.isnan(difference(above, below).p_value)
    assert np.isnan(day_difference(few, [many, many * 1.01]).p_value)


def test_of_one_repeat_or_two_there_is_no_interval() -> None:
    found = difference(series([200.0]), series([100.0]))
    assert found.ratio == pytest.approx(2)
    assert np.isnan([found.low, found.high, found.p_value]).all()
    found = difference(series([200.0, 202]), series([100.0, 100]))
    assert np.isnan([found.low, found.high]).all()


def test_repeats_that_do_not_pair_are_compared_as_two_samples() -> None:
    above, below = series([103, 104, 105, 103, 104, 105]), series([100, 101, 102, 100, 101, 102], list(range(6, 12)))
    found = difference(above, below)
    assert found.pairs == 0
    assert found.ratio == pytest.approx(np.exp(np.log(above).mean() - np.log(below).mean()))
    assert found.low > 1
    assert found.p_value < 0.001


def test_a_repeat_measured_twice_pairs_with_nothing() -> None:
    assert len(paired_log_ratio(series([1, 2, 3], [0, 0, 1]), series([1, 2, 3], [0, 0, 1]))) == 0


def test_holm_multiplies_by_the_claims_that_are_left() -> None:
    adjusted = holm(np.array([0.01, 0.04, np.nan, 0.03, 0.9]))
    assert adjusted == pytest.approx([0.04, 0.09, np.nan, 0.09, 0.9], nan_ok=True)


def test_what_is_shown_is_sure_over_the_whole_page_and_large_enough() -> None:
    one = pd.DataFrame({"ratio": [1.05, 1.009, 0.95], "p_value": [0.01, 1e-9, 0.04]})
    other = pd.DataFrame({"ratio": [0.9], "p_value": [0.02]})
    assert [table.shown.tolist() for table in judged(one)] == [[True, False, True]]
    assert [table.shown.tolist() for table in judged(one, other)] == [[True, False, True], [True]]
    assert [table.shown.tolist() for table in judged(one, other, other)] == [[True, False, False], [False], [False]]
    assert [table.shown.tolist() for table in judged(one, least=0.005)] == [[True, True, True]]


def test_of_many_claims_only_larger_losses_can_be_found() -> None:
    """Two samples of six; Holm's hardest step leaves each of 50 claims 0.1 %."""
    rng = np.random.default_rng(0)
    above, below = ([series(rng.normal(0, 0.02, 6)) for _ in range(2000)] for _ in range(2))
    spread = 0.02 * np.sqrt(2 / 6)
    for claims in (1, 50):
        lost = -np.log1p(-detectable(Difference(1, 1, 1, 1, 0, spread, 10), claims))
        p_values = ttest_ind(np.array(above) - lost, np.array(below), axis=1).pvalue
        assert np.mean(p_values <= 0.05 / claims) == pytest.approx(0.8, abs=0.04)


def page(rng: np.random.Generator, noise: Noise, repeats: int, slow: float = 0.0) -> Iterator[Difference]:
    """Yield all pairs of five identical trainers at two sizes; `slow` spreads what slows a repeat for all of them."""
    for _ in range(2):
        block = rng.normal(0, slow, repeats)
        trainers = [series(np.exp(block + noise(rng, repeats))) for _ in range(5)]
        yield from (difference(*pair) for pair in combinations(trainers, 2))


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("slow", [0.0, 0.03])
def test_identical_trainers_are_rarely_called_different(noise: str, slow: float) -> None:
    rng = np.random.default_rng(0)
    pages = 100
    claimed = sum(judged(pd.DataFrame(page(rng, NOISE[noise], 6, slow)))[0].shown.any() for _ in range(pages))
    # Of 100 pages with 5 % false ones, more than 13 have claims in one of a thousand tries.
    assert claimed <= 13


@pytest.mark.parametrize("spread", [0.015, 0.02])
def test_six_repeats_find_what_is_five_percent_slower(spread: float) -> None:
    rng = np.random.default_rng(0)
    found = [
        difference(series(0.95 * np.exp(rng.normal(0, spread, 6))), series(np.exp(rng.normal(0, spread, 6))))
        for _ in range(400)
    ]
    assert np.mean([each.p_value <= 0.05 and each.ratio < 1 - LEAST_DIFFERENCE for each in found]) >= 0.9
