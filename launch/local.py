"""The local launcher: every rank a process in its own group on this host."""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from scalestudy.cluster.host import Topology, local_topology
from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.launch.launcher import Exit, processes
from scalestudy.trainers.trial import Device, Trial

LOOPBACK = "127.0.0.1"
# When one rank has failed the others get so long to fail by themselves, so that their logs say what they saw.
_GRACE_S = 3.0
_TICK_S = 0.5


class LocalLauncher:
    """Ranks on this host; `interpreters` names the Python of a trainer that has its own environment."""

    name = "local"

    def __init__(self, device: Device, interpreters: Mapping[str, str]) -> None:
        self._device = device
        self._interpreters = interpreters

    def capacity(self) -> Topology:
        return local_topology(self._device)

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        ranks = local_ranks(processes(trial))
        addresses = [f"{LOOPBACK}:{port}" for port in free_ports(len(ranks), LOOPBACK)]
        argv = command(self._interpreters.get(trial.trainer, sys.executable), folder)
        started: list[subprocess.Popen[bytes]] = []
        # The ranks' stdin: it closes when this process ends, however it ends, and they end with it.
        ranks_end, our_end = os.pipe()
        try:
            for rank in ranks:
                with (folder / f"rank-{rank.rank}.log").open("wb") as log:
                    started.append(
                        subprocess.Popen(
                            argv,
                            env=environment(os.environ, trial, rank, addresses),
                            stdin=ranks_end,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            timed_out, first_failed = _wait(started, deadline_s, tick)
        finally:
            for process in started:
                _kill_group(process)
            os.close(our_end)
            os.close(ranks_end)
        return Exit(tuple(process.returncode for process in started), timed_out, first_failed)


def local_ranks(count: int) -> list[Rank]:
    """Return the ranks of one host."""
    return [
        Rank(
            rank=i,
            world_size=count,
            local_rank=i,
            local_world_size=count,
            node_rank=0,
            host=os.uname().nodename,
        )
        for i in range(count)
    ]


def command(interpreter: str, folder: Path) -> list[str]:
    """Return the worker's command line."""
    return [interpreter, "-m", "scalestudy.trainers.worker", str(folder)]


def environment(inherited: Mapping[str, str], trial: Trial, rank: Rank, addresses: list[str]) -> dict[str, str]:
    """Return one rank's environment: who it is, where the others are, and how many threads it may use."""
    threads = str(trial.threads_per_device * (trial.world_size // rank.world_size))
    return {
        # Frameworks' chatter; an INFO line a step would be part of what is measured.
        "TF_CPP_MIN_LOG_LEVEL": "1",
        **inherited,
        **rank_environ(rank, addresses),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
        "SCALESTUDY_LIFELINE": "stdin",
        "SCALESTUDY_STARTED_S": repr(time.time()),
    }


def _wait(
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


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a rank's group, data loaders included, and reap it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
