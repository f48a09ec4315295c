"""Data frames to metrics: throughput, speedup, efficiency and their intervals over repeats."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binom, bootstrap

from scalestudy.trainers.record import Costs

# What must be the same before two series are set against each other.
WORK = ["workload", "scaling", "device", "launcher"]
# A series is a line in a plot: one trainer, run in one way, doing one work at several world sizes.
SERIES = [*WORK, "trainer", "execution", "options", "series"]
POINT = [*SERIES, "world_size"]
CONFIDENCE = 0.95
# So many repeats an interval must have to deserve its 95 %, see `coverage`.
FEWEST_REPEATS = 6
_RESAMPLES = 1999
# More steps than any training takes.
_NEVER_STEPS = 1e15

# What others read from results.csv and results.parquet (DESIGN, the command line).
RESULT_COLUMNS = [
    "trial",
    "trainer",
    "model",
    "launcher",
    "world_size",
    "nodes",
    "repeat",
    "scaling",
    "per_device_batch",
    "global_batch",
    "precision",
    "execution",
    "data",
    "outcome",
    "throughput_images_per_s",
    "step_time_s",
    "efficiency",
    "speedup",
    "compute_scaling",
    "load_balance",
    "communication",
    "input",
    "peak_memory_bytes",
    "energy_j",
    "setup_s",
    "first_step_s",
    "options",
    "device_busy",
    "joules_per_image",
    "images_per_s_per_w",
    "throttled_s",
]


# What efficiency is the product of.
CAUSES = ("compute_scaling", "load_balance", "communication", "input")


def with_throughput(trials: pd.DataFrame) -> pd.DataFrame:
    """Add throughput_images_per_s, global batch × steps over the slowest rank's time, and step_time_s."""
    _need(trials, ["global_batch", "measured_steps", "measured_s"])
    return trials.assign(
        throughput_images_per_s=trials.global_batch * trials.measured_steps / trials.measured_s,
        step_time_s=trials.measured_s / trials.measured_steps,
    )


def with_efficiency(trials: pd.DataFrame) -> pd.DataFrame:
    """Add reference_world_size, speedup and efficiency against the series' smallest world size measured.

    speedup(n) = throughput(n) / median throughput(reference); efficiency(n) = speedup(n) / (n / reference).
    In weak and in strong scaling alike, since throughput counts images, not steps.
    """
    _need(trials, [*POINT, "throughput_images_per_s"])
    measured = trials[trials.throughput_images_per_s.notna()]
    smallest = measured.groupby(SERIES).world_size.min().rename("reference_world_size").reset_index()
    with_reference = trials.merge(smallest, on=SERIES, how="left")
    at_reference = with_reference[with_reference.world_size == with_reference.reference_world_size]
    reference = at_reference.groupby(SERIES).throughput_images_per_s.median().rename("_reference").reset_index()
    joined = with_reference.merge(reference, on=SERIES, how="left")
    speedup = joined.throughput_images_per_s / joined._reference
    return joined.drop(columns="_reference").assign(
        speedup=speedup, efficiency=speedup * joined.reference_world_size / joined.world_size
    )


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
    _need(trials, [*SERIES, "efficiency", "local_typical_s", "local_max_s", "resident_s", "whole_s", "exchange_s"])
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


def with_devices(trials: pd.DataFrame, devices: pd.DataFrame) -> pd.DataFrame:
    """Add what the devices did while the windows were timed.

    device_busy and device_busy_p95 (means over devices), sm_active, throttled_s (of the worst device), energy_j, and
    with it joules_per_image and images_per_s_per_w. Energy is that of the trial's GPUs; of a trial on CPU, that of its
    hosts' processors and memory. None where a device's is not known: the rest would not be all.
    """
    _need(devices, ["trial", "rank", "phase", "window", "busy", "energy_j"])
    sizes = trials[["trial", "device", "world_size", "nodes"]]
    measured = devices[devices.phase == "measure"].merge(sizes, on="trial")
    of_ranks = measured["rank"].notna()
    did = (
        measured[of_ranks & measured.window.isna()]
        .groupby("trial")
        .agg(
            device_busy=("busy", "mean"),
            device_busy_p95=("busy_p95", "mean"),
            sm_active=("sm_active", "mean"),
            throttled_s=("throttled_s", "max"),
        )
    )
    windows = measured[(of_ranks == (measured.device == "gpu")) & measured.window.notna()]
    energy = windows.groupby("trial").agg(
        energy_j=("energy_j", "sum"),
        known=("energy_j", "count"),
        of_devices=("world_size", "first"),
        of_hosts=("nodes", "first"),
        device=("device", "first"),
        windows=("window", "nunique"),
    )
    owners = energy.of_devices.where(energy.device == "gpu", energy.of_hosts)
    complete = energy.energy_j.where(energy.known == owners * energy.windows)
    joined = trials.join(did, on="trial").join(complete, on="trial")
    images = joined.global_batch * joined.measured_steps
    return joined.assign(joules_per_image=joined.energy_j / images, images_per_s_per_w=images / joined.energy_j)


