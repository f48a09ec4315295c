"""Scaling laws fitted to what was measured, and the world sizes that the measurements recommend.

Device-seconds an image on n devices, n / throughput, as a sum of terms with coefficients of zero or more:
    Amdahl              c + s (n - 1)                    s / c: the share that does not run in parallel (Amdahl 1967)
    node step           c + x where n > a node           x: what an exchange between nodes adds to a step, once
    USL                 c + s (n - 1) + k n (n - 1)      contention and coherency (Gunther, Guerrilla Capacity Planning,
                                                         2007): past sqrt((1 - s) / k) devices more of them are slower
    Amdahl, node step, and USL, node step: the terms of both
In strong scaling a step's added seconds are shared by no more images, so that x counts n times.

The evidence on a law is the medians of the world sizes: more repeats make a median surer, not a law truer. A fit is a
non-negative least squares of the medians' relative errors, and its intervals are those of linear regression (Draper &
Smith 1998, section 3.1) with as many degrees of freedom as there are sizes more than coefficients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import fdtri, stdtrit

from scalestudy.analysis.intervals import CONFIDENCE
from scalestudy.analysis.metrics import SERIES
from scalestudy.analysis.shares import off_by

Values = NDArray[np.float64]

# No prediction past so many times the largest size that was measured; where the band is too wide there, past the next.
REACHES = (4, 2)
# Twice the devices bring at most twice the throughput: a band wider than that cannot tell whether they bring anything.
WIDEST = 2.0
# A law that misses the largest size by more, when fitted without it, is not believed on four times as many devices.
LARGEST_MISS = 0.1
# A law that is further from the medians than so many times their own error does not describe them, nor does one that
# is further than this, however large their error is.
_MOST_NOISES, _FURTHEST = 3.0, 0.1
# A curve is drawn through so many sizes at most.
_PLACES = 60
# Nearer than this is exact.
_EXACT = 1e-9
# The parameter that is no share of one device's time, that which may be more than all of it, and a whole.
_SCALE, _STEP, _WHOLE = "one_device", "node_step", 1 - 1e-6


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law: `terms` of n and of what a step between nodes adds, and the names of their coefficients over the first."""

    name: str
    terms: Callable[[Values, Values], list[Values]]
    shares: tuple[str, ...]

    def is_within(self, other: "Law") -> bool:
        """Whether the other law is this one with terms more."""
        # Contention is the serial share of Amdahl's law by another name.
        own, others = ({"contention" if name == "serial" else name for name in law.shares} for law in (self, other))
        return own < others


# The simplest first.
LAWS = (
    Law(name="Amdahl", terms=lambda n, _: [n - 1], shares=("serial",)),
    Law(name="node step", terms=lambda _, step: [step], shares=(_STEP,)),
    Law(name="USL", terms=lambda n, _: [n - 1, n * (n - 1)], shares=("contention", "coherency")),
    Law(name="Amdahl, node step", terms=lambda n, step: [n - 1, step], shares=("serial", _STEP)),
    Law(
        name="USL, node step",
        terms=lambda n, step: [n - 1, n * (n - 1), step],
        shares=("contention", "coherency", _STEP),
    ),
)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """The medians of one series, how many devices a node has, and the relative error of a median by its repeats."""

    sizes: Values
    throughputs: Values
    devices_per_node: float
    strong: bool
    noise: float

    @property
    def largest(self) -> float:
        return float(self.sizes[-1])

    @property
    def on_several_nodes(self) -> int:
        return int(np.sum(self.sizes > self.devices_per_node))

    def terms(self, law: Law, sizes: Values) -> Values:
        """Return a row of terms a size."""
        step = np.where(sizes > self.devices_per_node, sizes if self.strong else 1.0, 0.0)
        return np.stack([np.ones_like(sizes), *law.terms(sizes, step)], axis=1, dtype=np.float64)

    def describes(self, fit: "_Fit") -> bool:
        """Whether a fit is as near to the medians as their own error allows, of which one repeat tells nothing."""
        allowed = _FURTHEST if np.isnan(self.noise) else min(_MOST_NOISES * max(self.noise, _EXACT), _FURTHEST)
        return fit.rms_residual <= allowed


