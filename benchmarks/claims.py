"""What does a report claim? Every reader of a claim is here, in a few lines, so that it can follow the report."""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import pandas as pd

from scalestudy.analysis import answer, compare, devices, fairness
from scalestudy.analysis.causes import CAUSES
from scalestudy.analysis.frames import frames
from scalestudy.analysis.tables import tables
from scalestudy.trainers.record import Record


class Page:
    """What `report.write_report` has in hand before it draws and writes."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.found = frames(records, Path("nowhere"))
        made = tables(self.found)
        self.trials, self.points, self.comparisons = made.trials, made.points, made.comparisons
        self.compilation, self.unlike = made.compilation, made.unlike

    @cached_property
    def sentences(self) -> list[str]:
        """The answer in words."""
        told = answer.headline(self.points, self.comparisons, self.compilation)
        return [sentence for _, sentences in told for sentence in sentences]

    @cached_property
    def notices(self) -> pd.DataFrame:
        """What a reader must know of single trials: trial, kind, text."""
        traps = pd.DataFrame(fairness.traps(self.trials), columns=devices.NOTICE_COLUMNS)
        return pd.concat([traps, self.found.notices])


def faster(read: Page) -> set[tuple[str, str, int]]:
    """Return every pair of which one is claimed to be faster: the faster, the slower, on how many devices."""
    shown = read.comparisons[read.comparisons.shown] if len(read.comparisons) else read.comparisons
    return {(row.faster, row.slower, row.world_size) for row in shown.itertuples()}


def ratio_interval(read: Page) -> tuple[str, float, float]:
    """Return of a page's one comparison who is the faster, and the ratio's interval."""
    row = read.comparisons.iloc[0]
    return row.faster, row.ratio_low, row.ratio_high


def causes(read: Page) -> set[str]:
    """Return the causes that are shown to take efficiency away."""
    return set() if read.points.empty else {cause for cause in CAUSES if read.points[f"{cause}_shown"].any()}


def accused(read: Page) -> int | None:
    """Return the rank that is said to be slow, if one is."""
    found = [re.search(r"Stepping alone, rank (\d+) on", sentence) for sentence in read.sentences]
    return next((int(one.group(1)) for one in found if one), None)


def doubted(read: Page) -> bool:
    """Return whether the page says that its causes do not add up."""
    return any("not add up" in sentence for sentence in read.sentences)


def factor_intervals(read: Page) -> dict[str, tuple[float, float]]:
    """Return the interval of every factor of the efficiency at the largest world size."""
    row = read.points.sort_values("world_size").iloc[-1]
    return {cause: (row[f"{cause}_low"], row[f"{cause}_high"]) for cause in CAUSES}


def efficiency_interval(read: Page) -> tuple[float, float]:
    """Return the interval of the efficiency at the largest world size."""
    row = read.points.sort_values("world_size").iloc[-1]
    return row.efficiency_low, row.efficiency_high


def throughput_interval(read: Page) -> tuple[float, float]:
    """Return the interval of the throughput at the largest world size."""
    row = read.points.sort_values("world_size").iloc[-1]
    return row.throughput_low, row.throughput_high


def unsteady(read: Page) -> bool:
    """Return whether any trial is said to have changed on the way, or never to have ended its warm-up."""
    moved = read.notices.kind.isin(["changed", "drifted", "warming up"]).any()
    return bool(moved or not read.trials.warm_up_steady.astype(bool).all())


def unlike_repeats(read: Page) -> bool:
    """Return whether repeats are said to drift, or to lie in two groups."""
    return any("from the first to the last repeat" in one or "lie in two groups" in one for one in read.unlike)


def verdict(base: Path, new: Path, tolerance: float) -> str:
    """Return what `scalestudy compare` ends with: pass, fail, or unknown."""
    found = compare.compare(base, new, tolerance)
    return "fail" if found.regressed else "unknown" if found.unclear else "pass"
