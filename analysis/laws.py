"""Scaling laws fitted to what was measured, and the world sizes that the measurements recommend.

Throughput on n devices, x that of one:
    Amdahl     x n / (1 + s (n - 1))                  s: the share that does not run in parallel (Amdahl 1967)
    Gustafson  x (n - s (n - 1))                      s: that share of the work that grows with n (Gustafson 1988)
    USL        x n / (1 + s (n - 1) + k n (n - 1))    s: contention, k: coherency (Gunther, Guerrilla Capacity Planning,
                                                      2007): past sqrt((1 - s) / k) devices more of them are slower
Each is linear in its coefficients when it is written for n / throughput or for throughput, so a fit is a non-negative
least squares of relative errors. Intervals come from resampling the repeats of every world size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from scalestudy.analysis.intervals import CONFIDENCE
from scalestudy.analysis.metrics import SERIES

Values = NDArray[np.float64]

# No prediction past so many times the largest size that was measured.
FURTHEST = 4
_RESAMPLES = 199
# The one parameter that is no share, and what is as good as a whole.
_SCALE, _WHOLE = "one_device", 1 - 1e-6
# Two laws whose criterion differs by less are as good as each other (Burnham & Anderson 2002, section 2.6).
_AS_GOOD = 2.0


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law: `terms` of n whose sum with coefficients is n / throughput, or throughput where not `inverse`."""

    name: str
    terms: Callable[[Values], Values]
    inverse: bool
    # Of the coefficients: the throughput of one device, then shares.
    parameters: Callable[[Values], dict[str, float]]

    def fit(self, sizes: Values, throughputs: Values) -> Values:
        """Return the coefficients, none below zero: no law says that devices gain by being more."""
        target = sizes / throughputs if self.inverse else throughputs
        coefficients: Values = nnls(self.terms(sizes) / target[:, None], np.ones(len(target)))[0]
        coefficients[0] = max(coefficients[0], np.finfo(float).tiny)
        return coefficients

    def throughput(self, sizes: Values, coefficients: Values) -> Values:
        """Return what the law says of these sizes."""
        total = self.terms(sizes) @ coefficients
        return sizes / total if self.inverse else total


LAWS = (
    Law(
        name="Amdahl",
        terms=lambda n: np.stack([np.ones_like(n), n - 1], axis=1),
        inverse=True,
        parameters=lambda c: {"one_device": 1 / c[0], "serial": c[1] / c[0]},
    ),
    Law(
        name="Gustafson",
        terms=lambda n: np.stack([n, np.ones_like(n)], axis=1),
        inverse=False,
        parameters=lambda c: {"one_device": c.sum(), "serial": c[1] / c.sum()},
    ),
    Law(
        name="USL",
        terms=lambda n: np.stack([np.ones_like(n), n - 1, n * (n - 1)], axis=1),
        inverse=True,
        parameters=lambda c: {"one_device": 1 / c[0], "contention": c[1] / c[0], "coherency": c[2] / c[0]},
    ),
)


