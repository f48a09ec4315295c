"""The answer in plain words: which trainer is faster, and where efficiency falls."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from scalestudy.analysis.metrics import SERIES

# Below this share of the reference's throughput per device, added devices are said to be poorly used.
EFFICIENCY_FLOOR = 0.8


def headline(points: pd.DataFrame, comparisons: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Return each workload with its sentences: how the trainers compare at each world size, then how each scales."""
    return [
        (f"{workload}, {scaling} scaling", [*_faster(comparisons, key), *_scales(rows)])
        for key, rows in points.groupby(_WORK, sort=True)
        for workload, scaling in [(key[0], key[1])]
    ]


_WORK = [column for column in SERIES if column not in ("trainer", "execution")]


def _faster(comparisons: pd.DataFrame, key: Any) -> Iterator[str]:
    here = comparisons[(comparisons[_WORK] == list(key)).all(axis=1)]
    for row in here.sort_values(["world_size", "ratio"]).itertuples():
        place = f"On {devices(row.world_size)}"
        if row.repeats < 2:
            yield (
                f"{place}, {row.faster} ran {row.ratio:.2f}× as fast as {row.slower}, "
                "but measured once: no difference shown."
            )
        elif row.shown:
            yield (
                f"{place}, {row.faster} is {row.ratio:.2f}× as fast as {row.slower} "
                f"(95 % interval {row.ratio_low:.2f}–{row.ratio_high:.2f}×)."
            )
        else:
            yield (
                f"{place}, no difference shown between {row.faster} and {row.slower}: their intervals overlap "
                f"({row.faster}'s median is {row.ratio:.2f}× as high, "
                f"95 % interval {row.ratio_low:.2f}–{row.ratio_high:.2f}×)."
            )


def _scales(rows: pd.DataFrame) -> Iterator[str]:
    for trainer, line in rows.groupby("trainer", sort=True):
        line = line.sort_values("world_size")
        reference = line.reference_world_size.iloc[0]
        beyond = line[line.world_size > reference]
        if beyond.empty:
            yield f"{trainer} was measured on {devices(reference)} alone: nothing can be said of its scaling."
            continue
        # A point measured once has no interval: it is taken as it is, and says so.
        low, high = (beyond[f"efficiency_{end}"].fillna(beyond.efficiency) for end in ("low", "high"))
        doubtful, poor = beyond[(low < EFFICIENCY_FLOOR) & (high >= EFFICIENCY_FLOOR)], beyond[high < EFFICIENCY_FLOOR]
        last = beyond.iloc[-1]
        if doubtful.empty and poor.empty:
            yield (
                f"{trainer} keeps {_share(last)} of its {devices(reference)} throughput per device "
                f"on {devices(last.world_size)}: efficiency stays above {EFFICIENCY_FLOOR:.0%} as far as measured."
            )
        if not doubtful.empty and (poor.empty or doubtful.world_size.iloc[0] < poor.world_size.iloc[0]):
            first = doubtful.iloc[0]
            yield (
                f"{trainer} keeps {_share(first)} of its {devices(reference)} throughput per device "
                f"on {devices(first.world_size)}: whether that is below {EFFICIENCY_FLOOR:.0%} is not shown."
            )
        if not poor.empty:
            first = poor.iloc[0]
            yield (
                f"{trainer}'s efficiency falls below {EFFICIENCY_FLOOR:.0%} on {devices(first.world_size)}: "
                f"{_share(first)} of that on {devices(reference)}, a speedup of {first.speedup:.2f}×."
            )
        slower = beyond[beyond.speedup_high < 1]
        if not slower.empty:
            yield (
                f"{trainer} is slower on {devices(slower.world_size.iloc[0])} than on {devices(reference)}: "
                "more devices do not help here."
            )


def _share(row: Any) -> str:
    if pd.isna(row.efficiency_low):
        return f"{row.efficiency:.0%} (measured once, no interval)"
    return f"{row.efficiency:.0%} (95 % interval {row.efficiency_low:.0%}–{row.efficiency_high:.0%})"


def devices(count: int) -> str:
    """Return a number of devices in words."""
    return f"{count} device{'s' if count > 1 else ''}"
