"""The answer in plain words: which trainer is faster, and where efficiency falls."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from scalestudy.analysis.causes import CAUSES, CLOSURE_TOLERANCE, LEAST_LOSS
from scalestudy.analysis.differences import LEAST_DIFFERENCE, both_ways
from scalestudy.analysis.intervals import CONFIDENCE, FEWEST_REPEATS, level, ratio_coverage
from scalestudy.analysis.metrics import WORK, devices, headings
from scalestudy.analysis.shares import ratio, share

# Below this share of the reference's throughput per device, added devices are said to be poorly used.
EFFICIENCY_FLOOR = 0.8
# Above this there is nothing to explain.
_WELL = 0.97
# A cause in words, and what to try.
_CAUSES = {
    "compute_scaling": (
        "slower computing",
        "Look for what devices share (memory bandwidth, caches, power), in strong scaling for small batches.",
    ),
    "load_balance": ("load imbalance between ranks", "Look at the slower ones: heat, other work, an older model."),
    "waiting": (
        "waiting for ranks that are late now and then",
        "Look for what interrupts ranks now and then: other processes, interrupts, uneven batches.",
    ),
    "communication": (
        "communication that is not hidden",
        "Try a larger per-device batch, compressed gradients, other bucket sizes, or a faster network.",
    ),
    "input": ("input", "Try more loader_workers, faster storage, or smaller files."),
}
# Where nothing tells them apart: one process drives all devices, or a record is from before single steps were timed.
_EITHER = (
    "communication that is not hidden, or waiting for devices that are late now and then,",
    "Which of the two it is was not measured: that takes a process for each device, and a record made by this version.",
)
# In the place of what to try where the ranks were not let use their CPUs: no other cause can be told from that.
_QUOTA = (
    "A CPU quota held ranks up in {:.0%} of its periods, and all of this may come of that: raise it, or give the ranks "
    "fewer threads, and measure again."
)
# Of an exchange: so much more than it takes alone it must add to a step to be in the way of computing.
_IN_THE_WAY = 0.1
# Of a CPU quota's periods; less of them held nobody up.
_THROTTLED = 0.01
# Of two that cannot be compared, since what changed in between may be all the difference there is.
_AT_OTHER_TIMES = "were measured one after the other, not in turns, so they are not compared"
# Of more series than this the rest stand in the tables alone.
_MOST_NAMED = 5


def headline(points: pd.DataFrame, comparisons: pd.DataFrame, compilation: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Return each workload with its sentences: how its series compare at each world size, how each scales, and when a
    compiled one has paid for itself.
    """
    named = headings(points)
    compared, compiled = dict(iter(comparisons.groupby(WORK))), dict(iter(compilation.groupby(WORK)))
    return [
        (
            named[key],
            [
                *(_faster(compared[key]) if key in compared else ()),
                *_scales(rows),
                *_why(rows),
                *(_pays(compiled[key]) if key in compiled else ()),
            ],
        )
        for key, rows in points.groupby(WORK, sort=True)
    ]


def _faster(here: pd.DataFrame) -> Iterator[str]:
    for size, rows in here.groupby("world_size", sort=True):
        yield _pair(size, rows.iloc[0]) if len(rows) == 1 else _ranking(size, *_against_fastest(rows))


