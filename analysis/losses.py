"""Whether a trial's loss fell, and whether it rose: told from noise, which one batch's loss is full of."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalestudy.trainers.record import RankReport
from scalestudy.trainers.trial import Data

Values = NDArray[np.float64]

# The first steps of training may be flat, or leap up and settle: fewer steps say nothing of where the loss goes.
JUDGED_STEPS = 100
# Of a rise by chance, where there is none.
_SIGNIFICANCE, _PERMUTATIONS = 0.005, 9999
# From so many losses on order alone can show a rise. Of fewer the least after must be so many times the largest before.
_FEWEST_BY_ORDER, _FEWEST, _LEAP = 10, 4, 3.0
# So many losses at the end, all of them so many times what was there before, are a leap whatever the order says.
_LAST, _FAR = 3, 10.0
# Of data that cannot be learned the loss creeps up as a model grows sure of itself: a rise is one by more than this
# share of the loss of knowing nothing, which is the logarithm of the classes.
_RISE = 0.25
# And by more of the losses' own standard deviations before it.
_DEVIATIONS = 2.0
# More losses than this are thinned out, to medians of neighbours.
_MOST = 200


class Change(NamedTuple):
    """Up to which step the loss was what, and what it was after it."""

    step: int
    before: float
    after: float


def curve(reports: Sequence[RankReport]) -> list[tuple[int, float]]:
    """Return steps and losses of the global batch: ranks step together, and their mean is its loss."""
    return [
        (points[0].step, math.fsum(math.nan if loss is None else loss for _, loss in points) / len(points))
        for points in zip(*(report.losses for report in reports), strict=False)
    ]


def rise(losses: Sequence[tuple[int, float]], data: Data) -> Change | None:
    """Return where a loss rose beyond its noise and stayed there, None where it did not or too little is known."""
    if not data.real or len(losses) < _FEWEST:
        return None
    guess = math.log(max(data.classes, 2))
    risen = _rise(losses, guess) if losses[-1][0] >= JUDGED_STEPS else None
    return risen or _leap(losses, guess)


def _rise(losses: Sequence[tuple[int, float]], guess: float) -> Change | None:
    """Return where a loss rose and stayed, told from noise.

    Whether: the rank-sum of what comes before each place and after it, its largest over all places against its
    distribution over permutations, so that noise of whatever distribution is called a rise in 0.5 % of trials at most.
    """
    steps, values = _thinned(losses)
    if len(values) < _FEWEST_BY_ORDER:
        place = len(values) // 2
        risen = values[place:].min() > _LEAP * max(values[:place].max(), guess)
    else:
        scores = _scores(_ranks(values))
        place = _places(len(values))[int(scores.argmax())]
        risen = bool(scores.max() > _by_chance(len(values))) or _apart(values[:place], values[place:])
    before, after = values[:place], values[place:]
    least = np.median(before) + max(_RISE * guess, _DEVIATIONS * _deviation(before))
    stayed = after[-max(3, len(after) // 2) :]
    if not risen or np.median(after) <= least or np.median(stayed) <= least:
        return None
    return Change(int(steps[place - 1]), float(np.median(before)), float(np.median(after)))


def unlearned(losses: Sequence[tuple[int, float]], data: Data) -> tuple[float, float] | None:
    """Return the first loss and the median of the late ones where it did not fall beyond noise, None where it did.

    None, too, of data that are noise anyhow, and where there were too few steps to tell.
    """
    if not data.real or not losses or losses[-1][0] < JUDGED_STEPS:
        return None
    first, late = losses[0][1], np.array([loss for step, loss in losses if step > losses[-1][0] / 2])
    # The median's standard error, of normal noise.
    doubt = 1.2533 * _deviation(late) / math.sqrt(len(late))
    return None if np.median(late) < first - _DEVIATIONS * doubt else (first, float(np.median(late)))


def _leap(losses: Sequence[tuple[int, float]], guess: float) -> Change | None:
    """Return a leap at the end, however few the steps, where there is one.

    The last losses are all many times what was there before, and many times that of knowing nothing.
    """
    values = np.array([loss for _, loss in losses])
    place = len(values) - min(_LAST, len(values) // 2)
    before, after = values[:place], values[place:]
    if after.min() <= _FAR * max(before[0], float(np.median(before)), guess):
        return None
    return Change(losses[place - 1][0], float(np.median(before)), float(np.median(after)))


def _thinned(losses: Sequence[tuple[int, float]]) -> tuple[NDArray[np.int64], Values]:
    steps, values = np.array([step for step, _ in losses]), np.array([loss for _, loss in losses])
    if len(values) <= _MOST:
        return steps, values
    parts = np.array_split(np.arange(len(values)), _MOST)
    return steps[[part[-1] for part in parts]], np.array([np.median(values[part]) for part in parts])


def _places(count: int) -> range:
    """Return where a rise may begin: a tenth of the losses, and three, lie before it and after it."""
    edge = max(3, count // 10)
    return range(edge, count - edge + 1)


def _ranks(values: Values) -> Values:
    """Return the ranks from 1 on, equal values by their mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[group], dtype=np.float64)


def _scores(ranks: Values) -> Values:
    """Return for each place by how many standard deviations the ranks after it exceed their expectation."""
    count = ranks.shape[-1]
    places = np.array(_places(count))
    sums = ranks.sum(axis=-1, keepdims=True) - np.cumsum(ranks, axis=-1)[..., places - 1]
    expected = (count - places) * (count + 1) / 2
    found: Values = (sums - expected) / np.sqrt(places * (count - places) * (count + 1) / 12)
    return found


@lru_cache(maxsize=64)
def _by_chance(count: int) -> float:
    """Return what the largest score of so many losses in any order exceeds in _SIGNIFICANCE of all orders."""
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(1.0, count + 1), (_PERMUTATIONS, 1)), axis=1)
    return float(np.quantile(_scores(orders).max(axis=1), 1 - _SIGNIFICANCE, method="higher"))


def _apart(before: Values, after: Values) -> bool:
    """Return whether all losses after lie above all before, by more than those spread: order sees no such gap."""
    return bool(after.min() - before.max() > np.ptp(before))


def _deviation(values: Values) -> float:
    """Return the standard deviation by the median deviation, which single values that lie apart do not move."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
