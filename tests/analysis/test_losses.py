"""Losses by simulation: noise is not called a rise, a rise is, and what falls has been learned."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from scalestudy.analysis.losses import rise, unlearned
from scalestudy.trainers.trial import Data

Noise = Callable[[np.random.Generator, int], np.ndarray]
CURVES = 1000


def of(classes: int = 10) -> Data:
    return Data(source="images", folder="/x", channels=3, image_size=32, classes=classes)


def points(losses: np.ndarray, steps: int = 25) -> list[tuple[int, float]]:
    return [(1 + steps * i, float(loss)) for i, loss in enumerate(losses)]


def correlated(rng: np.random.Generator, count: int) -> np.ndarray:
    """Noise that remembers: parameters wander, and so does the loss."""
    shocks = rng.normal(0, 1, count)
    for i in range(1, count):
        shocks[i] += 0.3 * shocks[i - 1]
    return 4 + 2 * np.abs(shocks)


NOISES: dict[str, Noise] = {
    "a little": lambda rng, count: rng.normal(math.log(10), 0.05, count),
    "a lot": lambda rng, count: np.abs(rng.normal(2.3, 2, count)),
    # As resnet18's on noise in batches of 4: from 2 to 13.
    "wild": lambda rng, count: rng.lognormal(1.5, 0.6, count),
    "skewed": lambda rng, count: rng.exponential(3, count),
    "remembers": correlated,
    # Mean of eight ranks.
    "eight ranks": lambda rng, count: rng.exponential(3, (8, count)).mean(axis=0),
    # The first loss is that of knowing nothing, and a leap follows that settles.
    "a leap at first": lambda rng, count: (
        np.concatenate([[2.7], 5 + 60 * np.exp(-np.arange(count - 1) / 2)]) + rng.exponential(1, count)
    ),
}


@pytest.mark.parametrize("count", [5, 12, 30, 100])
@pytest.mark.parametrize("name", NOISES)
def test_flat_losses_are_called_a_rise_in_less_than_one_trial_of_a_hundred(name: str, count: int) -> None:
    rng = np.random.default_rng(count)
    alarms = sum(rise(points(NOISES[name](rng, count)), of()) is not None for _ in range(CURVES))
    assert alarms < 0.01 * CURVES


RISES: dict[str, Noise] = {
    "without bound": lambda rng, count: 2.3 * np.exp(np.linspace(0, 6, count)) * rng.lognormal(0, 0.2, count),
    "steadily": lambda rng, count: np.linspace(2.3, 9, count) + rng.normal(0, 0.3, count),
    "to a plateau": lambda rng, count: np.where(np.arange(count) < count // 3, 2.3, 12) + rng.normal(0, 0.3, count),
    # It had learned, and forgets all.
    "late": lambda rng, count: np.where(np.arange(count) < 0.7 * count, 0.4, 2.3) + rng.normal(0, 0.1, count),
}


@pytest.mark.parametrize(("count", "least"), [(12, 70), (20, 95), (100, 95)])
@pytest.mark.parametrize("name", RISES)
def test_a_rise_is_found(name: str, count: int, least: int) -> None:
    rng = np.random.default_rng(count)
    found = [rise(points(RISES[name](rng, count)), of()) for _ in range(100)]
    assert sum(change is not None for change in found) >= least
    assert all(change.after > change.before + 0.5 for change in found if change is not None)


def test_of_few_losses_a_leap_alone_is_a_rise() -> None:
    change = rise(points(np.array([2.3, 2.5, 90.0, 4000.0, 1e6]), 50), of())
    assert change is not None
    assert change == pytest.approx((51, 2.4, 4000.0))
    assert rise(points(np.array([2.3, 2.4, 3.0, 4.0, 5.0]), 50), of()) is None
    # As resnet18 leaps at a large learning rate, and settles.
    assert rise(points(np.array([2.9, 34.3, 28.0, 4.3, 3.5, 2.7]), 50), of()) is None


def test_a_loss_that_creeps_up_by_less_than_knowing_nothing_costs_is_no_rise() -> None:
    """As a model grows sure of itself on noise: shown by its order, and no divergence."""
    assert rise(points(np.linspace(0.69, 0.74, 100)), of(2)) is None
    assert rise(points(np.linspace(2.3, 2.9, 100)), of(10)) is None


def test_what_has_been_learned_by_heart_may_falter() -> None:
    rng = np.random.default_rng(0)
    losses = np.concatenate([[2.3, 1.0, 0.3], 1e-4 * rng.lognormal(0, 1, 30), 0.05 * rng.lognormal(0, 1, 30)])
    assert rise(points(losses), of()) is None


def test_thousands_of_losses_are_judged_as_quickly() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(2.3, 0.3, 5000)
    assert rise(points(losses), of()) is None
    losses[4000:] += 3
    change = rise(points(losses, 1), of())
    assert change is not None
    assert change.step == pytest.approx(4000, abs=30)


def test_a_loss_that_does_not_fall_beyond_its_noise_is_unlearned() -> None:
    rng = np.random.default_rng(0)
    flat = [unlearned(points(np.r_[0.6931, rng.normal(0.6931, 0.02, 30)]), of(2)) for _ in range(300)]
    assert sum(found is not None for found in flat) > 270
    falls = [unlearned(points(2.3 - np.linspace(0, 0.5, 31) + rng.normal(0, 0.1, 31)), of()) for _ in range(300)]
    assert sum(found is not None for found in falls) < 15
    assert unlearned(points(np.array([2.0, 1.0, 2.5, 2.25]), 50), of()) == (2.0, 2.375)


@pytest.mark.parametrize("source", ["synthetic", "synthetic-host"])
def test_noise_is_not_judged(source: str) -> None:
    data = Data.model_validate({"source": source, "channels": 3, "image_size": 32, "classes": 10})
    assert rise(points(np.linspace(2, 90, 30)), data) is None
    assert unlearned(points(np.linspace(2, 90, 30)), data) is None


@pytest.mark.parametrize(
    "values",
    [
        [*[0.3] * 192, *[100.0] * 8],
        [*[2.3] * 10, *np.geomspace(2.3, 1e12, 20)],
        [2.3, 2.2, 400.0, 500.0, 600.0],
    ],
)
def test_a_leap_at_the_end_is_a_rise_however_few_the_steps(values: list[float]) -> None:
    assert rise(points(np.array(values), 1), of()) is not None
    # One that comes back is none.
    assert rise(points(np.array([*values, 2.0, 2.0]), 1), of()) is None or len(values) > 20


def test_few_steps_say_nothing() -> None:
    assert rise(points(np.linspace(2, 90, 30), 1), of()) is None
    assert unlearned(points(np.linspace(2, 90, 30), 1), of()) is None
    assert unlearned([], of()) is None
    assert rise([], of()) is None