def _against_fastest(rows: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Return the fastest series and its comparison with every other, the nearest first: the ratio is its over theirs.

    The fastest of those that were measured often enough is the one which is the slower one least often.
    """
    enough = rows[rows.repeats >= FEWEST_REPEATS]
    among = enough if len(enough) else rows
    fastest = min(sorted({*among.faster, *among.slower}), key=lambda series: int((among.slower == series).sum()))
    own = both_ways(rows)
    return fastest, own[own.series == fastest].sort_values(["ratio", "other"])


def _ranking(size: int, fastest: str, rows: pd.DataFrame) -> str:
    """Return one sentence on the fastest of several series against every other."""
    apart = ~rows.in_turns & (rows.repeats > 1)
    few = (rows.repeats < FEWEST_REPEATS) & ~apart
    beaten, ahead = rows[rows.shown & (rows.ratio > 1)], rows[rows.shown & (rows.ratio < 1)]
    unshown = rows[~rows.shown & ~few & ~apart]
    shown = [
        f"{row.ratio:.2f}× as fast as {row.other} ({row.ratio_low:.2f}–{row.ratio_high:.2f}×)"
        for row in beaten.head(_MOST_NAMED).itertuples()
    ]
    if len(beaten) > _MOST_NAMED:
        shown.append(f"and up to {beaten.ratio.max():.2f}× as fast as the other {len(beaten) - _MOST_NAMED}")
    alike = [
        f"{row.other} ({row.ratio:.2f}×, {row.ratio_low:.2f}–{row.ratio_high:.2f}×)"
        for row in unshown.head(_MOST_NAMED).itertuples()
    ]
    if len(unshown) > _MOST_NAMED:
        alike.append(f"and {len(unshown) - _MOST_NAMED} more")
    said = [f"{fastest} is {', '.join(shown)}"] if shown else []
    # Only where three series beat each other in a circle.
    said += [f"{row.other} is {1 / row.ratio:.2f}× as fast as {fastest}" for row in ahead.itertuples()]
    if alike:
        each = "each of " if len(unshown) > 1 else ""
        said.append(f"no difference is shown between {fastest} and {each}{', '.join(alike)}")
    for repeats, ran in rows[few].groupby("repeats", sort=True):
        ratios = [f"{row.ratio:.2f}× as fast as {row.other}" for row in ran[ran.ratio >= 1].itertuples()]
        said += [f"{fastest} ran {', '.join(ratios)}, but {_too_few(repeats)}"] if ratios else []
        said += [
            f"{row.other} ran {1 / row.ratio:.2f}× as fast as {fastest}, but {_too_few(repeats)}"
            for row in ran[ran.ratio < 1].itertuples()
        ]
    said += [f"{fastest} and {other} {_AT_OTHER_TIMES}" for other in rows.other[apart].head(_MOST_NAMED)]
    if apart.sum() > _MOST_NAMED:
        said.append(f"nor is {fastest} compared with {apart.sum() - _MOST_NAMED} more")
    return f"On {devices(size)}, {'; '.join(said)}." + (" In brackets 95 % intervals." if shown or alike else "")


def _pair(size: int, row: Any) -> str:
    place, interval = f"On {devices(size)}", f"95 % interval {row.ratio_low:.2f}–{row.ratio_high:.2f}×"
    if row.shown:
        return f"{place}, {row.faster} is {row.ratio:.2f}× as fast as {row.slower} ({interval})."
    if not row.in_turns and row.repeats > 1:
        return f"{place}, {row.faster} and {row.slower} {_AT_OTHER_TIMES}."
    if row.repeats < FEWEST_REPEATS:
        return f"{place}, {row.faster} ran {row.ratio:.2f}× as fast as {row.slower}, but {_too_few(row.repeats)}."
    alone = " Alone that would be a difference; among all that this page claims it is not enough."
    beyond = row.p_value <= 1 - CONFIDENCE and row.ratio > 1 + LEAST_DIFFERENCE
    return (
        f"{place}, no difference is shown between {row.faster} and {row.slower}: {row.faster} ran {row.ratio:.2f}× as "
        f"fast ({interval}).{alone if beyond else ''}"
    )


def _too_few(repeats: int) -> str:
    word = ("one repeat shows", "two repeats show", "three repeats show", "four repeats show", "five repeats show")
    return f"{word[repeats - 1]} no difference; six can"


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the series to speak of: of too many the usual way of each trainer, its first; the tables have the rest."""
    if rows.series.nunique() <= _MOST_NAMED:
        return rows
    return rows[rows.series.isin(rows.groupby("trainer").series.min())]


def _scales(rows: pd.DataFrame) -> Iterator[str]:
    for trainer, line in _named(rows).groupby("series", sort=True):
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
            yield f"{_keeps(last)}: efficiency stays above {EFFICIENCY_FLOOR:.0%} as far as measured."
        if not doubtful.empty and (poor.empty or doubtful.world_size.iloc[0] < poor.world_size.iloc[0]):
            yield f"{_keeps(doubtful.iloc[0])}: whether that is below {EFFICIENCY_FLOOR:.0%} is not shown."
        if not poor.empty:
            first = poor.iloc[0]
            yield (
                f"{trainer}'s efficiency falls below {EFFICIENCY_FLOOR:.0%} on {devices(first.world_size)}: "
                f"each device does {_share(first)} of what it does on {devices(reference)}, a speedup of "
                f"{first.speedup:.2f}×."
            )
        above = beyond[beyond.above_reference]
        if not above.empty:
            yield (
                f"{_keeps(above.iloc[0])}, above 100 %: check the reference. Its device may be slow or its clock low, "
                "or what each of more devices works on may fit a cache."
            )
        slower = beyond[beyond.slower_than_reference]
        if not slower.empty:
            yield (
                f"{trainer} is slower on {devices(slower.world_size.iloc[0])} than on {devices(reference)}: "
                "more devices do not help here."
            )


def _keeps(row: Any) -> str:
    return (
        f"On {devices(row.world_size)}, {row.series} keeps {_share(row)} of the throughput per device that it has on "
        f"{devices(row.reference_world_size)}"
    )


def _why(rows: pd.DataFrame) -> Iterator[str]:
    """Say what takes efficiency away at each series' largest world size, and what to try; only what is shown."""
    for trainer, line in _named(rows).groupby("series", sort=True):
        yield from _without_causes(trainer, line)
        row = line.sort_values("world_size").iloc[-1]
        unknown = pd.isna(row.compute_scaling) or row.repeats < 2
        if row.world_size == row.reference_world_size or unknown or row.efficiency > _WELL:
            continue
        # The largest loss first.
        shown = sorted((row[cause], cause) for cause in CAUSES if row[f"{cause}_shown"])
        open_to = _does_not_add_up(row) if row.closure_off > CLOSURE_TOLERANCE else ""
        if not shown:
            unshown = f"What {trainer} loses on {devices(row.world_size)} is not shown to have any one cause."
            yield " ".join([open_to or unshown, *_slow_windows(row)])
            continue
        factors = ", ".join(
            f"{_words(row, cause)[0]} costs {1 - value:.0%} ({_between(row, cause)})" for value, cause in shown
        )
        worst = shown[0][1]
        named = {cause for _, cause in shown}
        more = [
            *(_hidden(row) if "communication" in named and pd.notna(row.waiting) else ()),
            *(_slowest(row) if "load_balance" in named else ()),
        ]
        advice = _QUOTA.format(row.throttled_share) if row.throttled_share > _THROTTLED else _words(row, worst)[1]
        each = ["Each is a share of what the others leave."] if len(shown) > 1 else []
        left = [*([open_to] if open_to else ()), *_slow_windows(row)]
        yield " ".join([f"Why, on {devices(row.world_size)}, for {trainer}: {factors}.", *each, *more, advice, *left])


def _words(row: Any, cause: str) -> tuple[str, str]:
    """Return a cause in words, and what to try."""
    return _EITHER if cause == "communication" and pd.isna(row.waiting) else _CAUSES[cause]


def _does_not_add_up(row: Any) -> str:
    return (
        f"Causes of {row.series} on {devices(row.world_size)} do not add up: the parts of a step make "
        f"{row.closure:.2f}× the timed step, and {row.reference_closure:.2f}× on {devices(row.reference_world_size)}. "
        f"Up to {CLOSURE_TOLERANCE:.0%} off would do; no loss of less than {row.closure_off:.0%} is named. The machine "
        "ran differently while the two were timed: measure again when it is quiet, or for longer."
    )


def _hidden(row: Any) -> Iterator[str]:
    if pd.isna(row.hidden):
        return
    alone = f"The exchange of {row.exchanged_bytes / 1e6:.3g} MB a step takes {1e3 * row.exchange_s:.3g} ms alone"
    if row.hidden > 1:
        # A share above 100 % would be noise told as a finding.
        yield f"{alone}; how much of it hides is not shown: a step with the exchange took no longer than one without."
    elif row.hidden > 0 and row.hidden_low > 0:
        yield f"{alone}, and {share(row.hidden)} of that hides behind computing."
    elif row.hidden > -_IN_THE_WAY or row.hidden_high >= 0:
        yield f"{alone}; none of it is shown to hide."
    else:
        yield f"{alone} and adds {1e3 * row.exposed_s:.3g} ms: exchanging and computing stand in each other's way."


def _without_causes(trainer: str, line: pd.DataFrame) -> Iterator[str]:
    """Say where the parts of a step were timed, but in no repeat that timed them at the reference too."""
    reference = line.reference_world_size.iloc[0]
    lacking = line[(line.world_size != reference) & line.resident_s.notna() & line.compute_scaling.isna()]
    if not lacking.empty:
        sizes = " or ".join(devices(size) for size in sorted(lacking.world_size))
        yield (
            f"No repeat of {trainer} has the parts of a step of both {devices(reference)} and {sizes}, so causes are "
            "not told: a repeat of one is set against the same repeat of the other."
        )


def _slow_windows(row: Any) -> Iterator[str]:
    """Say what no cause holds where a few windows took longer than the median one, in most repeats."""
    lost = 1 - max(row.unexplained, row.slow_windows)
    if not lost > LEAST_LOSS:
        return
    yield (
        f"At least {lost:.0%} more is lost in a few windows that took longer than the others, and no cause holds that. "
        "Something slows all ranks now and then; whether that is a rank, the network or the input is not shown."
    )


def _slowest(row: Any) -> Iterator[str]:
    who, times, repeats = f"rank {row.slowest_rank:.0f} on {row.slowest_host}", row.slowest_times, row.slowest_of
    if row.slowest_recurs:
        yield f"Stepping alone, {who} is the slowest in {times:.0f} of {repeats} repeats."
    elif times == repeats:
        yield f"Stepping alone, {who} is the slowest in all {repeats} repeats, too few to rule out chance."
    else:
        yield (
            f"Stepping alone, no rank is the slowest more often than in {times:.0f} of {repeats} repeats: it changes, "
            "or several are alike."
        )


def _between(row: Any, cause: str) -> str:
    low, high = (max(1 - row[f"{cause}_{end}"], 0) for end in ("high", "low"))
    return f"95 % interval {low:.0%}–{high:.0%}"


def _pays(here: pd.DataFrame) -> Iterator[str]:
    """Say when an execution that prepares itself has paid for it, at the smallest world size it was measured on."""
    for _, rows in here.groupby(["trainer", "options"], sort=True):
        for row in rows[rows.world_size == rows.world_size.min()].sort_values("execution").itertuples():
            subject = f"{row.series} on {devices(row.world_size)}"
            name = row.execution if row.execution in row.series.split() else f"{row.execution} (its usual way)"
            steps = f"{1e3 * row.step_time_s:.3g} ms a step against {1e3 * row.eager_step_time_s:.3g} ms eagerly"
            # By repeats and by medians: of few the two may disagree.
            faster = row.shown and row.ratio > 1 and row.saved_s > 0
            if faster and row.extra_s > 0:
                low, high = row.break_even_low, row.break_even_high
                interval = f" (95 % interval {_count(low)}–{_count(high)})" if pd.notna(low) else ""
                yield (
                    f"{subject}: {name} has paid for its {row.extra_s:.3g} s longer first step after "
                    f"{_count(row.break_even_steps)} steps{interval}: {steps}."
                )
            elif faster:
                yield f"{subject}: {name} pays from the first step on: {steps}."
            elif row.shown and row.ratio < 1:
                yield f"{subject}: {name} never pays: {steps}."
            else:
                yield f"{subject}: whether {name} ever pays is not shown: {steps}."


def _count(steps: float) -> str:
    return f"{steps:,.0f}" if steps < 1e9 else "never"


def _share(row: Any) -> str:
    if pd.isna(row.efficiency_low):
        once = "measured once" if row.repeats == 1 else "its reference was measured once"
        return f"{ratio(row.efficiency)[0]} ({once}, no interval)"
    value, interval = ratio(row.efficiency, row.efficiency_low, row.efficiency_high)
    return f"{value} ({level(ratio_coverage(min(row.repeats, row.reference_repeats)))} interval {interval})"
