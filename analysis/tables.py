"""A study's frames to its tables, in the one way that the report, comparisons and simulations share."""

from dataclasses import dataclass

import pandas as pd

from scalestudy.analysis import causes, differences, fairness, metrics
from scalestudy.analysis.frames import Frames


@dataclass(frozen=True, kw_only=True)
class Tables:
    """trials: a row a trial, all metrics added. points: a row a point. unlike: what is not put on one axis, in words.

    comparisons, ways, compilation: see `differences`; empty where nothing was measured.
    """

    trials: pd.DataFrame
    points: pd.DataFrame
    comparisons: pd.DataFrame
    ways: pd.DataFrame
    compilation: pd.DataFrame
    unlike: list[str]


def tables(found: Frames) -> Tables:
    """Return all tables of a study."""
    trials, unlike = fairness.guarded(found.trials)
    trials = metrics.with_efficiency(metrics.with_throughput(trials))
    trials = causes.with_causes(metrics.with_devices(trials, found.devices))
    points = metrics.points(trials)
    if len(points):
        points = metrics.with_warm_up_peaks(causes.with_factors(points, trials), trials)
    # Columns came one by one, each a block of its own, of which every selection of rows copies all: a copy joins them.
    trials, points = trials.copy(), points.copy()
    compared, ways, compilation = (
        table(points, trials) if len(points) else pd.DataFrame()
        for table in (differences.comparisons, differences.ways, differences.compilation)
    )
    return Tables(trials=trials, points=points, comparisons=compared, ways=ways, compilation=compilation, unlike=unlike)
