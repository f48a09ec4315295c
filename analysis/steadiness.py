"""How steady one trial was: whether its step time moved while timed, which windows lie apart, how sure its mean is."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, t

Values = NDArray[np.float64]

# A change is named that is shown and as large as the one that a warm-up may still have. A step time that still falls
# tells of more to come: a fall of 1 % in 5 s is what is left of one by 30 % with a time constant of 2 minutes.
SIGNIFICANCE, FEWEST_TO_CHANGE, LEAST_CHANGE, LEAST_FALL = 0.05, 8, 0.05, 0.01
# Iglewicz & Hoaglin 1993; of fewer values none can be called apart.
_APART, _FEWEST_TO_BE_APART = 3.5, 5
_DEVIATION_OF_MEDIAN = 1.4826
_MOST_CORRELATED, _FEWEST_FOR_MEAN = 0.95, 4
# Correlations of neighbours for which a movement's false rate is held, and how many series of each tell it.
_CORRELATIONS, _SIMULATED = (0.0, 0.3, 0.6), 2000
# Either side of a change has so many windows: fewer lie apart. More windows than these are taken together.
_FEWEST_ASIDE, _MOST_WINDOWS = 3, 50
_LAST_OF_WARM_UP = 4
# Of what approaches a level, as shares of the windows' span.
_TIME_CONSTANTS = (0.1, 0.2, 0.4, 1.0)


class Movements(NamedTuple):
    """How the step times of every row moved: from the window `at` on, or little by little; p that noise does so.

    Shares, empty where it is the other, and where it is too little to be named; there p is 1.
    """

    at: Values
    changed_by: Values
    drifted_by: Values
    p: Values


class _Fit(NamedTuple):
    """Of every row: the model; the place of its change, 0 of a drift; F, plain and less what correlation feigns."""

    model: Values
    place: NDArray[np.int64]
    plain: Values
    corrected: Values


def steadiness(step_times_s: Sequence[Values], warm_ups_s: Sequence[Values]) -> pd.DataFrame:
    """Return a row a trial of what the step times of its windows, in their order, say of it, and those of its warm-up.

    within: half the 95 % interval of their mean, as a share of it, empty of fewer than 4. changed_at, changed_by: the
    first window of another step time and how much longer it is, as a share. drifted_by: how much longer the last window
    is than the first where step times moved little by little. Both are empty where no movement is shown: of those of
    all trials that are named, 5 % falsely (Benjamini & Hochberg 1995). apart: how many windows lie far from the others.
    """
    found = pd.DataFrame(
        {"within": np.nan, "changed_at": np.nan, "changed_by": np.nan, "drifted_by": np.nan, "apart": 0},
        index=range(len(step_times_s)),
    )
    before = np.array([len(warm_up_s) >= _LAST_OF_WARM_UP for warm_up_s in warm_ups_s], dtype=bool)
    counts = np.array([len(values) for values in step_times_s], dtype=np.int64)
    p = np.ones(len(step_times_s))
    # Rows of one length in one go: a call a trial would take seconds for a thousand.
    for count, warm in sorted(set(zip(counts.tolist(), before.tolist(), strict=True))):
        chosen = np.flatnonzero((counts == count) & (before == warm)).tolist()
        rows = np.stack([step_times_s[index] for index in chosen])
        last = [[np.median(warm_ups_s[index][-_LAST_OF_WARM_UP:])] for index in chosen] if warm else None
        found.loc[chosen, "apart"] = apart(rows).sum(axis=1)
        if count >= _FEWEST_FOR_MEAN:
            found.loc[chosen, "within"] = mean_interval(rows) / rows.mean(axis=1)
        moved = movements(rows, None if last is None else np.array(last))
        found.loc[chosen, ["changed_at", "changed_by", "drifted_by"]] = np.stack(
            [moved.at, moved.changed_by, moved.drifted_by], axis=1
        )
        p[chosen] = moved.p
    if len(found) > 0:
        found.loc[false_discovery_control(p) > SIGNIFICANCE, ["changed_at", "changed_by", "drifted_by"]] = np.nan
    return found


def movements(rows: Values, before: Values | None = None) -> Movements:
    """Return how the step times of every row changed or drifted; `before`, a column, counts as a window before them.

    Two regressions of the logarithms, values far off drawn in: two levels and a line. Of them the better by the
    Bayesian information criterion, a place counted twice (Zhang & Siegmund 2007: it is no regular parameter). F times
    (1 - r) / (1 + r), with r the lag-1 autocorrelation of what is left, against its distribution in autoregressive
    series, see `_of_noise`. By simulation (see the tests) p is below 5 % with a probability of 1 % where windows do not
    depend on each other, and of 5 % where r is 0.6. Permuting blocks does not hold that: 20 windows are too few blocks.
    """
    timed = rows.shape[1]
    whole = rows if before is None else np.concatenate([before, rows], axis=1)
    values, together = _few(whole)
    count, nothing = values.shape[1], np.full(len(rows), np.nan)
    if count < FEWEST_TO_CHANGE:
        return Movements(nothing, nothing, nothing, np.ones(len(rows)))
    # What is timed begins there.
    first = (whole.shape[1] - timed) // together
    values = drawn_in(np.log(np.maximum(values, np.finfo(float).tiny)), LEAST_CHANGE)
    step, drift = _step(values), _drift(values)
    changed = count * (np.log1p(step.plain / (count - 2)) - np.log1p(drift.plain / (count - 2))) > 2 * np.log(count)
    at = np.clip(step.place * together - (whole.shape[1] - timed), 1, timed - 1)
    late = np.arange(timed) >= at[:, None]
    changed_by = _medians(rows, late) / _medians(rows, ~late) - 1
    drifted_by = np.expm1(drift.model[:, -1] - drift.model[:, first])
    # Both were tried: p counts twice.
    p = np.minimum(
        2
        * np.where(
            changed,
            beyond(step.corrected, *_of_noise(_step, count)),
            beyond(drift.corrected, *_of_noise(_drift, count)),
        ),
        1,
    )
    changed &= np.abs(changed_by) >= LEAST_CHANGE
    drifted = ~changed & ((drifted_by >= LEAST_CHANGE) | (drifted_by <= -LEAST_FALL))
    return Movements(
        at=np.where(changed, at, np.nan),
        changed_by=np.where(changed, changed_by, np.nan),
        drifted_by=np.where(drifted, drifted_by, np.nan),
        p=np.where(changed | drifted, p, 1.0),
    )


def mean_interval(rows: Values) -> Values:
    """Return half the width of the mean's 95 % interval; neighbours that are alike count for less than one each.

    Of every row. Effective number of values n (1 - r) / (1 + r) with r the lag-1 autocorrelation, its bias removed
    (Marriott & Pope 1954; Zwiers & von Storch 1995). By simulation it holds the mean 93 to 96 % of the time for r up to
    0.3 at 20 windows and up to 0.6 at 40; of 10 windows with r = 0.6 only 89 %.
    """
    count = rows.shape[-1]
    deviations = rows - rows.mean(axis=-1, keepdims=True)
    squares = (deviations**2).sum(axis=-1)
    # Where all are alike nothing is divided by nothing.
    correlation = (deviations[..., 1:] * deviations[..., :-1]).sum(axis=-1) / np.where(squares > 0, squares, 1)
    correlation = np.clip(correlation + (1 + 4 * correlation) / count, 0.0, _MOST_CORRELATED)
    effective = np.maximum(count * (1 - correlation) / (1 + correlation), 2.0)
    # What values that are alike spread less than independent ones.
    variance = squares / count / (1 - 1 / effective)
    found: Values = t.ppf(0.975, effective - 1) * np.sqrt(variance / effective)
    return found


def apart(rows: Values) -> NDArray[np.bool_]:
    """Return which values of a row lie far from its median: by 3.5 standard deviations, told robustly, and by 5 %."""
    if rows.shape[-1] < _FEWEST_TO_BE_APART:
        return np.zeros(rows.shape, dtype=bool)
    middle = np.median(rows, axis=-1, keepdims=True)
    off = np.abs(rows - middle)
    far = _APART * _DEVIATION_OF_MEDIAN * np.median(off, axis=-1, keepdims=True)
    found: NDArray[np.bool_] = (off > far) & (off > LEAST_CHANGE * middle)
    return found


def drawn_in(rows: Values, least: float = 0.0) -> Values:
    """Return the rows with what lies far from their medians drawn in, no nearer than `least`; and centred."""
    middle = np.median(rows, axis=1, keepdims=True)
    deviation = np.median(np.abs(rows - middle), axis=1, keepdims=True)
    far = np.maximum(_APART * _DEVIATION_OF_MEDIAN * deviation, least)
    near = np.clip(rows - middle, -far, far)
    found: Values = near - near.mean(axis=1, keepdims=True)
    return found


def tail(statistic: Values) -> tuple[float, float]:
    """Return what a statistic of noise exceeds in 5 %, and the power with which it grows rarer beyond (Hill 1975)."""
    critical = float(np.quantile(statistic, 1 - SIGNIFICANCE))
    return critical, 1 / float(np.log(statistic[statistic > critical] / critical).mean())


def beyond(statistic: Values, critical: float, decay: float) -> Values:
    """Return how often noise reaches a statistic, by its `tail`; 1 where more often than in 5 %."""
    found: Values = np.where(statistic > critical, SIGNIFICANCE * np.maximum(statistic / critical, 1) ** -decay, 1.0)
    return found


def _medians(rows: Values, where: NDArray[np.bool_]) -> Values:
    found: Values = np.nanmedian(np.where(where, rows, np.nan), axis=1)
    return found


def _few(rows: Values) -> tuple[Values, int]:
    """Return at most 50 medians of a row's values that follow each other, and of how many each is."""
    together = -(-rows.shape[1] // _MOST_WINDOWS)
    whole = rows[:, : rows.shape[1] // together * together]
    return (np.median(whole.reshape(len(rows), -1, together), axis=2) if together > 1 else rows), together


def _step(rows: Values) -> _Fit:
    """Fit two levels to every centred row."""
    count = rows.shape[1]
    places = np.arange(_FEWEST_ASIDE, count - _FEWEST_ASIDE + 1)
    sums = np.cumsum(rows, axis=1)[:, places - 1]
    explained = sums**2 * count / (places * (count - places))
    best = explained.argmax(axis=1)
    place, total = places[best], np.take_along_axis(sums, best[:, None], axis=1)[:, 0]
    early, late = total / place, -total / (count - place)
    model = np.where(np.arange(count) < place[:, None], early[:, None], late[:, None])
    return _fit(rows, model, place)


def _drift(rows: Values) -> _Fit:
    """Fit a straight line, or an exponential approach to a level if that is nearer, to every centred row."""
    count = rows.shape[1]
    when = np.arange(count) / (count - 1)
    curves = np.stack([when, *(np.exp(-when / tau) for tau in _TIME_CONSTANTS)])
    curves -= curves.mean(axis=1, keepdims=True)
    curves /= np.linalg.norm(curves, axis=1, keepdims=True)
    along = rows @ curves.T
    best = np.abs(along).argmax(axis=1)
    model = np.take_along_axis(along, best[:, None], axis=1) * curves[best]
    return _fit(rows, model, np.zeros(len(rows), dtype=np.int64))


def _fit(rows: Values, model: Values, place: NDArray[np.int64]) -> _Fit:
    count, left = rows.shape[1], rows - model
    # Of values that are all alike nothing is left.
    squares = np.maximum((left**2).sum(axis=1), 1e-24)
    correlation = (left[:, 1:] * left[:, :-1]).sum(axis=1) / squares
    # What two levels or a line take of it, too: the bias of three means (compare `mean_interval`).
    correlation = np.clip(correlation + (3 + 4 * correlation) / count, 0, _MOST_CORRELATED)
    plain = (model**2).sum(axis=1) / squares * (count - 2)
    return _Fit(model, place, plain, plain * (1 - correlation) / (1 + correlation))


@lru_cache(maxsize=2 * _MOST_WINDOWS)
def _of_noise(fit: Callable[[Values], _Fit], count: int) -> tuple[float, float]:
    """Return the largest `tail` over autoregressive series of normal values that depend on each other more or less."""
    noise = np.random.default_rng(0).normal(size=(_SIMULATED, count))
    found = []
    for correlation in _CORRELATIONS:
        series = noise.copy()
        for place in range(1, count):
            series[:, place] *= np.sqrt(1 - correlation**2)
            series[:, place] += correlation * series[:, place - 1]
        found.append(tail(fit(drawn_in(series)).corrected))
    return max(found)
