"""How small a difference between neighbouring world sizes the repeats can see, and how many would see a given one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from scalestudy.analysis.intervals import FEWEST_REPEATS
from scalestudy.analysis.metrics import SERIES
from scalestudy.analysis.power import MOST_REPEATS, fewest_repeats, standard_errors
from scalestudy.analysis.shares import off_by

# A difference in throughput per device that is worth knowing of.
WORTH_SEEING = 0.03


def resolution(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a series with two world sizes or more: what its repeats can tell apart.

    below, above: its two largest sizes; repeats: those both have; smallest_difference: what so many see, NaN from one;
    repeats_needed: as many as see a difference of 3 %, NaN past 1,000 or where nothing is known of their spread.
    To see is to be below 5 % in a two-sided t test of the log ratios of throughput, paired by repeat, as the trials of
    a repeat ran close together, in 80 % of studies, see `power`. Their spread is pooled over all neighbouring
    sizes: that of two from a few repeats is too uncertain.
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
        needed = fewest_repeats(partial(smallest_difference, spread), WORTH_SEEING)
        last = group.iloc[-1]
        rows.append(
            dict(zip(SERIES, key, strict=True))
            | {
                "below": int(last.below),
                "above": int(last.above),
                "repeats": int(last.repeats),
                "smallest_difference": smallest_difference(spread, int(last.repeats)),
                "repeats_needed": np.nan if needed is None else needed,
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
        return f"{sizes}: over {MOST_REPEATS:,} repeats; {row['repeats']} see {seen}"
    if row["repeats_needed"] <= row["repeats"]:
        return f"{sizes}: {row['repeats']} repeats are enough, they see {seen}"
    return f"{sizes}: {row['repeats_needed']:.0f} repeats; {row['repeats']} see {seen}"


def smallest_difference(spread: float, repeats: int) -> float:
    """Return the relative difference that so many pairs see, of log ratios with this standard deviation."""
    return float(np.expm1(standard_errors(repeats - 1) * spread / np.sqrt(repeats))) if repeats > 1 else np.nan
