"""Where the time goes: the parts of a step, and the factors of efficiency that they make."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, t

from scalestudy.analysis.intervals import CONFIDENCE
from scalestudy.analysis.metrics import POINT, SERIES, intervals_of, need
from scalestudy.analysis.quantiles import median, quantiles
from scalestudy.trainers.record import RankReport, Window

Values = NDArray[np.float64]

# What efficiency is the product of, but for what does not add up.
CAUSES = ("compute_scaling", "load_balance", "waiting", "communication", "input")
# A loss that is smaller than this is not named.
LEAST_LOSS = 0.02
# Where the parts of a step are further from the timed step than this, they do not explain it.
CLOSURE_TOLERANCE = 0.05
# The windows are cut into so many parts at most, each measured by what the others choose.
_MOST_PARTS = 12
# Windows are neighbours where less than such a part of all lies between them.
_NEAR = 6
# Two repeats may agree by chance alone.
_FEWEST_PAIRS = 3
# So often chance may have a rank be the slowest in as many repeats as the one that is named.
_BY_CHANCE = 0.05
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def part_times(reports: tuple[RankReport, ...]) -> dict[str, Any]:
    """Return seconds of the parts of a step, where they were measured, and the rank that is slowest alone.

    whole_s: the step, the mean over its windows of the slowest rank, since loaders give their batches in bursts.
    resident_s: that on a batch which lies on the device; exchange_s: the exchange without a step: medians over windows
    of each window's slowest rank. resident_mean_s: the mean, as of the whole step.
    local_typical_s, local_max_s: the same with nothing exchanged, of the typical rank and of the slowest. Both are
    chosen in other windows than they are measured in, since the slowest of ranks that are alike is not slower than they
    are. Of two ranks the faster one is typical: one slow rank is no slower computing of both.
    expected_max_s: the local step of whichever rank is the slowest in it, see `slowest_of_steps`; no more than a
    resident step takes, and no less than the slowest rank's.
    """
    if not all(report.local_windows and report.resident_windows for report in reports):
        return {}
    resident, local = (
        _step_times(windows)
        for windows in ([report.resident_windows for report in reports], [report.local_windows for report in reports])
    )
    resident_s = float(median(resident.max(axis=0)))
    resident_mean_s = float(np.max([_mean_step_s(report.resident_windows) for report in reports]))
    whole_s = resident_s
    if any(report.whole_windows for report in reports):
        whole_s = float(np.max([_mean_step_s(report.whole_windows) for report in reports]))
    typical_s, max_s, slowest = _typical_and_slowest(local)
    found = {
        "whole_s": whole_s,
        "resident_s": resident_s,
        "resident_mean_s": resident_mean_s,
        "local_typical_s": typical_s,
        "local_max_s": max_s,
        "expected_max_s": np.nan,
        "exchange_s": np.nan,
        "exchanged_bytes": reports[0].exchanged_bytes,
        "slowest_rank": reports[slowest].rank.rank,
        "slowest_host": reports[slowest].rank.host,
    }
    if all(report.local_step_times_s for report in reports):
        steps_s = np.array([report.local_step_times_s for report in reports])
        slowest_s = float(median(local.mean(axis=0))) * slowest_of_steps(steps_s)
        # Single steps end with the host idle: what jitters there may hide in a row of steps.
        found["expected_max_s"] = max(max_s, min(slowest_s, resident_s))
    if all(report.exchange_windows for report in reports):
        exchange = _step_times([report.exchange_windows for report in reports])
        found["exchange_s"] = float(median(exchange.max(axis=0)))
    return found


def slowest_of_steps(steps_s: Values) -> float:
    """Return the mean over steps of each step's slowest rank, over the mean of all ranks and steps; ranks × steps.

    The ranks began every step together: jitter that all have in common does not count, since it makes nobody wait. For
    the slowest of ranks that jitter by themselves see order statistics (David & Nagaraja 2003, section 2.1).
    """
    return float(steps_s.max(axis=0).mean() / steps_s.mean())


def rank_steps(reports: tuple[RankReport, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield rank, host, how often it was last, and percentiles of its steps, where steps were timed one by one."""
    if not all(report.local_step_times_s for report in reports):
        return
    times_s = np.array([report.local_step_times_s for report in reports])
    last = np.bincount(times_s.argmax(axis=0), minlength=len(reports)) / times_s.shape[1]
    for report, share, percentiles in zip(reports, last, quantiles(times_s, _QUANTILES), strict=True):
        yield report.rank.rank, report.rank.host, share, *percentiles


