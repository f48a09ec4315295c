"""A study's frames to its tables, in the one way that the report, comparisons and simulations share."""

from dataclasses import dataclass

import pandas as pd

from scalestudy.analysis import causes, differences, fairness, metrics, repeats
from scalestudy.analysis.frames import Frames


@dataclass(frozen=True, kw_only=True)
class Tables:
    """trials: a row a trial, all metrics added. points: a row a point. unlike, in words: what is not put on one axis or
    left out, what efficiency stands against, and how repeats are not alike.

    comparisons, ways, compilation: see `differences`; empty where nothing was measured. What they claim is judged
    together, see `differences.judged`.
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
    trials, again = fairness.once(trials)
    trials = metrics.with_efficiency(metrics.with_throughput(trials))
    trials = causes.with_causes(metrics.with_devices(trials, found.devices))
    points = metrics.points(trials)
    compared, ways, compilation = (pd.DataFrame(),) * 3
    if len(points):
        points = metrics.with_warm_up_peaks(causes.with_factors(points, trials), trials)
        # Columns came one by one, each a block of its own, of which every selection of rows copies all: a copy joins
        # them.
        trials, points = trials.copy(), points.copy()
        # All that the page claims is one family; ways and compilation are among the comparisons.
        compared, claimed, against = differences.judged(
            differences.comparisons(points, trials),
            causes.claims(points),
            differences.against_reference(points, trials),
        )
        ways = differences.ways(points, compared)
        compilation = differences.compilation(points, trials, compared)
        points = causes.with_shown(points, claimed)
        for claim in ("above_reference", "slower_than_reference"):
            points[claim] = points.index.isin(against["index"][against.shown & (against.claim == claim)])
    return Tables(
        trials=trials,
        points=points,
        comparisons=compared,
        ways=ways,
        compilation=compilation,
        unlike=[*unlike, *again, *fairness.references(trials), *repeats.notices(trials)],
    )
