"""Wait for child processes without taking time from what is measured, and end them whole."""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

# When one has failed the others get so long to fail by themselves, so that their logs say what they saw.
_GRACE_S = 3.0
_TICK_S = 0.5


def wait_for(
    started: list[subprocess.Popen[bytes]], deadline_s: float, tick: Callable[[], None]
) -> tuple[bool, int | None]:
    """Sleep until every rank has ended, one has failed and the others had their grace, or the deadline is over.

    Returns whether the deadline was over, and the first rank that failed.
    """
    ends_s = time.monotonic() + deadline_s
    first_failed: int | None = None
    with selectors.DefaultSelector() as selector:
        # Process descriptors wake this process up when a rank ends: to poll would take time from the ranks.
        for index, process in enumerate(started):
            selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, index)
        try:
            while selector.get_map():
                left_s = ends_s - time.monotonic()
                if left_s <= 0:
                    return first_failed is None, first_failed
                for key, _ in selector.select(min(_TICK_S, left_s)):
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    if first_failed is None and _failed(started[key.data]):
                        first_failed = key.data
                        ends_s = min(ends_s, time.monotonic() + _GRACE_S)
                tick()
        finally:
            for key in list(selector.get_map().values()):
                os.close(key.fd)
    return False, first_failed


def _failed(process: subprocess.Popen[bytes]) -> bool:
    """Return how a rank that has ended did so, and leave it to be reaped: until then its group keeps its number."""
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended.si_code != os.CLD_EXITED or ended.si_status != 0


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a rank's group, data loaders included, and reap it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
