"""A study's frames to its tables, in the one way that the report, comparisons and simulations share."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjust."""
    order = np.argsort(p_values)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted


def tables(found: Frames) -> Tables:
    """Return all tables of a study."""
    trials, unlike = fairness.guarded(found.trials)
    trials = metrics.with_efficiency(metrics.with_throughput(trials))
    trials = causes.with_causes(metrics.with_devices(trials, found.devices))
    points = metrics.points(trials)
    if len(points):
        points = metrics.with_warm_up_peaks(causes.with_factors(points, trials), trials)
        claimed = causes.claims(points)
        points = causes.with_shown(points, claimed.assign(p_adjusted=holm(claimed.p_value.to_numpy())))
    compared, ways, compilation = (
        table(points, trials) if len(points) else pd.DataFrame()
        for table in (differences.comparisons, differences.ways, differences.compilation)
    )
    return Tables(trials=trials, points=points, comparisons=compared, ways=ways, compilation=compilation, unlike=unlike)
