"""A trainer without a framework, for what ranks do around training; run as a program it stands for the worker.

FAKE_FAILURES names what goes wrong, as {"rank": {"method": "how"}}; FAKE_FOLDER is where the ranks meet.
"""

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalestudy.cluster.rank import Rank
from scalestudy.trainers import worker
from scalestudy.trainers.record import Memory
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial

LOG: list[str] = []
REFUSED: list[str] = []


class FakeTrainer:
    """Steps of a millisecond; the allocator's peak is what was held since the last reset."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        self._rank = rank
        self._failures: dict[str, str] = json.loads(os.environ.get("FAKE_FAILURES", "{}")).get(str(rank.rank), {})
        self._meetings = 0
        self._held, self._peak = 1_000, 9_000
        self._go("construct")

    def build(self) -> None:
        self._go("build")

    def step(self) -> None:
        self._go("step")
        time.sleep(0.001)

    def resident_step(self) -> None:
        self._go("resident_step")
        self.max_over_ranks(0.0)

    def local_step(self) -> None:
        self._held, self._peak = 7_000, 7_000
        self._go("local_step")

    def exchange_step(self) -> None:
        self._go("exchange_step")
        self.max_over_ranks(0.0)

    def exchanged_bytes(self) -> int:
        return 4

    def batches_ahead(self) -> int:
        return 2

    def next_batch(self) -> None:
        self._go("next_batch")

    def all_reduce(self, values: Callable[[int], NDArray[np.float32]]) -> "FakeAllReduce":
        return FakeAllReduce(values(self._rank.rank), self._go)

    def kept(self) -> Callable[[], None]:
        self._go("kept")
        return lambda: self._go("put_back")

    def synchronize(self) -> None:
        self._go("synchronize")

    def device_timer(self) -> Callable[[], None]:
        return lambda: None

    def loss(self) -> float:
        return 1.0

    def test_accuracy(self) -> float:
        self._go("test_accuracy")
        return 0.5

    def memory(self) -> Memory:
        return Memory(peak_resident_bytes=1, peak_allocated_bytes=self._peak)

    def reset_peaks(self) -> None:
        self._go("reset_peaks")
        self._peak = self._held

    def replicas(self) -> tuple[Mapping[str, NDArray[np.float32]], ...]:
        self._go("replicas")
        return ({"weight": np.ones(3, np.float32)},)

    def max_over_ranks(self, value: float) -> float:
        self._go("max_over_ranks")
        self._meetings += 1
        if self._rank.world_size == 1:
            return value
        folder = Path(os.environ["FAKE_FOLDER"])
        own = folder / f"{self._rank.rank}"
        own.write_text(repr(value))
        own.rename(folder / f"meeting-{self._meetings}-{self._rank.rank}")
        while len(met := list(folder.glob(f"meeting-{self._meetings}-*"))) < self._rank.world_size:
            time.sleep(0.001)
        return max(float(path.read_text()) for path in met)

    def versions(self) -> dict[str, str]:
        return {}

    def settings(self) -> dict[str, str | int]:
        return {}

    def close(self) -> None:
        self._go("close")

    @staticmethod
    def allocator_summary() -> str:
        return "what is held"

    @staticmethod
    def allocator_refusals() -> int:
        return len(REFUSED)

    def _go(self, method: str) -> None:
        LOG.append(method)
        match self._failures.get(method):
            case "raise":
                raise RuntimeError("it broke")
            case "out of memory":
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            case "crash":
                os.abort()
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                raise SystemExit(5)
            case "hang":
                # Without a signal handler's chance: as a library that holds the interpreter's lock.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                time.sleep(600)
            case "hang in C":
                # With the interpreter's lock held: no other thread of Python's runs.
                lock = ctypes.create_string_buffer(64)
                ctypes.PyDLL(None).pthread_mutex_lock(lock)
                ctypes.PyDLL(None).pthread_mutex_lock(lock)


class FakeAllReduce:
    """Of a rank that is alone."""

    def __init__(self, message: NDArray[np.float32], go: Callable[[str], None]) -> None:
        self._message = message
        self._go = go

    def __call__(self) -> None:
        self._go(f"all_reduce of {len(self._message)}")

    def sums(self) -> list[NDArray[np.float32]]:
        return [self._message]


if __name__ == "__main__":
    TRAINERS["torch-ddp"] = replace(TRAINERS["torch-ddp"], module="__main__", class_name="FakeTrainer")
    worker.CLOSE_LIMIT_S = 1.0
    worker.main()
