"""Shares in words: what would lie outside 0 to 100 % is no share, and is not shown as one.

Efficiency and its factors are ratios to the reference: above 1 they say that something was gained.
"""

import math

NOT_SHOWN = "–"
# A clock's tick or the rounding of a mean may push a share so far past its end.
_ROUNDING = 0.005


def share(value: float | None, digits: int = 0) -> str:
    """Return a part of a whole as a percentage."""
    if value is None or not -_ROUNDING <= value <= 1 + _ROUNDING:
        return NOT_SHOWN
    return f"{min(max(value, 0.0), 1.0):.{digits}%}"


def ends(low: float, high: float, digits: int = 0) -> str | None:
    """Return a share's interval, cut off where no share can be; None where there is none."""
    if math.isnan(low) or math.isnan(high):
        return None
    low, high = (min(max(end, 0.0), 1.0) for end in (low, high))
    return f"{low:.{digits}%} – {high:.{digits}%}"


def ratio(value: float, low: float = math.nan, high: float = math.nan, digits: int = 0) -> tuple[str, str]:
    """Return a ratio and its interval: what is above 100 % as a multiple, all else as percentages."""

    def told(number: float) -> str:
        above = number >= 1 + 0.5 * 10 ** -(digits + 2)
        return f"{number:.{digits + 2}f}×" if above else f"{number:.{digits}%}"

    return told(value), f"{told(low)}–{told(high)}"


def give_or_take(value: float | None) -> str:
    """Return half an interval's width, as a share of the value; one wider than the value itself says nothing of it."""
    if value is None or math.isnan(value):
        return NOT_SHOWN
    return f"± {value:.1%}" if value <= 1 else "over ± 100%"


def off_by(value: float, digits: int = 0) -> str:
    """Return a relative error."""
    return f"{value:.{digits}%}" if value <= 1 else "over 100%"
