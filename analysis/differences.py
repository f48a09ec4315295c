"""What is faster than what: series against series, ways to run a trainer against its usual way.

One engine for the answer, the ways and `scalestudy compare`. A study measures repeat by repeat, each in an order of its
own, so that a repeat is a block: what slows all of it cancels in the ratio of two trials of the same repeat.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from scalestudy.analysis.intervals import CONFIDENCE, FEWEST_REPEATS, bootstrap_intervals
from scalestudy.analysis.metrics import POINT, WORK, need, throughputs
from scalestudy.analysis.power import fewest_repeats, standard_errors

# A smaller difference is not worth a claim, however sure: other work, clocks and links change by as much.
LEAST_DIFFERENCE = 0.01
# More steps than any training takes.
_NEVER_STEPS = 1e15


class Difference(NamedTuple):
    """above / below: the geometric mean of ratios, its 95 % interval, and the p-value of "there is no difference".

    pairs: of how many repeats, 0 where they do not pair. standard_error is of the log ratio, with its degrees of
    freedom. All but ratio and pairs are NaN where either was measured once, the interval where one was twice, and the
    p-value below six repeats.
    """

    ratio: float
    low: float
    high: float
    p_value: float
    pairs: int
    standard_error: float
    degrees: float


def difference(above: pd.Series, below: pd.Series, null: float = 1.0, *, paired: bool = True) -> Difference:
    """Return how many times `below` `above` is: two series of a positive figure, indexed by repeat.

    Where six repeats or all of them pair: Student's t of the paired log ratios. Otherwise Welch's t of the logs (Welch
    1947). There is no p-value below six repeats of either: with fewer, t tests err where noise is not normal. `null` is
    the ratio of which the two-sided p-value speaks. `paired` is false where the two were not measured repeat by repeat.
    """
    logs = paired_log_ratio(above, below) if paired else np.empty(0)
    pairs = len(logs)
    if pairs < 2 or (pairs < FEWEST_REPEATS and pairs < max(len(above), len(below))):
        found = _unpaired(np.log(above.to_numpy(np.float64)), np.log(below.to_numpy(np.float64)), np.log(null))
    else:
        standard_error = float(logs.std(ddof=1)) / np.sqrt(pairs)
        found = _student(float(logs.mean()), standard_error, pairs - 1, np.log(null))._replace(pairs=pairs)
    fewest = min(len(above), len(below))
    if fewest < FEWEST_REPEATS:
        found = found._replace(p_value=np.nan)
    # Of two it reaches from next to nothing to thousands.
    return found._replace(low=np.nan, high=np.nan) if fewest < 3 else found


def paired_log_ratio(above: pd.Series, below: pd.Series) -> NDArray[np.float64]:
    """Return ln(above / below) of every repeat that both have; none where a repeat was measured twice."""
    if not (above.index.is_unique and below.index.is_unique):
        return np.empty(0)
    _, here, there = np.intersect1d(above.index, below.index, assume_unique=True, return_indices=True)
    logs: NDArray[np.float64] = np.log(above.to_numpy(np.float64)[here] / below.to_numpy(np.float64)[there])
    return logs


def day_difference(above: pd.Series, days: Sequence[pd.Series], null: float = 1.0) -> Difference:
    """Return how many times `days` `above` is, where each of two or more series of `days` is the same on another day.

    A day is then what is repeated: its mean is one value, and `above` one more, with Student's t of the others' spread
    (the prediction of a single value, Hahn & Meeker 1991), or the interval over repeats where that is wider.
    """
    means = np.array([np.log(day).mean() for day in days])
    spread = float(means.std(ddof=1)) * np.sqrt(1 + 1 / len(means))
    by_day = _student(float(np.log(above).mean() - means.mean()), spread, len(means) - 1, np.log(null))
    by_repeat = difference(above, pd.concat(days), null, paired=False)
    # Days that were alike by chance do not make repeats more certain than they are; of one or two repeats nobody knows.
    found = by_day if by_repeat.high / by_repeat.low <= by_day.high / by_day.low else by_repeat
    return found._replace(p_value=np.nan) if len(above) < FEWEST_REPEATS else found


def detectable(found: Difference, claims: int = 1) -> float:
    """Return the smallest loss, a share, that is found four times in five (minimum detectable effect, Bloom 1995)."""
    if np.isnan(found.standard_error):
        return np.nan
    return float(-np.expm1(-standard_errors(found.degrees, claims) * found.standard_error))


def repeats_to_find(found: Difference, repeats: int, loss: float, claims: int = 1) -> int | None:
    """Return how many repeats would find such a loss four times in five, by the spread of those that are there.

    None where it is not known from one, and where a thousand would not.
    """
    per_repeat = found.standard_error * np.sqrt(repeats)

    def seen(repeats: int) -> float:
        degrees = (repeats - 1) * (1 if found.pairs else 2)
        return detectable(found._replace(standard_error=per_repeat / np.sqrt(repeats), degrees=float(degrees)), claims)

    return fewest_repeats(seen, loss)


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the p-values adjusted for their number (Holm 1979): what is at most 0.05 is wrong anywhere in at most 5 %.

    However they depend on each other. NaN, which is no claim, stays and does not count.
    """
    adjusted = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: int(np.isfinite(p_values).sum())]
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def judged(*tables: pd.DataFrame, least: float = LEAST_DIFFERENCE) -> list[pd.DataFrame]:
    """Return tables of one page with p_adjusted, by Holm over all their p_value, and `shown`: what may be claimed.

    Reads ratio and p_value. Shown is what has an adjusted p-value of at most 0.05, and a ratio beyond 1 ± least.
    """
    ends = np.cumsum([len(table) for table in tables])[:-1]
    adjusted = np.split(holm(np.concatenate([table.p_value.to_numpy(np.float64) for table in tables])), ends)
    return [
        table.assign(p_adjusted=p, shown=(p <= 1 - CONFIDENCE) & ((table.ratio - 1).abs() > least))
        for table, p in zip(tables, adjusted, strict=True)
    ]


