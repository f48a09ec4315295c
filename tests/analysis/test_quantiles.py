import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scalestudy.analysis.quantiles import median, quantiles


@pytest.mark.parametrize("count", [1, 2, 3, 4, 11])
def test_medians_and_quantiles_are_those_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).lognormal(size=(3, count))
    shares = (0.0, 0.05, 0.25, 0.5, 0.95, 1.0)
    assert_array_equal(median(values), np.median(values, axis=-1))
    assert_allclose(quantiles(values, shares), np.quantile(values, shares, axis=-1).T, rtol=1e-15)


def test_a_quantile_lies_between_the_values_beside_its_place() -> None:
    assert quantiles(np.array([3.0, 1.0, 2.0]), 0.75) == 2.5
