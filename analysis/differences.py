"""What is faster than what: series against series, ways to run a trainer against its usual way."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scalestudy.analysis.intervals import bootstrap_intervals, ratio_intervals
from scalestudy.analysis.metrics import POINT, WORK, need, throughputs

# More steps than any training takes.
_NEVER_STEPS = 1e15


def comparisons(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row for the fastest series against each other one, at each workload and world size.

    ratio is of median throughputs, with its bootstrap interval. `shown` is false where the two throughputs' own
    intervals overlap, and where either was measured once. superiority: see there.
    """
    need(table, [*POINT, "throughput_low", "throughput_high"])
    samples = throughputs(trials)
    rows: list[dict[str, Any]] = []
    faster: list[NDArray[np.float64]] = []
    slower: list[NDArray[np.float64]] = []
    for key, group in table.groupby([*WORK, "world_size"], sort=True):
        best, *others = group.sort_values("throughput_images_per_s", ascending=False).itertuples()
        for other in others:
            faster.append(samples[tuple(getattr(best, column) for column in POINT)])
            slower.append(samples[tuple(getattr(other, column) for column in POINT)])
            rows.append(
                dict(zip([*WORK, "world_size"], key, strict=True))
                | {
                    "faster": best.series,
                    "slower": other.series,
                    "ratio": best.throughput_images_per_s / other.throughput_images_per_s,
                    "repeats": min(best.repeats, other.repeats),
                    "shown": bool(best.throughput_low > other.throughput_high),
                    "superiority": superiority(faster[-1], slower[-1]),
                }
            )
    low, high = ratio_intervals(faster, slower)
    columns = [*WORK, "world_size", "faster", "slower", "ratio", "repeats", "shown", "superiority"]
    return pd.DataFrame(rows, columns=columns).assign(ratio_low=low, ratio_high=high)


def ways(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every point of a trainer that was run in several ways there, against its usual way.

    usual is the series with nothing changed, or the first by name where none is. ratio is of median throughputs, with
    its bootstrap interval; none for the usual way itself, and none from one repeat.
    """
    need(table, POINT)
    by = [*WORK, "world_size", "trainer"]
    table = table[table.groupby(by).series.transform("size") > 1]
    samples = throughputs(trials[trials.series.isin(table.series)])
    rows: list[dict[str, Any]] = []
    own: list[NDArray[np.float64]] = []
    usual: list[NDArray[np.float64]] = []
    for _, group in table.groupby(by, sort=True):
        # The usual way has the trainer's bare name, which is the shortest and comes first.
        first, *others = group.sort_values("series")[POINT].to_dict("records")
        for row in (first, *others):
            own.append(samples[tuple(row.values())])
            usual.append(samples[tuple(first.values())])
            ratio = float(np.median(own[-1]) / np.median(usual[-1]))
            rows.append(row | {"usual": first["series"], "ratio": ratio})
    low, high = ratio_intervals(own, usual)
    found = pd.DataFrame(rows, columns=[*POINT, "usual", "ratio"]).assign(ratio_low=low, ratio_high=high)
    found.loc[found.series == found.usual, ["ratio_low", "ratio_high"]] = np.nan
    return found


def compilation(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every point measured in an execution that prepares itself, beside the same trainer eagerly.

    extra_s is what its first step took longer (tracing, compiling, capturing), saved_s what each step after it is
    shorter, both medians over repeats. break_even_steps = extra_s / saved_s, with its bootstrap interval: after so many
    steps the mode has paid for itself; 1e15, which no training takes, where its steps are not shorter. `shown` as for
    `comparisons`, `slower` its opposite.
    """
    need(table, [*POINT, "first_step_s", "step_time_s", "throughput_low", "throughput_high"])
    by = [*WORK, "world_size", "trainer", "options"]
    table = table[table.groupby(by).execution.transform("size") > 1]
    measured = trials[trials.throughput_images_per_s.notna() & trials.series.isin(table.series)]
    samples = {key: group[["first_step_s", "step_time_s"]].to_numpy().T for key, group in measured.groupby(POINT)}
    rows: list[dict[str, Any]] = []
    groups: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]] = []
    for _, group in table.groupby(by, sort=True):
        eager = group[group.execution == "eager"]
        for prepared in group[group.execution != "eager"].to_dict("records") if len(eager) else ():
            plain = eager.iloc[0]
            first_s, step_s = samples[tuple(prepared[column] for column in POINT)]
            eager_first_s, eager_step_s = samples[tuple(plain[POINT])]
            groups.append((first_s, step_s, eager_first_s, eager_step_s))
            rows.append(
                {column: prepared[column] for column in [*POINT, "first_step_s", "step_time_s"]}
                | {
                    "eager_first_step_s": plain.first_step_s,
                    "eager_step_time_s": plain.step_time_s,
                    "extra_s": prepared["first_step_s"] - plain.first_step_s,
                    "saved_s": plain.step_time_s - prepared["step_time_s"],
                    "shown": bool(prepared["throughput_low"] > plain.throughput_high),
                    "slower": bool(prepared["throughput_high"] < plain.throughput_low),
                }
            )
    columns = ["first_step_s", "step_time_s", "eager_first_step_s", "eager_step_time_s", "extra_s", "saved_s"]
    found = pd.DataFrame(rows, columns=[*POINT, *columns, "shown", "slower"])
    low, high = bootstrap_intervals(list(groups), _break_even_steps)
    steps = [float(_break_even_steps(*group, axis=0)) for group in groups]
    return found.assign(break_even_steps=steps, break_even_low=low, break_even_high=high)


def superiority(above: NDArray[np.float64], below: NDArray[np.float64]) -> float:
    """Return the share of pairs of runs in which that of `above` is the faster, ties half (Vargha & Delaney 2000)."""
    return float((1 + np.sign(above[:, None] - below)).mean() / 2)


def _break_even_steps(
    first_s: NDArray[np.float64],
    step_s: NDArray[np.float64],
    eager_first_s: NDArray[np.float64],
    eager_step_s: NDArray[np.float64],
    *,
    axis: int,
) -> NDArray[np.float64]:
    extra_s = np.median(first_s, axis=axis) - np.median(eager_first_s, axis=axis)
    saved_s = np.median(eager_step_s, axis=axis) - np.median(step_s, axis=axis)
    # Not infinity: a percentile between it and a number would be no number.
    return np.where(saved_s > 0, np.maximum(extra_s, 0) / np.maximum(saved_s, 1e-12), _NEVER_STEPS)