def fits(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a series and law that can be fitted: with one world size more than it has coefficients.

    parameters, and intervals of each, NaN from one repeat; rms_residual, the typical relative error of the fit; aicc,
    Akaike's criterion for small samples N ln(RSS / N) + 2 k + 2 k (k + 1) / (N - k - 1), the variance among the k
    (Hurvich & Tsai 1989), of the laws' errors of log throughput; best: the lowest, and those as good as it.
    predictions: world_size, throughput, low, high, up to 4 times the largest measured. reason: why a law is none of the
    best however well it fits, a share of it being at the end of what a share can be.
    """
    rows = []
    for key, group in trials[trials.throughput_images_per_s.notna()].groupby(SERIES, sort=True):
        sizes, throughputs = (
            group[column].to_numpy(np.float64) for column in ("world_size", "throughput_images_per_s")
        )
        possible = [law for law in LAWS if len(np.unique(sizes)) > law.terms(sizes).shape[1]]
        found = [_fitted(law, sizes, throughputs) for law in possible]
        lowest = min((row["aicc"] for row in found if row["reason"] is None), default=np.nan)
        series = dict(zip(SERIES, key, strict=True))
        rows += [series | row | {"best": row["reason"] is None and row["aicc"] <= lowest + _AS_GOOD} for row in found]
    columns = [*SERIES, "law", "parameters", "intervals", "rms_residual", "aicc", "predictions", "reason", "best"]
    return pd.DataFrame(rows, columns=columns)


def recommendations(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return a row a series: the measured world size to take, by three criteria.

    efficient: the largest on which every size up to it keeps `threshold` of the reference's throughput per device,
    efficient_surely where the interval's lower end does too. cheapest: least device-time an image. fastest: highest
    throughput. Of sizes whose intervals overlap that of the best, `cheapest_also` and `fastest_also` list the others.
    """
    rows = []
    for key, group in table.groupby(SERIES, sort=True):
        line = group.sort_values("world_size")
        reference = line.world_size == line.reference_world_size
        kept, surely = (
            line.world_size[(column.ge(threshold) | reference).cummin()].max()
            for column in (line.efficiency, line.efficiency_low)
        )
        cheapest, cheapest_also = _best(line, "throughput_per_device")
        fastest, fastest_also = _best(line, "throughput", "throughput_images_per_s")
        rows.append(
            dict(zip(SERIES, key, strict=True))
            | {
                "measured": line.world_size.tolist(),
                "efficient": int(kept),
                "efficient_surely": int(surely),
                "cheapest": cheapest,
                "cheapest_also": cheapest_also,
                "fastest": fastest,
                "fastest_also": fastest_also,
            }
        )
    return pd.DataFrame(rows)


def _fitted(law: Law, sizes: Values, throughputs: Values) -> dict[str, Any]:
    coefficients = law.fit(sizes, throughputs)
    residuals = np.log(throughputs) - np.log(law.throughput(sizes, coefficients))
    count, fitted = len(throughputs), len(coefficients) + 1
    squares = max(float(np.sum(residuals**2)), 1e-300)
    correction = 2 * fitted * (fitted + 1) / (count - fitted - 1) if count > fitted + 1 else np.inf
    at: Values = np.unique(np.round(np.geomspace(sizes.min(), FURTHEST * sizes.max(), 60)))
    parameters = law.parameters(coefficients)
    intervals: dict[str, Any] = dict.fromkeys(parameters, (np.nan, np.nan))
    ends: Values = np.full((2, len(at)), np.nan)
    if count > len(np.unique(sizes)):
        rng = np.random.default_rng(0)
        drawn = [law.fit(sizes, resampled(sizes, throughputs, rng)) for _ in range(_RESAMPLES)]
        tails = 100 * np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        by_name = {name: _possible(name, [law.parameters(one)[name] for one in drawn]) for name in parameters}
        intervals = {name: tuple(np.percentile(values, tails).tolist()) for name, values in by_name.items()}
        ends = np.percentile([law.throughput(at, one) for one in drawn], tails, axis=0)
    predicted = law.throughput(at, coefficients)
    return {
        "law": law.name,
        "parameters": {name: float(value) for name, value in parameters.items()},
        "intervals": intervals,
        "rms_residual": float(np.sqrt(squares / count)),
        "aicc": count * np.log(squares / count) + 2 * fitted + correction,
        "reason": _at_an_edge(parameters),
        "predictions": pd.DataFrame({"world_size": at, "throughput": predicted, "low": ends[0], "high": ends[1]}),
    }


def _at_an_edge(parameters: dict[str, float]) -> str | None:
    """Return why a law says nothing here: the fit has run into the end of what one of its shares can be."""
    for name, value in parameters.items():
        if name != _SCALE and not value < _WHOLE:
            return f"{name} would be 1 or more: throughput does not grow with devices as this law has it"
    return None


def _possible(name: str, values: list[float]) -> Values:
    """Return a parameter's draws, those of a share cut off at 1."""
    return np.array(values) if name == _SCALE else np.minimum(values, 1.0)


def resampled(sizes: Values, values: Values, rng: np.random.Generator) -> Values:
    """Return as many repeats of every world size, drawn from its own."""
    drawn = np.empty_like(values)
    for size in np.unique(sizes):
        own = sizes == size
        drawn[own] = rng.choice(values[own], own.sum())
    return drawn


def _best(line: pd.DataFrame, column: str, value: str | None = None) -> tuple[int, list[int]]:
    """Return the world size with the highest value, and those that are not shown to be lower."""
    values = line[value or column]
    best = values.idxmax()
    lowest = line[f"{column}_low"].fillna(values)[best]
    also = line.world_size[(line[f"{column}_high"].fillna(values) >= lowest) & (line.index != best)]
    return int(line.world_size[best]), also.astype(int).tolist()
