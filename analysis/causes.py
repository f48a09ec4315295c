"""Where the time goes: the parts of a step, and the factors of efficiency that they make."""

from typing import Any

import pandas as pd

from scalestudy.analysis.metrics import POINT, SERIES, intervals_of, need

# What efficiency is the product of.
CAUSES = ("compute_scaling", "load_balance", "communication", "input")


def with_causes(trials: pd.DataFrame) -> pd.DataFrame:
    """Add compute_scaling, load_balance, communication and input, whose product is the efficiency of every trial; and
    how much of the exchange hides behind computing.

    With local the step in which nothing is exchanged, resident that on a batch which lies on the device:
        load_balance   typical / max of local over ranks, typical their lower median
        communication  max local / resident
        input          resident / whole step
    timed in turns, each over its median at the reference, where they cost something too. compute_scaling is the rest:
    the reference's step without these costs over the typical local step, an image and device. (After the POP
    efficiency metrics of HPC, Wagner et al. 2018, which have the mean for typical: of two ranks it would call half of
    one's slowness slower computing.) Empty where the parts were not measured.

        exposed_s      resident - max local: what the exchange adds to a step
        hidden         1 - exposed / the exchange alone; below 0 where exchanging beside computing takes longer than
                       alone, since both want the same processors, memory or links
        together       typical local / resident: all that stepping together costs, jitter included
    """
    need(trials, [*SERIES, "efficiency", "local_typical_s", "local_max_s", "resident_s", "whole_s", "exchange_s"])
    own = pd.DataFrame(
        {
            "load_balance": trials.local_typical_s / trials.local_max_s,
            "communication": trials.local_max_s / trials.resident_s,
            "input": trials.resident_s / trials.whole_s,
        }
    ).astype(float)
    at_reference = trials.world_size == trials.reference_world_size
    # Medians of the reference's trials alone, written to every trial of the series.
    reference = own.where(at_reference).groupby([trials[column] for column in SERIES]).transform("median")
    relative = own / reference
    parts = trials[["resident_s", "local_max_s", "local_typical_s", "exchange_s"]].astype(float)
    exposed_s = (parts.resident_s - parts.local_max_s).where(parts.exchange_s.notna())
    return trials.assign(
        **relative,
        compute_scaling=trials.efficiency / relative.prod(axis=1, skipna=False),
        exposed_s=exposed_s,
        hidden=1 - exposed_s / parts.exchange_s,
        together=parts.local_typical_s / parts.resident_s,
    )


def decomposed(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a trial of each series at its largest world size: that of median efficiency, so that its causes add up."""
    largest = trials[
        (trials.world_size == trials.groupby(SERIES).world_size.transform("max"))
        & (trials.world_size > trials.reference_world_size)
        & trials.compute_scaling.notna()
    ]
    rows = [group.sort_values("efficiency").iloc[(len(group) - 1) // 2] for _, group in largest.groupby(SERIES)]
    return pd.DataFrame(rows, columns=trials.columns)


def with_factors(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Add to every point what causes it has: medians over its repeats, of factors with their intervals."""
    need(table, POINT)
    if table.empty:
        return table
    measured = trials[trials.throughput_images_per_s.notna()]
    groups = measured.groupby(POINT, sort=True)
    added: dict[str, Any] = {
        name: groups[name].median().to_numpy()
        for name in (*CAUSES, "hidden", "exchange_s", "exchanged_bytes", "exposed_s", "jitter", "together")
    }
    added |= {name: groups[name].agg(_most_frequent).to_numpy() for name in ("slowest_rank", "slowest_host")}
    for name in (*CAUSES, "hidden"):
        added[f"{name}_low"], added[f"{name}_high"] = intervals_of(measured, table, name)
    return table.assign(**added)


def _most_frequent(values: pd.Series) -> Any:
    counts = values.value_counts()
    return counts.index[0] if len(counts) else None
