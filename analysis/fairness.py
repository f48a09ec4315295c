"""What was not the same work is not put on one axis, and the known traps of measuring are named."""

from collections.abc import Iterator

import pandas as pd

from scalestudy.analysis.metrics import WORK
from scalestudy.analysis.steadiness import apart
from scalestudy.trainers.trainer import TRAINERS

# What a workload does not say, and must be equal all the same, with its words.
_GUARDED = {
    "parameter_count": "{:,.0f} parameters",
    "tf32": "TF32 {:.0f}",
    "pinned_cpus": "{:.0f} CPUs pinned a device",
    "loader_workers": "{:.0f} loader workers",
}
# Less than this was timed in all: what a machine does now and then is not in it.
_SHORTEST_S = 1.5


def guarded(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the trials with workloads split where they were not the same work, and a sentence for each split."""
    said: list[str] = []
    ok = trials[trials.outcome == "ok"]
    workloads = trials.workload.copy()
    for (workload, *_), group in ok.groupby(WORK):
        for column, words in _GUARDED.items():
            if group[column].nunique(dropna=True) < 2:
                continue
            named = group[column].map(lambda value, words=words: words.format(value), na_action="ignore")
            workloads.loc[group.index] += (", " + named).fillna("")
            who = group.groupby(named.fillna("unknown")).series.unique()
            sides = "; ".join(f"{value}: {', '.join(sorted(series))}" for value, series in who.items())
            said.append(f"{workload}: not put on one axis, the work was not the same. {sides}.")
    return trials.assign(workload=workloads), said


def traps(trials: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Yield trial, kind and text of what makes a trial's number less than it seems; needs with_throughput."""
    ok = trials[trials.outcome == "ok"]
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
    for row in ok[ok.apart > 0].itertuples():
        yield row.trial, "windows apart", f"{row.apart:.0f} window{'s' if row.apart > 1 else ''}"
    for row in ok[ok.flat_loss_late.notna()].itertuples():
        yield row.trial, "unlearned", f"loss {row.flat_loss_first:.4g} at first, {row.flat_loss_late:.4g} later"
    for _, group in ok.groupby([*WORK, "series", "world_size"]):
        far = apart(group.throughput_images_per_s.to_numpy())
        for row in group[far].itertuples():
            off = row.throughput_images_per_s / group.throughput_images_per_s.median() - 1
            yield row.trial, "repeat apart", f"{off:+.0%} against the median of its {len(group)} repeats"
