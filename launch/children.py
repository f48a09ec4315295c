"""Wait for child processes without taking time from what is measured, and end them whole."""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from scalestudy.trainers.standing import STACKS_SIGNAL, STACKS_WAIT_S

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
    # A thread for each rank sleeps until the kernel wakes it: polling would take time from the ranks, and process
    # descriptors do not exist everywhere (RHEL 8's kernel, some containers, some builds of Python).
    ended: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
    for index, process in enumerate(started):
        threading.Thread(target=_tell, args=(process.pid, index, ended), daemon=True).start()
    running = len(started)
    while running:
        left_s = ends_s - time.monotonic()
        if left_s <= 0:
            return first_failed is None, first_failed
        with suppress(queue.Empty):
            index, failed = ended.get(timeout=min(_TICK_S, left_s))
            running -= 1
            if failed and first_failed is None:
                first_failed = index
                ends_s = min(ends_s, time.monotonic() + _GRACE_S)
        tick()
    return False, first_failed


def _tell(pid: int, index: int, ended: queue.SimpleQueue[tuple[int, bool]]) -> None:
    """Tell how a rank ended, and leave it to be reaped: until then its group keeps its number."""
    # Once the deadline is over whoever kills the rank also reaps it, and nobody waits for this any more.
    with suppress(ChildProcessError):
        how = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert how is not None
        ended.put((index, how.si_code != os.CLD_EXITED or how.si_status != 0))


def ask_for_stacks(started: Iterable[subprocess.Popen[bytes]]) -> None:
    """Have ranks write to their logs where they stand, before they are killed."""
    for process in started:
        # The group: a container may stand between us and the rank. Its number is kept until the process is reaped.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, STACKS_SIGNAL)
    time.sleep(STACKS_WAIT_S)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a rank's group, data loaders included, and reap it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