def results(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the table others rely on, a row a trial, empty where nothing was measured."""
    return trials.reindex(columns=RESULT_COLUMNS).sort_values(
        ["model", "data", "trainer", "execution", "options", "world_size", "repeat"], ignore_index=True
    )


def points(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a point: medians over its repeats with 95 % bootstrap intervals (_low, _high).

    Efficiency's and speedup's intervals hold the reference's own uncertainty: both are resampled. One repeat has no
    interval, and neither has the reference's efficiency, which is 1 by definition.
    """
    _need(trials, [*POINT, "throughput_images_per_s", "reference_world_size"])
    measured = trials[trials.throughput_images_per_s.notna()]
    groups = measured.groupby(POINT, sort=True)
    table = (
        groups.agg(
            per_device_batch=("per_device_batch", "first"),
            global_batch=("global_batch", "first"),
            nodes=("nodes", "first"),
            reference_world_size=("reference_world_size", "first"),
            repeats=("throughput_images_per_s", "size"),
            throughput_images_per_s=("throughput_images_per_s", "median"),
            step_time_s=("step_time_s", "median"),
            setup_s=("setup_s", "median"),
            first_step_s=("first_step_s", "median"),
            peak_memory_bytes=("peak_memory_bytes", "median"),
            steady=("warm_up_steady", "all"),
            throttled_share=("throttled_share", "max"),
            training_images=("training_images", "first"),
            device_busy=("device_busy", "median"),
            device_busy_p95=("device_busy_p95", "median"),
            sm_active=("sm_active", "median"),
            throttled_s=("throttled_s", "max"),
            joules_per_image=("joules_per_image", "median"),
            images_per_s_per_w=("images_per_s_per_w", "median"),
            slowest_rank=("slowest_rank", _most_frequent),
            slowest_host=("slowest_host", _most_frequent),
            exchange_s=("exchange_s", "median"),
            exchanged_bytes=("exchanged_bytes", "median"),
            exposed_s=("exposed_s", "median"),
            jitter=("jitter", "median"),
            together=("together", "median"),
            within=("within", "median"),
            changed=("changed_at", "count"),
            apart=("apart", "sum"),
        )
        .reset_index()
        .astype({"reference_world_size": int})
    )
    if table.empty:
        return table
    samples = _throughputs(measured)
    own = [samples[tuple(row)] for row in table[POINT].itertuples(index=False)]
    reference = [
        samples[(*tuple(row)[:-1], size)]
        for row, size in zip(table[POINT].itertuples(index=False), table.reference_world_size, strict=True)
    ]
    at_reference = table.world_size == table.reference_world_size
    low, high = median_intervals(own)
    joules_low, joules_high = _intervals_of(measured, table, "joules_per_image")
    causes: dict[str, Any] = {}
    for cause in (*CAUSES, "hidden"):
        causes[cause] = measured.groupby(POINT)[cause].median().to_numpy()
        causes[f"{cause}_low"], causes[f"{cause}_high"] = _intervals_of(measured, table, cause)
    ratio = np.array([np.median(a) / np.median(b) for a, b in zip(own, reference, strict=True)])
    ratio_low, ratio_high = ratio_intervals(own, reference)
    ratio_low[at_reference], ratio_high[at_reference] = np.nan, np.nan
    ideal = table.world_size / table.reference_world_size
    return table.assign(
        **causes,
        joules_per_image_low=joules_low,
        joules_per_image_high=joules_high,
        throughput_low=low,
        throughput_high=high,
        throughput_per_device=table.throughput_images_per_s / table.world_size,
        throughput_per_device_low=low / table.world_size,
        throughput_per_device_high=high / table.world_size,
        speedup=ratio,
        speedup_low=ratio_low,
        speedup_high=ratio_high,
        efficiency=ratio / ideal,
        efficiency_low=ratio_low / ideal,
        efficiency_high=ratio_high / ideal,
    )


def with_warm_up_peaks(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Add warm_up_peak_bytes, the median over a point's repeats, where it is larger than peak_memory_bytes."""
    _need(table, [*POINT, "peak_memory_bytes"])
    peaks = trials.groupby(POINT).warm_up_peak_bytes.median().reset_index()
    joined = table.merge(peaks, on=POINT, how="left")
    larger = joined.warm_up_peak_bytes.astype(float) > joined.peak_memory_bytes
    return joined.assign(warm_up_peak_bytes=joined.warm_up_peak_bytes.where(larger).astype(float))


def costs(table: pd.DataFrame, given: Costs) -> pd.DataFrame:
    """Return a row a point: what a million images cost and emit, and an epoch where its images are known.

    cost = price of a device-hour × devices × hours; its interval is the throughput's. carbon = energy × carbon of a
    kWh, 1 kWh = 3.6e6 J, its interval the energy's. Columns for which nothing is given, or nothing measured, are empty.
    """
    hours = 1e6 / 3600 / table[["throughput_images_per_s", "throughput_low", "throughput_high"]]
    price = np.nan if given.price_per_device_hour is None else given.price_per_device_hour
    carbon = np.nan if given.carbon_g_per_kwh is None else given.carbon_g_per_kwh
    kwh = 1e6 * table[["joules_per_image", "joules_per_image_low", "joules_per_image_high"]] / 3.6e6
    epoch = table.training_images.fillna(np.nan if given.images_per_epoch is None else given.images_per_epoch) / 1e6
    found = table[[*POINT, "repeats"]].assign(
        cost_per_million=price * table.world_size * hours.throughput_images_per_s,
        # The faster, the cheaper.
        cost_per_million_low=price * table.world_size * hours.throughput_high,
        cost_per_million_high=price * table.world_size * hours.throughput_low,
        carbon_g_per_million=carbon * kwh.joules_per_image,
        carbon_g_per_million_low=carbon * kwh.joules_per_image_low,
        carbon_g_per_million_high=carbon * kwh.joules_per_image_high,
    )
    return found.assign(
        cost_per_epoch=found.cost_per_million * epoch, carbon_g_per_epoch=found.carbon_g_per_million * epoch
    )


def comparisons(table: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row for the fastest series against each other one, at each workload and world size.

    ratio is of median throughputs, with its bootstrap interval. `shown` is false where the two throughputs' own
    intervals overlap, and where either was measured once. superiority: see there.
    """
    _need(table, [*POINT, "throughput_low", "throughput_high"])
    samples = _throughputs(trials)
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
    _need(table, POINT)
    by = [*WORK, "world_size", "trainer"]
    table = table[table.groupby(by).series.transform("size") > 1]
    samples = _throughputs(trials[trials.series.isin(table.series)])
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
    _need(table, [*POINT, "first_step_s", "step_time_s", "throughput_low", "throughput_high"])
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
    low, high = _intervals(list(groups), _break_even_steps)
    steps = [float(_break_even_steps(*group, axis=0)) for group in groups]
    return found.assign(break_even_steps=steps, break_even_low=low, break_even_high=high)


def _throughputs(trials: pd.DataFrame) -> dict[Any, NDArray[np.float64]]:
    """Return the throughputs that the repeats of every point measured."""
    measured = trials[trials.throughput_images_per_s.notna()]
    return {key: group.to_numpy() for key, group in measured.groupby(POINT).throughput_images_per_s}


def _intervals_of(
    trials: pd.DataFrame, table: pd.DataFrame, column: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both ends of the interval of a column's median at every point of the table."""
    samples = {key: group.dropna().to_numpy(np.float64) for key, group in trials.groupby(POINT)[column]}
    return median_intervals([samples[tuple(row)] for row in table[POINT].itertuples(index=False)])


def _most_frequent(values: pd.Series) -> Any:
    counts = values.value_counts()
    return counts.index[0] if len(counts) else None


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


def step_time_spread(windows: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a point: 5th, 25th, 50th, 75th and 95th percentile of its windows' step times."""
    joined = windows.merge(trials[["trial", *POINT]], on="trial")
    quantiles = joined.groupby(POINT).step_time_s.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
    return quantiles.set_axis(["p05_s", "p25_s", "p50_s", "p75_s", "p95_s"], axis=1).reset_index()


def phase_times(phases: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a point and phase: the median seconds over its repeats."""
    joined = phases.merge(trials[["trial", *POINT]], on="trial")
    return joined.groupby([*POINT, "phase"], sort=False).seconds.median().reset_index()


def loss_curves(losses: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """Return the losses on real data, each with its point; images counts what all ranks have seen."""
    real = trials[~trials.data.str.startswith("synthetic")]
    return losses.merge(real[["trial", "repeat", *POINT]], on="trial")


def decomposed(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a trial of each series at its largest world size: that of median efficiency, so that its causes add up."""
    largest = trials[
        (trials.world_size == trials.groupby(SERIES).world_size.transform("max"))
        & (trials.world_size > trials.reference_world_size)
        & trials.compute_scaling.notna()
    ]
    rows = [group.sort_values("efficiency").iloc[(len(group) - 1) // 2] for _, group in largest.groupby(SERIES)]
    return pd.DataFrame(rows, columns=trials.columns)


def examples(trials: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Return one trial of each series at its largest world size, the first repeat of it; the usual ways first."""
    largest = trials[trials.world_size == trials.groupby(SERIES).world_size.transform("max")]
    first = largest.sort_values([*WORK, "series", "repeat"]).drop_duplicates(SERIES)
    usual = first.series == first.groupby([*WORK, "trainer"]).series.transform("min")
    return pd.concat([first[usual], first[~usual]]).head(limit)


def most_measured(points: pd.DataFrame, limit: int) -> list[str]:
    """Return the workloads with the most points, in the order of their names: a plot of hundreds shows nothing."""
    by_points = points.groupby("workload").size().sort_values(ascending=False, kind="stable")
    return sorted(by_points.index[:limit])


def coverage(repeats: int) -> float:
    """Return how often the range of so many repeats holds the true median: 1 - 2^(1 - n), for any distribution.

    No interval is wider than the range, so fewer than six repeats cannot reach 95 %.
    (Order statistics: David & Nagaraja 2003, section 7.1.)
    """
    return 1 - 2.0 ** (1 - repeats)


def median_intervals(samples: list[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both ends of every sample's interval of the median, for any distribution; none of a single value.

    Order statistics, interpolated to 95 % (Hettmansperger & Sheather 1986): 94 to 96 % in simulation from six values
    on, where the percentile bootstrap has 91 to 95 %. Fewer values have their range, see `coverage`.
    """
    ends = np.array([_median_interval(np.sort(sample)) for sample in samples]).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


def ratio_intervals(
    above: list[NDArray[np.float64]], below: list[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the percentile-bootstrap interval of every median(above) / median(below) (Efron & Tibshirani 1993).

    Both are resampled independently; in simulation 95 to 98 % hold the truth from six values on.
    """
    return _intervals(
        list(zip(above, below, strict=True)),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
    )


def _median_interval(ordered: NDArray[np.float64]) -> tuple[float, float]:
    count = len(ordered)
    if count < 2:
        return np.nan, np.nan
    inner, share = _order(count)
    low = (1 - share) * ordered[inner - 1] + share * ordered[inner]
    high = (1 - share) * ordered[count - inner] + share * ordered[count - inner - 1]
    return float(low), float(high)


@lru_cache(maxsize=256)
def _order(count: int) -> tuple[int, float]:
    """Return which value from either end, from 1, and how far on to the next, holds the median 95 % of the time."""
    held = 1 - 2 * binom.cdf(np.arange(count // 2), count, 0.5)
    inner = int((held >= CONFIDENCE).sum())
    if inner == 0:
        return 1, 0.0
    beyond = held[inner] if inner < len(held) else 0.0
    part = (held[inner - 1] - CONFIDENCE) / (held[inner - 1] - beyond)
    return inner, float((count - inner) * part / (inner + (count - 2 * inner) * part))


def superiority(above: NDArray[np.float64], below: NDArray[np.float64]) -> float:
    """Return the share of pairs of runs in which that of `above` is the faster, ties half (Vargha & Delaney 2000)."""
    return float((1 + np.sign(above[:, None] - below)).mean() / 2)


def _intervals(
    samples: list[tuple[NDArray[np.float64], ...]], statistic: Callable[..., NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bootstrap all samples of the same sizes in one go; no interval where one of them has a single value."""
    low, high = np.full(len(samples), np.nan), np.full(len(samples), np.nan)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        by_size.setdefault(tuple(map(len, sample)), []).append(index)
    for sizes, rows in by_size.items():
        if min(sizes) < 2:
            continue
        stacked = tuple(np.stack([samples[row][part] for row in rows]) for part in range(len(sizes)))
        interval = bootstrap(
            stacked,
            statistic,
            axis=1,
            n_resamples=_RESAMPLES,
            batch=100,
            confidence_level=CONFIDENCE,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(0),
        ).confidence_interval
        low[rows], high[rows] = interval.low, interval.high
    return low, high


def _need(frame: pd.DataFrame, columns: list[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"the data frame has no column {', '.join(missing)}; it has {', '.join(frame.columns)}")
