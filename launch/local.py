"""The local launcher: every rank a process in its own group on this host."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from scalestudy.cluster.claims import Claim
from scalestudy.cluster.host import Topology, local_topology
from scalestudy.cluster.network import joined, loopback
from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.launch.children import ask_for_stacks, kill_group, wait_for
from scalestudy.launch.launcher import Exit, Program, processes, worker_command, worker_variables
from scalestudy.trainers.pinning import holder_of, trial_claims
from scalestudy.trainers.trial import Trial

_TICK_S = 0.5


class LocalLauncher:
    """Ranks on this host; `programs` has what runs a trainer that has its own environment."""

    name = "local"
    elastic = False

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self._programs = programs
        self._topology = local_topology()

    def capacity(self) -> Topology:
        return self._topology

    def scheduler(self) -> dict[str, str]:
        return {}

    def resume(self, *, advanced: bool) -> None:
        return None

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        ranks = local_ranks(processes(trial))
        with claimed(trial_claims(trial, ranks, os.environ), folder, tick):
            return self._run(trial, ranks, folder, deadline_s, tick)

    def _run(
        self, trial: Trial, ranks: Sequence[Rank], folder: Path, deadline_s: float, tick: Callable[[], None]
    ) -> Exit:
        host = loopback()
        addresses = [joined(host, port) for port in free_ports(len(ranks), host)]
        argv = worker_command(self._programs.get(trial.trainer, sys.executable), trial, folder)
        started: list[subprocess.Popen[bytes]] = []
        # The ranks' stdin, their lifeline.
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
            timed_out, first_failed = wait_for(started, deadline_s, tick)
            if timed_out:
                ask_for_stacks(started)
        finally:
            for process in started:
                kill_group(process)
            os.close(our_end)
            os.close(ranks_end)
        return Exit(tuple(process.returncode for process in started), timed_out, first_failed)


@contextmanager
def claimed(names: Sequence[str], folder: Path, tick: Callable[[], None]) -> Iterator[None]:
    """Hold CPUs and GPUs for the trial in a folder, and wait, saying so, while other trials have some of them."""
    claim = Claim(holder_of(folder))
    said = None
    while (other := claim.take(names)) is not None:
        if other != said:
            print(f"waiting for this host's devices: {other}, has some of them", file=sys.stderr, flush=True)
            said = other
        time.sleep(_TICK_S)
        tick()
    try:
        yield
    finally:
        claim.release()


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


def environment(inherited: Mapping[str, str], trial: Trial, rank: Rank, addresses: list[str]) -> dict[str, str]:
    """Return one rank's environment: who it is, where the others are, and how many threads it may use."""
    return {
        **inherited,
        **rank_environ(rank, addresses),
        **worker_variables(inherited, trial, rank.world_size),
        "GLOO_SOCKET_IFNAME": "lo",
    }
