"""Sweeps of all-reduces to bandwidths, and the latency and bandwidth that describe them.

With t the seconds of an all-reduce of `size` bytes over n devices, as nccl-tests has it (its PERFORMANCE.md):
    algorithm bandwidth  size / t
    bus bandwidth        size / t × 2 (n - 1) / n: what every link of a ring carries, whatever n
    model                t = latency + size / bandwidth (Hockney 1994), least squares of relative errors
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from scalestudy.analysis import figures
from scalestudy.analysis.canvas import as_svg
from scalestudy.analysis.frames import read_records, trial_row
from scalestudy.analysis.intervals import CONFIDENCE, median_intervals
from scalestudy.analysis.laws import Values, resampled
from scalestudy.trainers.files import COLLECTIVES, DamagedError, record_paths
from scalestudy.trainers.record import Record

# One line in a plot: one trainer's collective among as many devices, placed alike.
LINE = ["launcher", "device", "trainer", "series", "world_size", "nodes", "devices_per_node"]
_RESAMPLES = 199


@dataclass(frozen=True, kw_only=True)
class Written:
    """A row a line, see `fits`, the plot of them where there is anything to draw, and records that cannot be read."""

    fits: pd.DataFrame
    figure: Path | None
    damaged: Sequence[DamagedError]


def write(out: Path) -> Written:
    """Write collectives.csv, collectives.parquet and the plot from a study's sweeps."""
    damaged: list[DamagedError] = []
    table = read(out, damaged)
    table.to_csv(out / "collectives.csv", index=False)
    table.to_parquet(out / "collectives.parquet", index=False)
    found = fits(table)
    figure = out / "figures" / "collectives.svg" if len(table) else None
    if figure:
        figure.parent.mkdir(exist_ok=True)
        figure.write_bytes(as_svg(figures.collectives(points(table), found)))
    return Written(fits=found, figure=figure, damaged=damaged)


def read(out: Path, damaged: list[DamagedError] | None = None) -> pd.DataFrame:
    """Return a row a sweep and size: `LINE`, repeat, size_bytes, time_s and the two bandwidths.

    Records that cannot be read are added to `damaged`.
    """
    records = read_records(record_paths(out / COLLECTIVES), [] if damaged is None else damaged)
    rows = [row for record in records if record.outcome == "ok" for row in _rows(record)]
    table = pd.DataFrame(rows, columns=[*LINE, "trial", "repeat", "size_bytes", "time_s"])
    algorithm = table.size_bytes / table.time_s
    return table.assign(
        algorithm_bytes_per_s=algorithm, bus_bytes_per_s=algorithm * 2 * (table.world_size - 1) / table.world_size
    )


def points(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a line and size: medians over repeats with 95 % bootstrap intervals (_low, _high)."""
    groups = table.groupby([*LINE, "size_bytes"], sort=True)
    found = groups[["time_s", "algorithm_bytes_per_s", "bus_bytes_per_s"]].median().reset_index()
    for column in ("time_s", "bus_bytes_per_s"):
        low, high = median_intervals([group.to_numpy(np.float64) for _, group in groups[column]])
        found = found.assign(**{f"{column}_low": low, f"{column}_high": high})
    return found


def fits(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a line: latency_s and bandwidth_bytes_per_s with intervals (_low, _high; none from one repeat).

    Both are NaN where the times tell nothing of them: small messages that take no longer than their size says, or large
    ones that take no longer than small ones.
    rms_residual is the typical relative error of the two-parameter model; best_bus_bytes_per_s the highest median bus
    bandwidth, best_size_bytes where it was.
    """
    medians = points(table)
    rows: list[dict[str, Any]] = []
    for key, group in table.groupby(LINE, sort=True):
        sizes, times = group.size_bytes.to_numpy(np.float64), group.time_s.to_numpy(np.float64)
        latency_s, s_per_byte = _fit(sizes, times)
        ends = np.full((2, 2), np.nan)
        if len(sizes) > len(np.unique(sizes)):
            rng = np.random.default_rng(0)
            drawn = [_fit(sizes, resampled(sizes, times, rng)) for _ in range(_RESAMPLES)]
            # One draw that tells nothing leaves an end unknown.
            ends = np.percentile(drawn, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)], axis=0)
            ends[ends <= 0] = np.nan
        own = medians[(medians[LINE] == list(key)).all(axis=1)]
        best = own.loc[own.bus_bytes_per_s.idxmax()]
        rows.append(
            dict(zip(LINE, key, strict=True))
            | {
                "latency_s": latency_s or np.nan,
                "latency_s_low": ends[0, 0],
                "latency_s_high": ends[1, 0],
                "bandwidth_bytes_per_s": 1 / (s_per_byte or np.nan),
                "bandwidth_bytes_per_s_low": 1 / ends[1, 1],
                "bandwidth_bytes_per_s_high": 1 / ends[0, 1],
                "rms_residual": float(np.sqrt(np.mean(((latency_s + sizes * s_per_byte) / times - 1) ** 2))),
                "best_bus_bytes_per_s": float(best.bus_bytes_per_s),
                "best_size": figures.bytes_in_words(int(best.size_bytes)),
                "repeats": group.trial.nunique(),
            }
        )
    return pd.DataFrame(rows)


def _rows(record: Record) -> list[dict[str, Any]]:
    row = trial_row(record.trial) | {"launcher": record.environment.launcher}
    by_rank = [report.collectives for report in record.reports]
    rows = []
    for at_size in zip(*by_rank, strict=True):
        windows = np.array([one.windows for one in at_size], dtype=np.float64)
        # Slowest rank, as everywhere; then the window in the middle.
        seconds = ((windows[:, :, 1] - windows[:, :, 0]) / windows[:, :, 2]).max(axis=0)
        rows.append(row | {"size_bytes": at_size[0].size_bytes, "time_s": float(np.median(seconds))})
    return rows


def _fit(sizes: Values, times: Values) -> Values:
    """Return latency and seconds a byte, neither below zero; 0 where the times tell nothing of it."""
    terms = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    found: Values = nnls(terms, np.ones_like(times))[0]
    return found
