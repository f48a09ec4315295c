"""The one clock of windows, phases and samples: seconds since the Unix epoch, never running backwards."""

import time

# Read once, so that a clock set in mid-run bends nothing. On Linux `perf_counter` is the same in every process of a
# host: one that is given another's EPOCH_S tells the same time.
EPOCH_S = time.time() - time.perf_counter()


def now_s() -> float:
    """Return the seconds since the Unix epoch."""
    return EPOCH_S + time.perf_counter()
