"""What was not the same work is not put on one axis, and the known traps of measuring are named."""

from collections.abc import Iterator

import pandas as pd

from scalestudy.analysis import conditions
from scalestudy.analysis.metrics import POINT, WORK, devices, headings
from scalestudy.analysis.steadiness import apart
from scalestudy.trainers.trainer import TRAINERS

# What the traps are told by.
_TOLD = [
    "trial",
    *WORK,
    "trainer",
    "execution",
    "series",
    "world_size",
    "nodes",
    "measured_s",
    "told_devices",
    "sharing_ranks",
    "far_ranks",
    "changed_at",
    "changed_by",
    "drifted_by",
    "device_models",
    "apart",
    "flat_loss_first",
    "flat_loss_late",
    "throughput_images_per_s",
]
# Less than this was timed in all: what a machine does now and then is not in it.
_SHORTEST_S = 1.5
_MOST_NAMED = 4
# By outcome, the first that is there counts.
_WITHOUT = {
    "oom": "ran out of memory",
    "timeout": "did not end in time",
    "diverged": "diverged",
    "failed": "failed",
    "skipped": "was skipped",
}


def guarded(trials: pd.DataFrame, *, work_alone: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """Return the trials with workloads split where their conditions differ, and a sentence for each that was split.

    A trial that does not tell a condition stays with the others that do not. `work_alone`: only what was done and how
    it was measured must be equal, not on what.
    """
    said: list[str] = []
    ok = trials[trials.outcome == "ok"]
    if work_alone:
        ok = ok.assign(conditions=ok.conditions.map(conditions.work_alone))
    workloads = trials.workload.copy()
    for (workload, *_), group in ok.groupby(WORK):
        kinds, each = pd.factorize(group.conditions)
        told = pd.DataFrame([dict(pairs) for pairs in each])
        differing = told.loc[:, told.nunique() > 1].fillna("")
        if differing.columns.empty:
            continue
        short = _distinguishing(differing)
        by_trial = differing.iloc[kinds]
        workloads.loc[group.index] += _joined(by_trial[short], before=True).to_numpy()
        _follow(workloads, trials[(trials.outcome != "ok") & _of(trials, group)], group)
        who = group.series.groupby(_joined(by_trial).to_numpy()).unique()
        sides = "; ".join(f"{value or 'the others'}: {', '.join(sorted(series))}" for value, series in who.items())
        said.append(f"{workload}: not put on one axis, the work or what it was done on was not the same. {sides}.")
    return trials.assign(workload=workloads), said


def _of(trials: pd.DataFrame, group: pd.DataFrame) -> pd.Series:
    """Return which trials are of the work that a group of them is of."""
    return (trials[WORK] == group[WORK].iloc[0]).all(axis=1)


def _follow(workloads: pd.Series, failed: pd.DataFrame, ok: pd.DataFrame) -> None:
    """Give failed trials, which tell no conditions, the name of those of their series that did not, if it is one."""
    names = workloads[ok.index].groupby([ok.series, ok.world_size]).agg(set)
    of_series = workloads[ok.index].groupby(ok.series).agg(set)
    for index, series, size in zip(failed.index, failed.series, failed.world_size, strict=True):
        name = names.get((series, size)) or of_series.get(series) or set()
        if len(name) == 1:
            workloads[index] = next(iter(name))


def once(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the trials with one for every point and repeat, the first that was started, and what is left out in words.

    Two are there where a study was edited in a limit, such as a deadline, and run again into the same folder.
    """
    key = [*POINT, "repeat"]
    failed = trials.outcome != "ok"
    # A limit that was raised, and the trial has ended within it since: it does not fail. One that fails since does.
    ended = trials.started_at.where(~failed, "").groupby([trials[column] for column in key]).transform("max")
    trials = trials[~(failed & (trials.started_at <= ended))]
    failures = trials[trials.outcome != "ok"].sort_values("started_at", kind="stable")
    trials = trials.drop(failures.index[failures.duplicated(key)])
    ok = trials[trials.outcome == "ok"].sort_values(["started_at", "folder_name"])
    again = ok[ok.duplicated(key)]
    first = again.merge(ok.drop_duplicates(key)[[*key, "folder_name"]], on=key, suffixes=("", "_first"))
    said = [
        f"{row.folder_name} measured the same repeat of the same point as {row.folder_name_first}, and later: it is "
        "left out."
        for row in first.head(_MOST_NAMED).itertuples()
    ]
    if len(first) > _MOST_NAMED:
        said.append(f"{len(first) - _MOST_NAMED} more are left out for the same reason.")
    return trials.drop(again.index), said


def references(trials: pd.DataFrame) -> Iterator[str]:
    """Yield in words what each workload's efficiency stands against, where that is not its smallest size; and why."""
    named = headings(trials)
    for key, group in trials.groupby(WORK):
        measured = group[group.throughput_images_per_s.notna()]
        # Of a series that was measured on one size there is no efficiency.
        sizes = measured.groupby("series").world_size
        scaled = measured[sizes.transform("nunique") > 1]
        against = scaled.groupby("series").reference_world_size.first().astype(int)
        if against.nunique() > 1:
            each = ", ".join(f"{series} against {devices(size)}" for series, size in against.items())
            yield (
                f"{named[key]}: no world size was measured by all trainers with a larger one beyond "
                f"it, so that efficiency and speedup are not to be compared between them: {each}."
            )
        elif len(against) and (below := sorted(set(scaled.world_size[scaled.world_size < against.iloc[0]]))):
            have = {series: set(some) for series, some in scaled.groupby("series").world_size}
            missing = [(series, size) for size in below for series in have if size not in have[series]]
            why = "; ".join(
                f"{series} {_why_not(group[(group.series == series) & (group.world_size == size)])} on {devices(size)}"
                for series, size in missing[:_MOST_NAMED]
            ) + ("; and more" if len(missing) > _MOST_NAMED else "")
            yield (
                f"{named[key]}: efficiency and speedup stand against {devices(against.iloc[0])}, the "
                f"smallest size that all trainers measured: {why}."
            )


def traps(trials: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Yield trial, kind and text of what makes a trial's number less than it seems; needs with_throughput."""
    # Narrow: `itertuples` makes every column a list, and there are a hundred.
    ok = trials.loc[trials.outcome == "ok", _TOLD]
    for row in ok[ok.measured_s < _SHORTEST_S].itertuples():
        yield row.trial, "short", f"{row.measured_s:.2g} s timed in all; raise measurement.windows"
    for row in ok[ok.told_devices < ok.world_size].itertuples():
        yield row.trial, "ranks", f"{row.told_devices:.0f} of {row.world_size} devices"
    # On purpose where the study asks for a rank on every hardware thread, and still not what a core each would give.
    for row in ok[ok.sharing_ranks > 0].itertuples():
        yield row.trial, "shared cores", f"{row.sharing_ranks:.0f} ranks; lower threads_per_device or devices_per_node"
    # XLA runs the CPU devices of one process one after the other.
    of_one_process = [name for name, entry in TRAINERS.items() if not entry.process_per_device]
    in_turns = (
        ok.trainer.isin(of_one_process)
        & (ok.device == "cpu")
        & (ok.execution == "compiled")
        & (ok.world_size > ok.nodes)
    )
    for row in ok[in_turns].itertuples():
        yield row.trial, "in turns", f"{row.world_size // row.nodes} devices a process; use execution: graph"
    for row in ok[ok.far_ranks > 0].itertuples():
        yield row.trial, "far from GPU", f"{row.far_ranks:.0f} rank{'s' if row.far_ranks > 1 else ''}"
    for row in ok[ok.changed_at.notna()].itertuples():
        yield row.trial, "changed", f"{row.changed_by:+.0%} from window {row.changed_at + 1:.0f} on"
    for row in ok[ok.drifted_by > 0].itertuples():
        yield row.trial, "drifted", f"by {row.drifted_by:+.0%}"
    for row in ok[ok.drifted_by < 0].itertuples():
        yield row.trial, "warming up", f"by {-row.drifted_by:.0%}"
    for row in ok[ok.device_models.map(len) > 1].itertuples():
        yield row.trial, "mixed", " + ".join(row.device_models)
    for row in ok[ok.apart > 0].itertuples():
        yield row.trial, "windows apart", f"{row.apart:.0f} window{'s' if row.apart > 1 else ''}"
    for row in ok[ok.flat_loss_late.notna()].itertuples():
        yield row.trial, "unlearned", f"loss {row.flat_loss_first:.4g} at first, {row.flat_loss_late:.4g} later"
    for _, repeats in ok.groupby([*WORK, "series", "world_size"]).throughput_images_per_s:
        for index, throughput in repeats[apart(repeats.to_numpy())].items():
            off = throughput / repeats.median() - 1
            yield ok.trial[index], "repeat apart", f"{off:+.0%} against the median of its {len(repeats)} repeats"


def _distinguishing(differing: pd.DataFrame) -> list[str]:
    """Return the first columns that tell rows apart as well as all do: what changed together is named once."""
    chosen: list[str] = []
    kinds = 1
    for column in differing.columns:
        more = len(differing[[*chosen, column]].drop_duplicates())
        if more > kinds:
            chosen, kinds = [*chosen, column], more
    return chosen


def _joined(words: pd.DataFrame, *, before: bool = False) -> pd.Series:
    """Return each row's words with commas between them, and before them."""
    joined = pd.Series("", index=range(len(words)))
    for column in words:
        own = words[column].reset_index(drop=True)
        joined += own.where(own == "", ", " + own)
    return joined if before else joined.str.removeprefix(", ")


def _why_not(tried: pd.DataFrame) -> str:
    """Return in words why a point has no result, from its trials."""
    for outcome, words in _WITHOUT.items():
        if (tried.outcome == outcome).any():
            return words
    return "was not measured"