def with_causes(trials: pd.DataFrame) -> pd.DataFrame:
    """Add the factors of every trial's efficiency, how far its parts explain its step, and how much exchange hides.

    With local the step in which nothing is exchanged, resident that on a batch which lies on the device:
        compute_scaling  the reference's typical local step, an image and device, over the trial's
        load_balance     typical / slowest rank's local step
        waiting          slowest rank's local step / that of whichever rank is the slowest in each step
        communication    expected slowest / resident
        input            resident / whole step, means of both: stalls that are in both are no input
    but for the first each over its median at the reference, where they cost something too. unexplained is the rest:
    efficiency is the product of the five and it: stalls of few windows, and what changed while they were timed. (After
    the POP efficiency metrics of HPC, Wagner et al. 2018, which have the mean for typical: of two ranks it would call
    half of one's slowness slower computing.) Empty where the parts were not measured; load_balance and waiting also
    where one process drives all devices, and waiting where no single steps were timed: communication holds what is lost
    to them.

        slow_windows   median / mean timed step, over that of the reference: what few windows cost that took longer
        closure        whole / timed step: 1 where the parts explain the step
        exposed_s      resident - expected slowest: what the exchange adds to a step
        hidden         1 - exposed / the exchange alone; below 0 where exchanging beside computing takes longer than
                       alone, since both want the same processors, memory or links
        least_s, most_s  between which the resident step must lie, whatever overlaps: max(expected slowest, exchange)
                       and their sum (Hoefler & Belli 2015, rule 11)
        together       typical local / resident: all that stepping together costs
        own_…          the factors before they are set against the reference
    """
    need(trials, [*SERIES, "efficiency", "local_typical_s", "local_max_s", "resident_s", "whole_s", "exchange_s"])
    need(trials, ["expected_max_s", "step_time_s", "median_step_s", "told_processes", "resident_mean_s"])
    parts = ["local_typical_s", "local_max_s", "expected_max_s", "resident_s", "whole_s", "exchange_s"]
    typical_s, max_s, expected_s, resident_s, whole_s, exchange_s = (trials[part].astype(float) for part in parts)
    unknown = expected_s.isna() | (trials.told_processes < trials.world_size)
    expected_s = expected_s.fillna(max_s)
    loaded = whole_s != resident_s
    own = pd.DataFrame(
        {
            "compute_scaling": trials.per_device_batch / typical_s,
            "load_balance": typical_s / max_s,
            "waiting": max_s / expected_s,
            "communication": expected_s / resident_s,
            "input": trials.resident_mean_s.astype(float).where(loaded, resident_s) / whole_s,
            "slow_windows": trials.median_step_s / trials.step_time_s,
        }
    )
    at_reference = trials.world_size == trials.reference_world_size
    # Medians of the reference's trials alone, written to every trial of the series.
    reference = own.where(at_reference).groupby([trials[column] for column in SERIES]).transform("median")
    relative = own / reference
    unexplained = trials.efficiency / relative[list(CAUSES)].prod(axis=1, skipna=False)
    for factors in (own, relative):
        factors.loc[unknown, "waiting"] = np.nan
        factors.loc[trials.told_processes < trials.world_size, "load_balance"] = np.nan
    exposed_s = (resident_s - expected_s).where(exchange_s.notna())
    return trials.assign(
        **relative,
        **own.add_prefix("own_"),
        unexplained=unexplained,
        # Like with like: the parts of resident data are medians, the whole step on loaded data is a mean.
        closure=whole_s / trials.step_time_s.where(loaded, trials.median_step_s),
        exposed_s=exposed_s,
        hidden=1 - exposed_s / exchange_s.where(exchange_s > 0),
        least_s=np.maximum(expected_s, exchange_s),
        most_s=(expected_s + exchange_s).mask(unknown),
        together=typical_s / resident_s,
    )