@dataclass(frozen=True, kw_only=True)
class _Fit:
    law: Law
    coefficients: Values
    # Terms over device-seconds, a row a size: their sum with the coefficients is 1 where the fit is exact.
    design: Values
    noise: float

    @property
    def freedom(self) -> int:
        sizes, terms = self.design.shape
        return int(sizes - terms)

    @cached_property
    def squares(self) -> float:
        return float(np.sum((self.design @ self.coefficients - 1) ** 2))

    @property
    def rms_residual(self) -> float:
        return float(np.sqrt(self.squares / self.freedom)) if self.freedom else np.inf

    @cached_property
    def covariance(self) -> Values:
        """Of the coefficients, over the square of the relative error."""
        return np.linalg.pinv(self.design.T @ self.design).astype(np.float64)

    @property
    def error(self) -> float:
        """Half of a 95 % interval in relative errors: a law that meets the medians by luck is not surer than they."""
        quantile = float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2))
        return quantile * max(self.rms_residual, float(np.nan_to_num(self.noise)))

    def throughput(self, line: _Line, sizes: Values) -> Values:
        values: Values = sizes / (line.terms(self.law, sizes) @ self.coefficients)
        return values

    def interval(self, line: _Line, sizes: Values) -> tuple[Values, Values]:
        """Return both ends for the median of another study, from 0 to infinity where nothing is known."""
        if not self.freedom:
            return np.zeros_like(sizes), np.full_like(sizes, np.inf)
        terms = line.terms(self.law, sizes)
        seconds = terms @ self.coefficients
        half = self.error * np.sqrt(np.einsum("ij,jk,ik->i", terms, self.covariance, terms) + seconds**2)
        with np.errstate(divide="ignore"):
            return sizes / np.maximum(seconds + half, 0), sizes / np.maximum(seconds - half, 0)

    def parameters(self) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Return each parameter and its interval, by the delta method."""
        first, *rest = self.coefficients
        names = (_SCALE, *self.law.shares)
        values = dict(zip(names, (float(value) for value in (1 / first, *(one / first for one in rest))), strict=True))
        gradients = np.eye(len(names)) / first
        gradients[:, 0] = [-1 / first**2, *(-one / first**2 for one in rest)]
        halves = self.error * np.sqrt(np.diag(gradients @ self.covariance @ gradients.T))
        return values, {
            name: (max(value - half, 0.0), min(value + half, np.inf if name in (_SCALE, _STEP) else 1.0))
            for (name, value), half in zip(values.items(), halves.tolist(), strict=True)
        }


def fits(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row a series: the law that describes its medians, and how far it may be believed.

    law: of those that are within three times the medians' own error, and 10 %, the simplest that is not shown to be
    worse than one which contains it (F test of nested models at 5 %, Draper & Smith 1998, section 6.2), of as simple
    ones the nearest. Not by AICc, which is not defined for as few medians as are ever measured, nor by cross-
    validation, which has one or two of them to go by. Empty where no law has one size more than coefficients, or none
    is near enough; `no_law` says which.
    parameters and their intervals; rms_residual, the relative error of the fit by its degrees of freedom; noise, that
    of a median by its repeats, pooled over sizes, NaN from one repeat.
    left_out_size, left_out_error: by how much of the truth the law misses the largest size when fitted without it.
    predictions: world_size, throughput, low, high, up to `reach` devices. Past what was measured the interval is as
    wide as that of every law near enough, its coefficients of either sign: benchmarks/extrapolations.py says how often
    it holds the truth. why_no_further: why `reach` is not four times the largest size.
    devices_per_node: past as many there are several nodes.
    Reads SERIES, world_size, devices_per_node and throughput_images_per_s.
    """
    measured = trials[trials.throughput_images_per_s.notna()]
    sizes = (
        measured.assign(log=np.log(measured.throughput_images_per_s.astype(float)))
        .groupby([*SERIES, "world_size"], sort=True)
        .agg(
            throughput=("throughput_images_per_s", "median"),
            repeats=("log", "size"),
            variance=("log", "var"),
            devices_per_node=("devices_per_node", "max"),
        )
        .reset_index()
    )
    rows = [
        dict(zip(SERIES, key, strict=True))
        | {"devices_per_node": group.devices_per_node.max()}
        | _described(_line(group))
        for key, group in sizes.groupby(SERIES, sort=True)
    ]
    return pd.DataFrame(rows, columns=[*SERIES, "devices_per_node", *_UNKNOWN])


