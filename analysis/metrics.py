"""Data frames to metrics: throughput, speedup, efficiency and their intervals over repeats."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scalestudy.analysis.intervals import median_intervals, ratio_intervals
from scalestudy.trainers.record import Costs

# What must be the same before two series are set against each other.
WORK = ["workload", "scaling", "device", "launcher"]
# A series is a line in a plot: one trainer, run in one way, doing one work at several world sizes.
SERIES = [*WORK, "trainer", "execution", "options", "series"]
POINT = [*SERIES, "world_size"]

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
    "waiting",
    "communication",
    "input",
    "unexplained",
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


def with_throughput(trials: pd.DataFrame) -> pd.DataFrame:
    """Add throughput_images_per_s, global batch × steps over the slowest rank's time, and step_time_s."""
    need(trials, ["global_batch", "measured_steps", "measured_s"])
    return trials.assign(
        throughput_images_per_s=trials.global_batch * trials.measured_steps / trials.measured_s,
        step_time_s=trials.measured_s / trials.measured_steps,
    )


def with_efficiency(trials: pd.DataFrame) -> pd.DataFrame:
    """Add reference_world_size, speedup and efficiency against the reference, see `references`.

    speedup(n) = throughput(n) / median throughput(reference); efficiency(n) = speedup(n) / (n / reference): throughput
    per device over that at the reference, for sizes below it too. In weak and in strong scaling alike, since throughput
    counts images, not steps.
    """
    need(trials, [*POINT, "throughput_images_per_s"])
    with_reference = trials.merge(references(trials), on=SERIES, how="left")
    at_reference = with_reference[with_reference.world_size == with_reference.reference_world_size]
    reference = at_reference.groupby(SERIES).throughput_images_per_s.median().rename("_reference").reset_index()
    joined = with_reference.merge(reference, on=SERIES, how="left")
    speedup = joined.throughput_images_per_s / joined._reference
    return joined.drop(columns="_reference").assign(
        speedup=speedup, efficiency=speedup * joined.reference_world_size / joined.world_size
    )


def references(trials: pd.DataFrame) -> pd.DataFrame:
    """Return each measured series with its reference_world_size, one for all series of a workload that has one.

    The smallest size that all of them measured and go beyond: on one axis two references would show two equal trainers
    as unequal. Where there is none, and of a series measured on one size alone, its own smallest.
    """
    measured = trials[trials.throughput_images_per_s.notna()]
    sizes = measured.drop_duplicates(POINT)[POINT]
    own = sizes.groupby(SERIES).world_size.agg(["min", "max"]).reset_index()
    scaling = own[own["min"] < own["max"]]
    shared = sizes.merge(scaling, on=SERIES)
    shared = shared[shared.world_size < shared["max"]]
    by_all = shared.groupby([*WORK, "world_size"]).size().rename("count").reset_index()
    by_all = by_all.merge(scaling.groupby(WORK).size().rename("of").reset_index(), on=WORK)
    common = by_all[by_all["count"] == by_all["of"]].groupby(WORK).world_size.min().rename("common").reset_index()
    found = own.merge(common, on=WORK, how="left")
    smallest = found["common"].where(found["min"] < found["max"]).fillna(found["min"]).astype(np.int64)
    return found[SERIES].assign(reference_world_size=smallest)


def with_devices(trials: pd.DataFrame, devices: pd.DataFrame) -> pd.DataFrame:
    """Add what the devices did while the windows were timed.

    device_busy and device_busy_p95 (means over devices), sm_active, throttled_s (of the worst device), energy_j, and
    with it joules_per_image and images_per_s_per_w. Energy is that of the trial's GPUs; of a trial on CPU, that of its
    hosts' processors and memory. None where a device's is not known: the rest would not be all.
    """
    need(devices, ["trial", "rank", "phase", "window", "busy", "energy_j"])
    sizes = trials[["trial", "device", "world_size", "nodes"]]
    used = ["trial", "rank", "window", "busy", "busy_p95", "sm_active", "throttled_s", "energy_j"]
    measured = devices.loc[devices.phase == "measure", used].merge(sizes, on="trial")
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
    need(trials, [*POINT, "throughput_images_per_s", "reference_world_size"])
    measured = trials[trials.throughput_images_per_s.notna()]
    measured = measured.assign(moved=measured.changed_at.notna() | measured.drifted_by.notna())
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
            within=("within", "median"),
            changed=("moved", "sum"),
            apart=("apart", "sum"),
        )
        .reset_index()
        .astype({"reference_world_size": int})
    )
    if table.empty:
        return table
    samples = {key: sample.to_numpy() for key, sample in throughputs(measured).items()}
    own = [samples[tuple(row)] for row in table[POINT].itertuples(index=False)]
    reference = [
        samples[(*tuple(row)[:-1], size)]
        for row, size in zip(table[POINT].itertuples(index=False), table.reference_world_size, strict=True)
    ]
    at_reference = table.world_size == table.reference_world_size
    low, high = median_intervals(own)
    joules_low, joules_high = intervals_of(measured, table, "joules_per_image")
    ratio = np.array([np.median(a) / np.median(b) for a, b in zip(own, reference, strict=True)])
    ratio_low, ratio_high = ratio_intervals(own, reference)
    ratio_low[at_reference], ratio_high[at_reference] = np.nan, np.nan
    ideal = table.world_size / table.reference_world_size
    return table.assign(
        joules_per_image_low=joules_low,
        joules_per_image_high=joules_high,
        reference_repeats=[len(sample) for sample in reference],
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
    need(table, [*POINT, "peak_memory_bytes"])
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


def throughputs(trials: pd.DataFrame, by: list[str] = POINT) -> dict[Any, pd.Series]:
    """Return the throughputs that every point measured, each indexed by repeat."""
    measured = trials[trials.throughput_images_per_s.notna()].set_index("repeat").sort_index()
    return dict(iter(measured.groupby(by, sort=True).throughput_images_per_s))


def intervals_of(
    trials: pd.DataFrame, table: pd.DataFrame, column: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both ends of the interval of a column's median at every point of the table."""
    samples = {key: group.dropna().to_numpy(np.float64) for key, group in trials.groupby(POINT)[column]}
    return median_intervals([samples[tuple(row)] for row in table[POINT].itertuples(index=False)])


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


def headings(rows: pd.DataFrame) -> dict[tuple[str, ...], str]:
    """Return in words every WORK there is; device and launcher are named where the rows have several."""
    keys = [tuple(key) for key in rows[WORK].drop_duplicates().itertuples(index=False)]
    _, _, devices, launchers = (set(values) for values in zip(*keys, strict=True)) if keys else [set()] * len(WORK)
    return {
        key: f"{key[0]}, {key[1]} scaling"
        + (f", on {key[2].upper()}s" if len(devices) > 1 else "")
        + (f", launched by {key[3]}" if len(launchers) > 1 else "")
        for key in keys
    }


def devices(count: int) -> str:
    """Return a number of devices in words."""
    return f"{count} device{'s' if count > 1 else ''}"


def need(frame: pd.DataFrame, columns: list[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"the data frame has no column {', '.join(missing)}; it has {', '.join(frame.columns)}")
