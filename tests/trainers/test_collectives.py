"""The sweep: which sizes and windows it takes, and that a wrong sum is told."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from scalestudy.trainers.collectives import pattern, sizes_bytes, sweep
from scalestudy.trainers.trial import Sweep


class FakeTrainer:
    """Two ranks in one: sums the messages of both, but for one value of every message longer than `right_up_to`."""

    def __init__(self, right_up_to: int) -> None:
        self.right_up_to = right_up_to

    def all_reduce(self, values: Callable[[int], NDArray[np.float32]]) -> "FakeTrainer":
        self.summed = values(0) + values(1)
        if len(self.summed) > self.right_up_to:
            self.summed[3] += 1
        return self

    def __call__(self) -> None:
        pass

    def sums(self) -> list[NDArray[np.float32]]:
        return [self.summed]

    def synchronize(self) -> None:
        pass

    def device_timer(self) -> Callable[[], float | None]:
        return lambda: None

    def max_over_ranks(self, value: float) -> float:
        return max(value, 2**-13)


def test_a_wrong_sum_is_told_with_its_size_and_place() -> None:
    with pytest.raises(ValueError, match="all-reduce of 64 bytes: 1 of 16 sums are wrong, the first at place 3"):
        sweep(FakeTrainer(8), Sweep(smallest_bytes=16, window_s=1e-4), 2)  # type: ignore[arg-type]


def test_every_size_has_its_windows() -> None:
    plan = Sweep(smallest_bytes=16, largest_bytes=64, window_s=1e-3, windows=3)
    found = sweep(FakeTrainer(2**20), plan, 2)  # type: ignore[arg-type]
    assert [one.size_bytes for one in found] == [16, 32, 64]
    assert [len(one.windows) for one in found] == [3, 3, 3]
    assert {window.steps for one in found for window in one.windows} == {9}


def test_sizes_run_from_the_smallest_to_the_largest() -> None:
    assert list(sizes_bytes(Sweep(smallest_bytes=4, largest_bytes=40))) == [4, 8, 16, 32]


def test_messages_differ_by_rank_and_place_and_sum_exactly() -> None:
    first, second = pattern(0, 1000), pattern(1, 1000)
    assert (first != second).all()
    assert (np.sum([pattern(rank, 1000) for rank in range(512)], axis=0, dtype=np.float64) < 2**24).all()


def test_a_message_takes_little_more_memory_than_it_has_bytes() -> None:
    count = 1_000_000
    tracemalloc.start()
    try:
        message = pattern(1, count)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.nbytes == 4 * count
    assert peak_bytes < 1.1 * message.nbytes
    assert (message == (np.arange(count) + 1) % 251).all()