def recommendations(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return a row a series: the measured world size to take, by two criteria.

    efficient: the largest on which every size up to it keeps `threshold` of the reference's throughput per device,
    efficient_surely where the interval's lower end does too. fastest: highest throughput; `fastest_also` lists the
    sizes whose intervals overlap that of the fastest.
    """
    rows = []
    for key, group in table.groupby(SERIES, sort=True):
        line = group.sort_values("world_size")
        past = line[line.world_size >= line.reference_world_size]
        reference = past.world_size == past.reference_world_size
        kept, surely = (
            past.world_size[(column.ge(threshold) | reference).cummin()].max()
            for column in (past.efficiency, past.efficiency_low)
        )
        best = line.throughput_images_per_s.idxmax()
        low, high = (line[f"throughput_{end}"].fillna(line.throughput_images_per_s) for end in ("low", "high"))
        also = line.world_size[(high >= low[best]) & (line.index != best)]
        rows.append(
            dict(zip(SERIES, key, strict=True))
            | {
                "measured": line.world_size.tolist(),
                "efficient": int(kept),
                "efficient_surely": int(surely),
                "fastest": int(line.world_size[best]),
                "fastest_also": also.astype(int).tolist(),
            }
        )
    return pd.DataFrame(rows)


_UNKNOWN: dict[str, Any] = {
    "law": "",
    "no_law": "",
    "parameters": {},
    "intervals": {},
    "rms_residual": np.nan,
    "noise": np.nan,
    "left_out_size": np.nan,
    "left_out_error": np.nan,
    "predictions": None,
    "reach": np.nan,
    "why_no_further": "",
}


def _line(sizes: pd.DataFrame) -> _Line:
    repeats = sizes.repeats.to_numpy()
    freedom = repeats.sum() - len(repeats)
    pooled = float(sizes.variance.fillna(0) @ (repeats - 1)) / freedom if freedom else np.nan
    return _Line(
        sizes=sizes.world_size.to_numpy(np.float64),
        throughputs=sizes.throughput.to_numpy(np.float64),
        devices_per_node=float(sizes.devices_per_node.max()),
        strong=sizes.scaling.iloc[0] == "strong",
        # The variance of a median of normal values is pi / 2 of their mean's.
        noise=float(np.sqrt(np.pi / 2 * pooled * np.mean(1 / repeats))),
    )


def _fit(law: Law, line: _Line, *, without_largest: bool = False, signed: bool = False) -> _Fit:
    """Fit a law, its coefficients of zero or more unless `signed`."""
    kept = slice(-1 if without_largest else None)
    sizes = line.sizes[kept]
    design = line.terms(law, sizes) / (sizes / line.throughputs[kept])[:, None]
    solve: Callable[..., Any] = np.linalg.lstsq if signed else nnls
    return _Fit(law=law, coefficients=solve(design, np.ones(len(sizes)))[0], design=design, noise=line.noise)


def _described(line: _Line) -> dict[str, Any]:
    """Return what is said of one series beside its key."""
    possible = [_fit(law, line) for law in LAWS if _can_be_fitted(law, line)]
    sound = [fit for fit in possible if _at_an_edge(fit) is None]
    near = [fit for fit in sound if line.describes(fit)]
    if not near:
        return _UNKNOWN | {"noise": line.noise, "no_law": _why_none(possible, sound, line)}
    best = _simplest(near, line)
    others = [_fit(fit.law, line, signed=True) for fit in possible]
    believed = [best, *(fit for fit in others if line.describes(fit))]
    left_out = _fit(best.law, line, without_largest=True)
    reach, why_no_further = _reach(believed, line, left_out)
    parameters, intervals = best.parameters()
    return _UNKNOWN | {
        "law": best.law.name,
        "parameters": parameters,
        "intervals": intervals,
        "rms_residual": best.rms_residual,
        "noise": line.noise,
        "left_out_size": int(line.largest),
        "left_out_error": _missed(left_out, line),
        "predictions": _predictions(best, believed, line, reach),
        "reach": int(reach),
        "why_no_further": why_no_further,
    }


def _why_none(possible: list[_Fit], sound: list[_Fit], line: _Line) -> str:
    if not possible:
        return "too few world sizes"
    if not sound:
        return str(_at_an_edge(possible[0]))
    nearest = min(sound, key=lambda fit: fit.rms_residual)
    return (
        f"no law describes these sizes: the nearest, {nearest.law.name}, is off by {off_by(nearest.rms_residual, 1)}, "
        + (
            "and one repeat tells no noise"
            if np.isnan(line.noise)
            else f"where the repeats' noise is {off_by(line.noise, 1)}"
        )
    )


def _can_be_fitted(law: Law, line: _Line) -> bool:
    """Whether there is a size more than coefficients, and for a step at the node two sizes on either side of it."""
    if len(line.sizes) <= 1 + len(law.shares):
        return False
    sides = (line.on_several_nodes, len(line.sizes) - line.on_several_nodes)
    return _STEP not in law.shares or min(sides) >= 2


def _at_an_edge(fit: _Fit) -> str | None:
    """Return why a law says nothing here: the fit has run into the end of what one of its shares can be."""
    first, *rest = fit.coefficients
    for name, coefficient in zip(fit.law.shares, rest, strict=True):
        if name != _STEP and not coefficient < _WHOLE * first:
            return f"{name} would be 1 or more: throughput does not grow with devices as this law has it"
    return None


def _simplest(fits: list[_Fit], line: _Line) -> _Fit:
    """Return the fit with the fewest coefficients that none which contains it beats, of several the nearest."""
    in_order = sorted(fits, key=lambda fit: (len(fit.coefficients), fit.squares))
    return next(
        fit
        for fit in in_order
        if not any(_beats(other, fit, line) for other in in_order if fit.law.is_within(other.law))
    )


def _beats(larger: _Fit, fit: _Fit, line: _Line) -> bool:
    more = fit.freedom - larger.freedom
    # Over the medians' own error at least: to be nearer than that is luck.
    variance = max(larger.rms_residual, np.nan_to_num(line.noise), _EXACT) ** 2
    return bool((fit.squares - larger.squares) / more / variance > fdtri(more, larger.freedom, CONFIDENCE))


def _missed(left_out: _Fit, line: _Line) -> float:
    return float(left_out.throughput(line, line.sizes[-1:])[0] / line.throughputs[-1] - 1)


def _reach(believed: list[_Fit], line: _Line, left_out: _Fit) -> tuple[float, str]:
    """Return how many devices may be spoken of, and why not the furthest."""
    largest = line.largest
    furthest, why = REACHES[0] * largest, ""
    if not line.on_several_nodes and line.devices_per_node < furthest:
        furthest, why = line.devices_per_node, "a node ends there, and several were not measured"
    if furthest <= largest:
        return largest, why
    if believed[0].freedom < 2:
        return largest, "so few sizes fit any law"
    if line.on_several_nodes == 1:
        return largest, "one size alone lies on several nodes"
    low, high = left_out.interval(line, line.sizes[-1:])
    if not low[0] <= line.throughputs[-1] <= high[0] or abs(_missed(left_out, line)) > LARGEST_MISS:
        return largest, "that miss is too large"
    for reach in (furthest, *(times * largest for times in REACHES[1:] if times * largest < furthest)):
        low, high = _band(believed, line, np.array([reach]))
        if high[0] <= WIDEST * low[0]:
            return reach, why if reach == furthest else f"its interval there is wider than a factor {WIDEST:g}"
    return largest, f"its interval there is wider than a factor {WIDEST:g}"


def _band(believed: list[_Fit], line: _Line, sizes: Values) -> tuple[Values, Values]:
    """Return the ends of what any of these laws has within its interval."""
    low, high = zip(*(fit.interval(line, sizes) for fit in believed), strict=True)
    return np.min(low, axis=0), np.max(high, axis=0)


def _predictions(best: _Fit, believed: list[_Fit], line: _Line, reach: float) -> pd.DataFrame:
    at: Values = np.unique(np.append(np.round(np.geomspace(line.sizes[0], reach, _PLACES)), line.sizes))
    low, high = best.interval(line, at)
    beyond = at > line.largest
    low[beyond], high[beyond] = _band(believed, line, at[beyond])
    return pd.DataFrame({"world_size": at, "throughput": best.throughput(line, at), "low": low, "high": high})


def resampled(sizes: Values, values: Values, rng: np.random.Generator) -> Values:
    """Return as many repeats of every world size, drawn from its own."""
    drawn = np.empty_like(values)
    for size in np.unique(sizes):
        own = sizes == size
        drawn[own] = rng.choice(values[own], own.sum())
    return drawn
