"""What a t test is able to find: the smallest true difference, and how many repeats find a given one."""

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache

from scipy.optimize import brentq
from scipy.stats import nct, t

from scalestudy.analysis.intervals import CONFIDENCE, FEWEST_REPEATS

# How often a difference is to be found where it is there.
POWER = 0.8
# Of more repeats than this no number is told.
MOST_REPEATS = 1000


@lru_cache(maxsize=2 * MOST_REPEATS)
def standard_errors(degrees: float, claims: int = 1) -> float:
    """Return how many standard errors a true difference must measure to be found in 80 % of studies.

    By a two-sided t test at 5 % with these degrees of freedom, or where it is one of several claims, at their share of
    it (Bonferroni, the hardest step of Holm's); by the noncentral t (Cohen 1988, section 2).
    """
    edge = float(t.isf((1 - CONFIDENCE) / 2 / claims, degrees))
    # The other side's tail is of no weight where the power is high.
    return float(brentq(lambda shift: nct.sf(edge, degrees, shift) - POWER, 0.0, 4 * edge + 4))


def fewest_repeats(seen: Callable[[int], float], wanted: float) -> int | None:
    """Return the fewest repeats, six at least, that see what is wanted; None past `MOST_REPEATS`, or where it is NaN.

    `seen` is the smallest difference that so many see, less of more of them.
    """
    counts = range(FEWEST_REPEATS, MOST_REPEATS + 1)
    place = bisect_left(counts, True, key=lambda repeats: seen(repeats) <= wanted)
    return counts[place] if place < len(counts) else None
