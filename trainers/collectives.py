"""The sweep of a framework's own all-reduce over message sizes, checked and timed in synchronized windows."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from scalestudy.trainers.measure import steps_for, timed_window
from scalestudy.trainers.record import Collective
from scalestudy.trainers.trainer import AllReduce, Trainer
from scalestudy.trainers.trial import Sweep

_FLOAT_BYTES = 4
_WARM_UP = 2
# Sums of so small whole numbers are exact in float32, in whatever order they are added.
_PATTERN = 251


def sizes_bytes(plan: Sweep) -> Iterator[int]:
    """Yield the sizes of messages, each `factor` times the one before."""
    size = plan.smallest_bytes
    while size <= plan.largest_bytes:
        yield size
        size *= plan.factor


def sweep(trainer: Trainer, plan: Sweep, world_size: int) -> tuple[Collective, ...]:
    """Check and time an all-reduce of every size; raises ValueError where a sum is wrong."""
    return tuple(_timed(trainer, plan, size, world_size) for size in sizes_bytes(plan))


def pattern(rank: int, count: int) -> NDArray[np.float32]:
    """Return a rank's message: whole numbers, another at every place and rank."""
    period = ((np.arange(_PATTERN) + rank) % _PATTERN).astype(np.float32)
    # Whole numbers of the message's length would take six times its memory, and a message may be a gigabyte.
    return np.tile(period, -(-count // _PATTERN))[:count]


def _timed(trainer: Trainer, plan: Sweep, size_bytes: int, world_size: int) -> Collective:
    count = size_bytes // _FLOAT_BYTES
    _check(trainer.all_reduce(lambda rank: pattern(rank, count)), count, world_size)
    # Zeros stay zeros where the sum takes the message's place, however often.
    reduce = trainer.all_reduce(lambda _: np.zeros(count, np.float32))
    seconds = 0.0
    for _ in range(_WARM_UP):
        window = timed_window(trainer, 1, reduce)
        seconds = trainer.max_over_ranks(window.end_s - window.start_s)
    times = steps_for(plan.window_s, seconds)
    windows = []
    for _ in range(plan.windows):
        windows.append(timed_window(trainer, times, reduce))
        # A barrier: the next window starts on all ranks together.
        trainer.max_over_ranks(0.0)
    return Collective(size_bytes, tuple(windows))


def _check(reduce: AllReduce, count: int, world_size: int) -> None:
    reduce()
    expected = np.zeros(count, np.float32)
    for rank in range(world_size):
        expected += pattern(rank, count)
    for got in reduce.sums():
        if wrong := int((got != expected).sum()):
            raise ValueError(
                f"all-reduce of {count * _FLOAT_BYTES} bytes: {wrong} of {count} sums are wrong, "
                f"the first at place {int((got != expected).argmax())}"
            )
