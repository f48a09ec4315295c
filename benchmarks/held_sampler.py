"""A telemetry sampler that takes part in some windows and is stopped in the others."""

import os
import signal
from pathlib import Path

import psutil

from scalestudy.cluster.telemetry import Sampling, Telemetry


class HeldSampler:
    """The sampler of a node, which `hold` stops and `go_on` continues."""

    def __init__(self, folder: Path, node_rank: int, rate_hz: float) -> None:
        before = {child.pid for child in psutil.Process().children()}
        self._sampling = Sampling(folder, node_rank, "here", rate_hz)
        [self._pid] = {child.pid for child in psutil.Process().children()} - before

    def hold(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        spent = psutil.Process(self._pid).cpu_times()
        return float(spent.user + spent.system)

    def stop(self) -> Telemetry:
        """End it and return what it says of its samples."""
        self.go_on()
        return self._sampling.stop()