def against_reference(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a point past its reference that may be above 100 %, or slower: index of the point, claim, ratio and
    p_value. above_reference: the ratio is of throughputs per device; slower_than_reference: of throughputs.
    """
    need(table, [*POINT, "reference_world_size", "efficiency", "speedup"])
    samples = throughputs(trials)
    rows = []
    beyond = table[table.world_size > table.reference_world_size]
    for point in beyond[(beyond.efficiency > 1) | (beyond.speedup < 1)].itertuples():
        key = tuple(getattr(point, column) for column in POINT)
        claim, ideal = ("above_reference", point.world_size / point.reference_world_size)
        if point.speedup < 1:
            claim, ideal = ("slower_than_reference", 1.0)
        found = difference(samples[key] / ideal, samples[(*key[:-1], point.reference_world_size)])
        if (found.ratio > 1) == (claim == "above_reference"):
            rows.append((point.Index, claim, found.ratio, found.p_value))
    return pd.DataFrame(rows, columns=["index", "claim", "ratio", "p_value"])


def comparisons(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every two series of a workload and world size: faster, slower, ratio and its `Difference`.

    All pairs, since which one is the fastest is chosen by the same trials: a claim against the fastest is one of them.
    in_turns is false where one had ended before the other began: what changed between may be all there is, so that
    there is no p-value.
    """
    need(table, POINT)
    need(trials, [*POINT, "repeat", "started_at", "throughput_images_per_s"])
    samples = throughputs(trials)
    started = trials[trials.throughput_images_per_s.notna()].groupby(POINT).started_at.agg(["min", "max"])
    times = dict(zip(started.index, started.itertuples(index=False, name=None), strict=True))
    rows: list[dict[str, Any]] = []
    for key, group in table.groupby([*WORK, "world_size"], sort=True):
        here = {
            row[POINT.index("series")]: row
            for row in group[POINT].sort_values("series").itertuples(index=False, name=None)
        }
        for one, other in combinations(here, 2):
            faster, slower = one, other
            found = difference(samples[here[one]], samples[here[other]])
            if found.ratio < 1:
                faster, slower, found = other, one, _turned(found)
            (first, last), (other_first, other_last) = times[here[one]], times[here[other]]
            in_turns = first <= other_last and other_first <= last
            if not in_turns:
                found = found._replace(p_value=np.nan)
            rows.append(
                dict(zip([*WORK, "world_size"], key, strict=True))
                | {"faster": faster, "slower": slower, "in_turns": in_turns}
                | {"repeats": min(len(samples[here[one]]), len(samples[here[other]]))}
                | _columns(found)
            )
    columns = [*WORK, "world_size", "faster", "slower", "in_turns", "repeats", *_COLUMNS]
    return pd.DataFrame(rows, columns=columns)


def both_ways(compared: pd.DataFrame) -> pd.DataFrame:
    """Return every row of `comparisons` from both sides: series and other, the ratio is that of series over other."""
    one = compared.rename(columns={"faster": "series", "slower": "other"})
    turned = one.assign(
        series=one.other,
        other=one.series,
        ratio=1 / one.ratio,
        ratio_low=1 / one.ratio_high,
        ratio_high=1 / one.ratio_low,
    )
    return pd.concat([one, turned], ignore_index=True)


def ways(table: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every point of a trainer that was run in several ways there, against its usual way.

    usual is the series with nothing changed, or the first by name where none is. ratio, its interval and what else is
    known of it are those of `comparisons`, judged; the usual way itself has none.
    """
    need(table, POINT)
    by = [*WORK, "world_size", "trainer"]
    table = table[table.groupby(by).series.transform("size") > 1]
    pairs = _by_pair(compared)
    rows: list[dict[str, Any]] = []
    for _, group in table.groupby(by, sort=True):
        # The usual way has the trainer's bare name, which is the shortest and comes first.
        first, *others = group.sort_values("series")[POINT].to_dict("records")
        rows.append(first | {"usual": first["series"], "ratio": 1.0, "shown": False})
        rows += [row | {"usual": first["series"]} | pairs[_pair(row, first["series"])] for row in others]
    return pd.DataFrame(rows, columns=[*POINT, "usual", *_JUDGED])


def compilation(table: pd.DataFrame, trials: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every point measured in an execution that prepares itself, beside the same trainer eagerly.

    extra_s is what its first step took longer (tracing, compiling, capturing), saved_s what each step after it is
    shorter, both medians over repeats. break_even_steps = extra_s / saved_s, with its bootstrap interval: after so many
    steps the mode has paid for itself; 1e15, which no training takes, where its steps are not shorter. ratio is of
    throughputs over eager's, from `comparisons`, judged.
    """
    need(table, [*POINT, "first_step_s", "step_time_s"])
    by = [*WORK, "world_size", "trainer", "options"]
    table = table[table.groupby(by).execution.transform("size") > 1]
    measured = trials[trials.throughput_images_per_s.notna() & trials.series.isin(table.series)]
    samples = {key: group[["first_step_s", "step_time_s"]].to_numpy().T for key, group in measured.groupby(POINT)}
    pairs = _by_pair(compared)
    rows: list[dict[str, Any]] = []
    groups: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]] = []
    for _, group in table.groupby(by, sort=True):
        eager = group[group.execution == "eager"]
        for prepared in group[group.execution != "eager"].to_dict("records") if len(eager) else ():
            plain = eager.iloc[0]
            groups.append((*samples[tuple(prepared[column] for column in POINT)], *samples[tuple(plain[POINT])]))
            rows.append(
                {column: prepared[column] for column in [*POINT, "first_step_s", "step_time_s"]}
                | {
                    "eager_first_step_s": plain.first_step_s,
                    "eager_step_time_s": plain.step_time_s,
                    "extra_s": prepared["first_step_s"] - plain.first_step_s,
                    "saved_s": plain.step_time_s - prepared["step_time_s"],
                }
                | pairs[_pair(prepared, plain.series)]
            )
    columns = ["first_step_s", "step_time_s", "eager_first_step_s", "eager_step_time_s", "extra_s", "saved_s"]
    found = pd.DataFrame(rows, columns=[*POINT, *columns, *_JUDGED])
    low, high = bootstrap_intervals(list(groups), _break_even_steps)
    steps = [float(_break_even_steps(*group, axis=0)) for group in groups]
    return found.assign(break_even_steps=steps, break_even_low=low, break_even_high=high)


