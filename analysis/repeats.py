"""Whether a study's repeats are alike: a drift from the first to the last, and points that lie in two groups."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scalestudy.analysis.metrics import POINT, need
from scalestudy.analysis.steadiness import beyond, drawn_in, tail

Values = NDArray[np.float64]

# On a page without either, one of the two is claimed on 5 % of pages: each on half of them.
_SIGNIFICANCE = 0.025
# Less matters to nobody.
_LEAST_DRIFT, _LEAST_APART = 0.01, 0.02
# A group has a third of the repeats or more: fewer lie apart, or in a tail. Of fewer repeats no groups are told.
_LEAST_SHARE, _FEWEST_REPEATS = 1 / 3, 6
_SIMULATED = 20_000
_MOST_ORDERED, _DRAWN = 7, 2000
_MOST_NAMED = 4


def notices(trials: pd.DataFrame) -> Iterator[str]:
    """Yield in words how repeats are not alike; needs with_throughput."""
    yield from _drift(trials)
    yield from _groups(trials)


def trend(rows_by_count: list[Values]) -> tuple[float, float]:
    """Return the drift from a point's first to its last repeat as a share, and p that chance makes a larger one.

    Rows are points, their logarithms of throughput in the order of their start; an array for each number of repeats.
    Mann's S summed over points, which are compared with themselves alone (the seasonal Kendall test: Hirsch, Slack &
    Smith 1982), against its distribution where the repeats come in another order, the same for all points: what slows
    a whole repeat is no trend. The drift is the median of the slopes between any two repeats of a point (Sen 1968)
    times the repeats between first and last.
    """
    count = max((rows.shape[1] for rows in rows_by_count), default=0)
    rises = np.zeros((count, count))
    slopes: list[Values] = []
    for rows in rows_by_count:
        own = rows.shape[1]
        rises[:own, :own] += np.sign(rows[:, None, :] - rows[:, :, None]).sum(axis=0)
        early, late = np.triu_indices(own, 1)
        slopes.append(((rows[:, late] - rows[:, early]) / (late - early) * (own - 1)).ravel())
    if not rises.any():
        return 0.0, 1.0
    early, late = np.triu_indices(count, 1)
    orders = _orders(count)
    sums = np.abs(rises[orders[:, early], orders[:, late]].sum(axis=1))
    return float(np.expm1(np.median(np.concatenate(slopes)))), float((sums >= sums[0]).mean())


@lru_cache(maxsize=64)
def _orders(count: int) -> NDArray[np.int64]:
    """Return orders of so many repeats, the given one first: all of them, or of too many some thousand."""
    if count <= _MOST_ORDERED:
        return np.array(list(permutations(range(count))))
    rng = np.random.default_rng(0)
    drawn = rng.permuted(np.tile(np.arange(count), (_DRAWN, 1)), axis=1)
    drawn[0] = np.arange(count)
    return drawn


def two_groups(rows: Values) -> tuple[NDArray[np.int64], Values, Values]:
    """Return of every sorted row how many lie in the lower of two groups, how far these lie apart, and p.

    The split that leaves the least within the groups; its F against that of as many normal values, split alike. Groups
    have a gap between them that is wider than either: a skew has none, and p is 1.
    """
    below, apart, statistic = _split(rows)
    p = beyond(statistic, *_of_normal_values(rows.shape[1]))
    lower, upper = (np.take_along_axis(rows, (below + place)[:, None], axis=1)[:, 0] for place in (-1, 0))
    wider = np.maximum(lower - rows[:, 0], rows[:, -1] - upper)
    return below, apart, np.where(upper - lower > wider, p, 1.0)


def _drift(trials: pd.DataFrame) -> Iterator[str]:
    by, p = trend(list(_by_count(trials, "started_at", 2)[0]))
    if p <= _SIGNIFICANCE and abs(by) >= _LEAST_DRIFT:
        yield (
            f"Throughput {'rose' if by > 0 else 'fell'} by {abs(by):.0%} from the first to the last repeat, over all "
            "points: what it was measured on changed, and the intervals are wider than those of a steady machine."
        )


def _groups(trials: pd.DataFrame) -> Iterator[str]:
    found: list[tuple[float, str]] = []
    points = 0
    for rows, keys in zip(*_by_count(trials, "throughput_images_per_s", _FEWEST_REPEATS), strict=True):
        points += len(rows)
        below, apart, p = two_groups(rows)
        for index in np.flatnonzero((p <= _SIGNIFICANCE) & (apart >= np.log1p(_LEAST_APART))):
            key = keys.iloc[index]
            size = int(key.world_size)
            found.append(
                (
                    p[index],
                    f"{key.workload}: the {rows.shape[1]} repeats of {key.series} on {size} device"
                    f"{'s' if size > 1 else ''} lie in two groups, {below[index]} of them slower, "
                    f"{np.expm1(apart[index]):.0%} apart: something differed between them, and the median may be of "
                    "neither.",
                )
            )
    # Bonferroni: all points were looked at.
    shown = [sentence for p, sentence in sorted(found) if p * points <= _SIGNIFICANCE]
    yield from shown[:_MOST_NAMED]
    if len(shown) > _MOST_NAMED:
        yield f"So do those of {len(shown) - _MOST_NAMED} more points."


def _by_count(trials: pd.DataFrame, order: str, least: int) -> tuple[list[Values], list[pd.DataFrame]]:
    """Return logarithms of throughput, points × repeats in the order of a column, and the points, by their repeats."""
    need(trials, [*POINT, "throughput_images_per_s", "started_at", "repeat"])
    measured = trials.loc[
        trials.throughput_images_per_s.notna(), [*POINT, "throughput_images_per_s", "started_at", "repeat"]
    ].sort_values([*POINT, order, "repeat"], kind="stable")
    repeats = measured.groupby(POINT).repeat.transform("size")
    rows, keys = [], []
    for count, some in measured.groupby(repeats):
        if int(str(count)) >= least:
            rows.append(np.log(some.throughput_images_per_s.to_numpy(np.float64)).reshape(-1, int(str(count))))
            keys.append(some[POINT].drop_duplicates())
    return rows, keys


def _split(rows: Values) -> tuple[NDArray[np.int64], Values, Values]:
    count = rows.shape[1]
    centred = drawn_in(rows)
    least = int(count * _LEAST_SHARE)
    places = np.arange(least, count - least + 1)
    sums = np.cumsum(centred, axis=1)[:, places - 1]
    between = sums**2 * count / (places * (count - places))
    best = between.argmax(axis=1)
    explained, place = np.take_along_axis(between, best[:, None], axis=1)[:, 0], places[best]
    within = np.maximum((centred**2).sum(axis=1) - explained, 1e-24)
    apart = np.sqrt(explained * count / (place * (count - place)))
    return place, apart, explained / within * (count - 2)


@lru_cache(maxsize=64)
def _of_normal_values(count: int) -> tuple[float, float]:
    return tail(_split(np.sort(np.random.default_rng(0).normal(size=(_SIMULATED, count)), axis=1))[2])
