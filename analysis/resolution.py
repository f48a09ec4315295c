"""How small a difference between neighbouring world sizes the repeats can see, and how many would see a given one."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import nct, t

from scalestudy.analysis.intervals import CONFIDENCE, FEWEST_REPEATS
from scalestudy.analysis.metrics import SERIES
from scalestudy.analysis.shares import off_by

# A difference in throughput per device that is worth knowing of, and how often it is to be seen where it is there.
WORTH_SEEING = 0.03
POWER = 0.8
# Of more repeats than this no number is told.
_MOST_REPEATS = 1000


def resolution(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a series with two world sizes or more: what its repeats can tell apart.

    below, above: its two largest sizes; repeats: those both have; smallest_difference: what so many see, NaN from one;
    repeats_needed: as many as see a difference of 3 %, NaN past 1,000 or where nothing is known of their spread.
    To see is to be below 5 % in a two-sided t test of the log ratios of throughput, paired by repeat, as the trials of
    a repeat ran close together, in 80 % of studies (power by the noncentral t: Cohen 1988, section 2). Their spread is
    pooled over all neighbouring sizes: that of two from a few repeats is too uncertain.
    Reads SERIES, world_size, repeat and throughput_images_per_s.
    """
    measured = trials[trials.throughput_images_per_s.notna()]
    logs = np.log(measured.throughput_images_per_s.astype(float))
    by_size = logs.groupby([measured[column] for column in [*SERIES, "world_size", "repeat"]]).median().unstack()
    steps = by_size.groupby(level=SERIES).diff()
    pairs = pd.DataFrame(
        {
            "above": by_size.index.get_level_values("world_size"),
            "repeats": steps.count(axis=1),
            "variance": steps.var(axis=1),
        }
    )
    pairs["below"] = pairs.groupby(level=SERIES).above.shift()
    rows = []
    for key, group in pairs[pairs.below.notna()].groupby(level=SERIES):
        freedom = (group.repeats - 1).clip(lower=0)
        spread = float(np.sqrt((group.variance.fillna(0) @ freedom) / freedom.sum())) if freedom.sum() else np.nan
        last = group.iloc[-1]
        rows.append(
            dict(zip(SERIES, key, strict=True))
            | {
                "below": int(last.below),
                "above": int(last.above),
                "repeats": int(last.repeats),
                "smallest_difference": smallest_difference(spread, int(last.repeats)),
                "repeats_needed": repeats_needed(spread, WORTH_SEEING),
            }
        )
    columns = [*SERIES, "below", "above", "repeats", "smallest_difference", "repeats_needed"]
    return pd.DataFrame(rows, columns=columns)


def told_apart(row: Mapping[str, Any]) -> str:
    """Return a row of `resolution` in words."""
    sizes = f"{row['below']} from {row['above']} devices at {WORTH_SEEING:.0%}"
    if row["repeats"] < 2:
        return f"{sizes}: not known, since no two repeats measured both"
    if row["repeats"] < FEWEST_REPEATS and row["repeats_needed"] <= FEWEST_REPEATS:
        return f"{sizes}: {FEWEST_REPEATS} repeats"
    seen = f"{off_by(row['smallest_difference'], 1)}"
    if np.isnan(row["repeats_needed"]):
        return f"{sizes}: over {_MOST_REPEATS:,} repeats; {row['repeats']} see {seen}"
    if row["repeats_needed"] <= row["repeats"]:
        return f"{sizes}: {row['repeats']} repeats are enough, they see {seen}"
    return f"{sizes}: {row['repeats_needed']:.0f} repeats; {row['repeats']} see {seen}"


def smallest_difference(spread: float, repeats: int) -> float:
    """Return the relative difference that so many pairs see, of log ratios with this standard deviation."""
    return float(np.expm1(_noncentrality(repeats) * spread / np.sqrt(repeats))) if repeats > 1 else np.nan


def repeats_needed(spread: float, difference: float) -> float:
    """Return how many pairs see a relative difference, six at least, NaN past `_MOST_REPEATS`."""
    if not smallest_difference(spread, _MOST_REPEATS) <= difference:
        return np.nan
    # The more repeats the less they see: the first that is small enough is found by halves.
    too_few, enough = FEWEST_REPEATS - 1, _MOST_REPEATS
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if smallest_difference(spread, middle) <= difference:
            enough = middle
        else:
            too_few = middle
    return float(enough)


@lru_cache(maxsize=_MOST_REPEATS)
def _noncentrality(repeats: int) -> float:
    """Return the true mean over its standard error at which a t test of so many pairs has the power wanted."""
    freedom = repeats - 1
    edge = float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    # The other side's tail is of no weight where the power is high.
    return float(brentq(lambda shift: nct.sf(edge, freedom, shift) - POWER, 0.0, 4 * edge + 4))