_COLUMNS = ["ratio", "ratio_low", "ratio_high", "p_value", "pairs"]
_JUDGED = [*_COLUMNS, "p_adjusted", "shown"]


def _columns(found: Difference) -> dict[str, Any]:
    return dict(zip(_COLUMNS, found, strict=False))


def _turned(found: Difference) -> Difference:
    """Return below / above."""
    return found._replace(ratio=1 / found.ratio, low=1 / found.high, high=1 / found.low)


def _pair(point: Mapping[str, Any], other: str) -> tuple[Any, ...]:
    return (*(point[column] for column in [*WORK, "world_size"]), point["series"], other)


def _by_pair(compared: pd.DataFrame) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the judged columns of `both_ways` by workload, world size and the two series."""
    rows = both_ways(compared).to_dict("records")
    return {_pair(row, row["other"]): {name: row[name] for name in _JUDGED} for row in rows}


def _student(log_ratio: float, standard_error: float, degrees: float, null: float) -> Difference:
    half = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * standard_error
    beyond = abs(log_ratio - null)
    # Repeats that are equal to the last bit: nothing is left to chance.
    p_value = 2 * stdtr(degrees, -beyond / standard_error) if standard_error > 0 else float(beyond == 0)
    low, ratio, high = np.exp([log_ratio - half, log_ratio, log_ratio + half]).tolist()
    return Difference(ratio, low, high, float(p_value), 0, standard_error, degrees)


def _unpaired(above: NDArray[np.float64], below: NDArray[np.float64], null: float) -> Difference:
    log_ratio = float(above.mean() - below.mean())
    if min(len(above), len(below)) < 2:
        return Difference(float(np.exp(log_ratio)), np.nan, np.nan, np.nan, 0, np.nan, np.nan)
    parts = [float(side.var(ddof=1)) / len(side) for side in (above, below)]
    total = sum(parts)
    # Welch and Satterthwaite's; where nothing varies any number will do.
    spread = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (above, below), strict=True))
    degrees = total**2 / spread if spread > 0 else len(above) + len(below) - 2
    return _student(log_ratio, np.sqrt(total), degrees, null)


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