def with_factors(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Add to every point its factors, each with _low, _high and _p_value, and medians of what else `with_causes` adds.

    A factor is the geometric mean over repeats of the trial's own over that of the reference in the same repeat, which
    ran within the same minutes. Its interval is Student's t on the logarithms, the p-value that of a one-sided test of
    a loss. closure_off: how far the parts are from explaining the step, here or at the reference, the larger of both.
    slowest_rank and slowest_host: that which most often is, in slowest_times of the slowest_of repeats that tell;
    slowest_recurs: chance would not have it so often, see `by_chance`.
    unexplained: the point's efficiency over the product of its factors.
    """
    need(table, POINT)
    if table.empty:
        return table
    measured = trials[trials.throughput_images_per_s.notna()]
    groups = measured.groupby(POINT, sort=True)
    medians = [
        "hidden",
        "exchange_s",
        "exchanged_bytes",
        "exposed_s",
        "least_s",
        "most_s",
        "resident_s",
        "together",
        "slow_windows",
    ]
    added: dict[str, Any] = {name: groups[name].median().to_numpy() for name in [*medians, "closure", "own_waiting"]}
    added["hidden_low"], added["hidden_high"] = intervals_of(measured, table, "hidden")
    added["slowest_of"] = groups.slowest_rank.count().to_numpy()
    slowest = measured[[*POINT, "slowest_rank", "slowest_host"]].value_counts(sort=True).reset_index()
    found = table.assign(**added).merge(
        slowest.drop_duplicates(POINT).rename(columns={"count": "slowest_times"}), on=POINT, how="left"
    )
    found["slowest_recurs"] = by_chance(found.slowest_times, found.slowest_of) <= _BY_CHANCE
    at_reference = found[found.world_size == found.reference_world_size]
    found = found.join(at_reference.set_index(SERIES).closure.rename("reference_closure"), on=SERIES)
    off = (found[["closure", "reference_closure"]] - 1).abs().max(axis=1, skipna=False)
    found = found.assign(closure_off=off, **_factors(found, measured))
    # Where one process drives all devices, communication holds what is not told of waiting and balance.
    product = found[list(CAUSES)].fillna(1).prod(axis=1).where(found.compute_scaling.notna())
    return found.assign(unexplained=found.efficiency / product)


def by_chance(times: ArrayLike, repeats: ArrayLike) -> Values:
    """Return the probability that of two ranks that are equally slow one is the slowest in so many repeats or more.

    The binomial tail of either, twice, since the one that most often is was chosen. With more ranks that are alike this
    is rarer still.
    """
    times, repeats = (np.asarray(values, dtype=np.float64) for values in (times, repeats))
    found: Values = np.minimum(1, 2 * binom.sf(times - 1, repeats, 0.5))
    return found


def claims(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a cause of each series' largest world size: index of the point, cause, ratio, p_value, least_loss.

    A loss is named from `LEAST_LOSS` on, and where the parts do not explain the step, from what they leave open.
    """
    largest = table[at_largest(table)]
    least = largest.closure_off.where(largest.closure_off > CLOSURE_TOLERANCE, LEAST_LOSS)
    parts = [
        pd.DataFrame({"ratio": largest[cause], "p_value": largest[f"{cause}_p_value"], "least_loss": least}).assign(
            cause=cause
        )
        for cause in CAUSES
    ]
    return pd.concat(parts).rename_axis("index").reset_index().dropna()


def with_shown(table: pd.DataFrame, claimed: pd.DataFrame) -> pd.DataFrame:
    """Add ..._shown of every cause: claims that are `shown`, see `differences.judged`, and worth a word."""
    stand = claimed[claimed.shown & (claimed.ratio < 1 - claimed.least_loss)]
    shown = {f"{cause}_shown": table.index.isin(stand["index"][stand.cause == cause]) for cause in CAUSES}
    return table.assign(**shown)


def _factors(table: pd.DataFrame, measured: pd.DataFrame) -> dict[str, Values]:
    """Return every factor of every point with its interval and p-value; none at the reference."""
    names = [f"own_{cause}" for cause in CAUSES]
    logs = measured[[*POINT, "repeat"]].join(np.log(measured[names].astype(float)))
    # Where some repeats of a point tell waiting from communication, those that do not tell nothing of either.
    tells = logs.own_waiting.notna()
    logs.loc[tells.groupby([logs[column] for column in POINT]).transform("any") & ~tells, "own_communication"] = np.nan
    at_reference = logs[measured.world_size == measured.reference_world_size].drop(columns="world_size")
    paired = logs.merge(at_reference, on=[*SERIES, "repeat"], suffixes=("", "_reference"))
    found: dict[str, Values] = {}
    for cause, name in zip(CAUSES, names, strict=True):
        paired["difference"] = paired[name] - paired[f"{name}_reference"]
        summed = paired.groupby(POINT).difference.agg(["mean", "std", "count"])
        rows = summed.reindex(pd.MultiIndex.from_frame(table[POINT]))
        rows[(table.world_size == table.reference_world_size).to_numpy()] = np.nan
        mean, deviation, count = (rows[column].to_numpy(np.float64) for column in ("mean", "std", "count"))
        with np.errstate(invalid="ignore", divide="ignore"):
            # Of values that agree to the last digit a spread of nothing would prove anything.
            error = np.maximum(deviation, 1e-9) / np.sqrt(count)
            half = t.ppf((1 + CONFIDENCE) / 2, count - 1) * error
            found[f"{cause}_p_value"] = np.where(count < _FEWEST_PAIRS, np.nan, t.cdf(mean / error, count - 1))
        found[cause] = np.exp(mean)
        found[f"{cause}_low"], found[f"{cause}_high"] = np.exp(mean - half), np.exp(mean + half)
    return found


def decomposed(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a trial of each series at its largest world size, an example: that of median efficiency."""
    largest = trials[at_largest(trials) & trials.compute_scaling.notna()]
    rows = [group.sort_values("efficiency").iloc[(len(group) - 1) // 2] for _, group in largest.groupby(SERIES)]
    return pd.DataFrame(rows, columns=trials.columns)


def at_largest(rows: pd.DataFrame) -> pd.Series:
    """Return which rows are of their series' largest world size, beyond its reference."""
    largest = rows.world_size == rows.groupby(SERIES).world_size.transform("max")
    return largest & (rows.world_size > rows.reference_world_size)


def _step_times(windows: Sequence[tuple[Window, ...]]) -> Values:
    """Return seconds a step, ranks × windows; as many windows as every rank has."""
    shortest = min(map(len, windows))
    return np.array([[(window.end_s - window.start_s) / window.steps for window in own[:shortest]] for own in windows])


def _mean_step_s(windows: Sequence[Window]) -> float:
    """Return seconds a step over all windows; NaN where a rank has none."""
    if not windows:
        return float("nan")
    return sum(window.end_s - window.start_s for window in windows) / sum(window.steps for window in windows)


def _typical_and_slowest(times_s: Values) -> tuple[float, float, int]:
    """Return the typical and the slowest rank's seconds a step, and the slowest; ranks × windows.

    For every part of the windows both are chosen by those that are more than a sixth of them away, and then measured in
    it: medians over parts. Neighbours in time are alike: who is slow for a second or two is so in both, and would pass
    for one that always is. Of a single window nobody can be chosen: the typical rank is then taken for the slowest.
    """
    ranks, windows = times_s.shape
    middle = (ranks - 1) // 2
    if windows < 2:
        alone_s = float(np.sort(times_s[:, 0])[middle])
        return alone_s, alone_s, int(times_s.argmax())
    parts = min(windows, _MOST_PARTS)
    typical, slowest = np.empty(parts), np.empty(parts)
    # Windows that follow each other are a part.
    place = np.arange(windows) * parts // windows
    for part in range(parts):
        own, apart = place == part, np.abs(place - part) > parts // _NEAR
        chosen, told = median(times_s[:, apart]), median(times_s[:, own])
        order = np.argsort(chosen, kind="stable")
        typical[part] = told[order[middle]]
        slowest[part] = told[order[-1]]
    return float(median(typical)), float(median(slowest)), int(median(times_s).argmax())
