"""The measuring loop, the same for every trainer: warm-up until it is seen to end, then synchronized windows."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

from scalestudy.cluster.clock import now_s
from scalestudy.trainers.record import LossPoint, Memory, Window
from scalestudy.trainers.trainer import Trainer
from scalestudy.trainers.trial import Measurement

# The warm-up is watched in windows a quarter as long as the timed ones, and is over when the median step of the
# last four is within 5 % of that of the four before them.
_WARM_UP_SHARE = 0.25
_WARM_UP_SPAN = 4
_WARM_UP_TOLERANCE = 0.05
_CAUSES_WARM_UP = 3
# Local steps that are timed one by one: enough for how they spread, few enough for a record.
_FEWEST_SINGLE_STEPS, _MOST_SINGLE_STEPS = 10, 100


@dataclass
class Measured:
    """What the loop saw, raw."""

    warm_up_windows: list[Window] = field(default_factory=list)
    warm_up_steady: bool = False
    windows: list[Window] = field(default_factory=list)
    losses: list[LossPoint] = field(default_factory=list)
    # Peaks up to the end of the warm-up, and in the timed windows.
    warm_up_memory: Memory | None = None
    memory: Memory | None = None


@dataclass
class Causes:
    """The windows of a step's parts, raw."""

    whole: list[Window] = field(default_factory=list)
    resident: list[Window] = field(default_factory=list)
    local: list[Window] = field(default_factory=list)
    input: list[Window] = field(default_factory=list)
    exchange: list[Window] = field(default_factory=list)
    local_step_times_s: list[float] = field(default_factory=list)


def measure(
    trainer: Trainer, plan: Measurement, progress: Callable[[Measured], None], begin: Callable[[], None] = lambda: None
) -> Measured:
    """Warm up and take the timed windows, after one first step; every rank decides alike, by its slowest.

    `begin` is called between the two.
    """
    seen = Measured()
    steps_taken = 1
    seen.losses.append(_loss_point(trainer, steps_taken))

    def window(steps: int) -> tuple[Window, float]:
        """Return this rank's window and the slowest rank's seconds a step."""
        nonlocal steps_taken
        taken = timed_window(trainer, steps)
        steps_taken += steps
        seen.losses.append(_loss_point(trainer, steps_taken))
        # A barrier too: the next window starts on all ranks together.
        return taken, trainer.max_over_ranks(taken.end_s - taken.start_s) / steps

    steps, spent_s = 1, 0.0
    steps_s: list[float] = []
    while not seen.warm_up_steady and spent_s < plan.warm_up_max_s:
        taken, step_s = window(steps)
        seen.warm_up_windows.append(taken)
        steps_s.append(step_s)
        spent_s += step_s * steps
        seen.warm_up_steady = steady(steps_s)
        steps = steps_for(plan.window_s * _WARM_UP_SHARE, step_s)
        progress(seen)

    seen.warm_up_memory = trainer.memory()
    # The first steps hold what no later one does, above all the workspaces of every algorithm that cuDNN tries.
    trainer.reset_peaks()
    begin()
    # What that takes is not the same on every rank.
    trainer.max_over_ranks(0.0)
    steps = steps_for(plan.window_s, min(steps_s[-_WARM_UP_SPAN:])) if steps_s else 1
    spent_s = 0.0
    while len(seen.windows) < plan.windows and spent_s < plan.measure_max_s:
        taken, step_s = window(steps)
        seen.windows.append(taken)
        spent_s += step_s * steps
        progress(seen)
    seen.memory = trainer.memory()
    return seen


def measure_causes(trainer: Trainer, windows: int, steps: int, *, resident: bool, alone: bool) -> Causes:
    """Time the parts of a step, in windows that take turns; the training is afterwards where it was before.

    Whole: the step. Resident: that on a batch which lies on the device, as all do of data that are `resident`. Local:
    the same with nothing exchanged. Input: a batch and no step. Exchange: as much as a step exchanges and no step,
    unless the device is `alone`. Then local steps one by one, for how they spread.
    """
    seen = Causes()
    parts = [(seen.resident, trainer.resident_step), (seen.local, trainer.local_step)]
    if not resident:
        parts += [(seen.whole, trainer.step), (seen.input, trainer.next_batch)]
    if not alone and trainer.exchanged_bytes() is not None:
        parts += [(seen.exchange, trainer.exchange_step)]
    put_back = trainer.kept()
    try:
        for index in range(_CAUSES_WARM_UP + windows):
            for taken, step in parts:
                # The first ones trace, compile and fill caches.
                window = timed_window(trainer, steps if index >= _CAUSES_WARM_UP else 1 + index, step)
                trainer.max_over_ranks(0.0)
                if index >= _CAUSES_WARM_UP:
                    taken.append(window)
        for _ in range(min(max(windows * steps, _FEWEST_SINGLE_STEPS), _MOST_SINGLE_STEPS)):
            window = timed_window(trainer, 1, trainer.local_step)
            # Of a nanosecond nothing is known.
            seen.local_step_times_s.append(round(window.end_s - window.start_s, 9))
    except BaseException:
        # The first error is the one to tell.
        with suppress(Exception):
            put_back()
        raise
    put_back()
    return seen


def steady(steps_s: Sequence[float]) -> bool:
    """Return whether the median step time has stopped moving: the last four windows against the four before."""
    if len(steps_s) < 2 * _WARM_UP_SPAN:
        return False
    late, early = median(steps_s[-_WARM_UP_SPAN:]), median(steps_s[-2 * _WARM_UP_SPAN : -_WARM_UP_SPAN])
    return abs(late / early - 1) <= _WARM_UP_TOLERANCE


def steps_for(window_s: float, step_s: float) -> int:
    """Return how many steps last at least `window_s`."""
    return max(1, math.ceil(window_s / step_s))


def _loss_point(trainer: Trainer, step: int) -> LossPoint:
    loss = trainer.loss()
    return LossPoint(step, loss if math.isfinite(loss) else None)


def timed_window(trainer: Trainer, steps: int, step: Callable[[], None] | None = None) -> Window:
    """Take so many steps, those of training if not others, the device idle at both ends."""
    step = step or trainer.step
    trainer.synchronize()
    start_s, device_s = now_s(), trainer.device_timer()
    for _ in range(steps):
        step()
    by_device_s = device_s()
    trainer.synchronize()
    return Window(start_s, now_s(), steps, by_device_s)
