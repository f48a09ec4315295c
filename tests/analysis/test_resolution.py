"""How many repeats tell neighbouring world sizes apart, against published tables and simulated studies."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from scalestudy.analysis.metrics import POINT
from scalestudy.analysis.power import fewest_repeats
from scalestudy.analysis.resolution import resolution, smallest_difference, told_apart


def measured(logs: dict[int, list[float]]) -> pd.DataFrame:
    rows = [
        {**dict.fromkeys(POINT, "x"), "world_size": size, "repeat": repeat, "throughput_images_per_s": np.exp(value)}
        for size, values in logs.items()
        for repeat, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("effect", "pairs"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_repeats_needed_are_those_of_published_tables(effect: float, pairs: int) -> None:
    """Differences of so many standard deviations, paired, two-sided 5 %, power 80 % (Faul et al. 2007, G*Power)."""
    assert fewest_repeats(partial(smallest_difference, np.log1p(0.03) / effect), 0.03) == pairs


def test_what_so_many_repeats_see_they_see_in_four_studies_of_five() -> None:
    difference = np.log1p(smallest_difference(0.02, 6))
    studies = np.random.default_rng(0).normal(difference, 0.02, size=(4000, 6))
    assert np.mean(ttest_1samp(studies, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_the_two_largest_sizes_are_told_apart_by_the_spread_of_all_neighbours() -> None:
    """Log ratios 1 -> 2: -0.02, 0, 0.02; 2 -> 4: none at all: variances 0.0004 and 0 pool to 0.0002."""
    [row] = resolution(measured({1: [0, 0, 0], 2: [-0.02, 0, 0.02], 4: [-0.02, 0, 0.02]})).to_dict("records")
    assert (row["below"], row["above"], row["repeats"]) == (2, 4, 3)
    assert row["smallest_difference"] == pytest.approx(smallest_difference(0.0002**0.5, 3))
    assert row["repeats_needed"] == 6
    # Three show nothing, however little they spread.
    assert told_apart(row) == "2 from 4 devices at 3%: 6 repeats"


def test_what_all_trials_of_a_repeat_have_in_common_hides_no_difference() -> None:
    drift = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    [row] = resolution(measured({1: drift, 2: [value + 0.001 * (-1) ** i for i, value in enumerate(drift)]})).to_dict(
        "records"
    )
    assert told_apart(row) == "1 from 2 devices at 3%: 6 repeats are enough, they see 0.2%"


def test_one_repeat_tells_nothing_and_one_size_has_no_neighbour() -> None:
    [row] = resolution(measured({1: [0.0], 2: [0.5]})).to_dict("records")
    assert told_apart(row) == "1 from 2 devices at 3%: not known, since no two repeats measured both"
    assert resolution(measured({1: [0.0, 0.1]})).empty


def test_a_spread_that_hides_everything_asks_for_no_number() -> None:
    [row] = resolution(measured({1: [0.0, 1.0, -1.0], 2: [0.0, -1.0, 1.0]})).to_dict("records")
    assert told_apart(row) == "1 from 2 devices at 3%: over 1,000 repeats; 3 see over 100%"
