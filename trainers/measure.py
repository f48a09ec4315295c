"""The measuring loop, the same for every trainer: warm-up until it is seen to end, then synchronized windows."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
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
# The input is drained no longer than so much of a limit: the rest of it is for windows.
_DRAIN_SHARE = 0.5
# A window of a part is so much shorter than a timed one, and there are so many more of them: what disturbs one of them
# then decides nothing.
_TURNS_A_WINDOW = 3
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
    exchange: list[Window] = field(default_factory=list)
    local_step_times_s: list[float] = field(default_factory=list)


def measure(
    trainer: Trainer,
    plan: Measurement,
    progress: Callable[[Measured], None],
    begin: Callable[[], None] = lambda: None,
    *,
    warm_up_min_s: float = 0.0,
) -> Measured:
    """Warm up and take the timed windows, after one first step; every rank decides alike, by its slowest.

    `begin` is called between the two. The plan's limits hold for draining the input and windows together; one window is
    timed in any case.
    """
    seen = Measured()
    least_s = min(warm_up_min_s, plan.warm_up_max_s)
    steps_taken = 1
    seen.losses.append(_loss_point(trainer, steps_taken))
    # What was read ahead while the first step compiled would pass for the speed of the input.
    drained, drained_s = _drain(trainer, plan.warm_up_max_s * _DRAIN_SHARE)
    steps_taken += drained

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
    while not (seen.warm_up_steady and spent_s >= least_s) and drained_s + spent_s < plan.warm_up_max_s:
        taken, step_s = window(steps)
        seen.warm_up_windows.append(taken)
        steps_s.append(step_s)
        spent_s += step_s * steps
        seen.warm_up_steady = steady(steps_s)
        steps = steps_for(plan.window_s * _WARM_UP_SHARE, step_s)
        progress(seen)

    # The first steps are slow, and while they last the queue fills anew.
    drained, spent_s = _drain(trainer, plan.measure_max_s * _DRAIN_SHARE)
    steps_taken += drained
    seen.warm_up_memory = trainer.memory()
    # The first steps hold what no later one does, above all the workspaces of every algorithm that cuDNN tries.
    trainer.reset_peaks()
    begin()
    # What that takes is not the same on every rank.
    trainer.max_over_ranks(0.0)
    steps = steps_for(plan.window_s, min(steps_s[-_WARM_UP_SPAN:])) if steps_s else 1
    while len(seen.windows) < plan.windows and (not seen.windows or spent_s < plan.measure_max_s):
        taken, step_s = window(steps)
        seen.windows.append(taken)
        spent_s += step_s * steps
        progress(seen)
    seen.memory = trainer.memory()
    return seen


def measure_causes(
    trainer: Trainer,
    windows: int,
    steps: int,
    *,
    resident: bool,
    alone: bool,
    seed: int = 0,
    drain_max_s: float = math.inf,
) -> Causes:
    """Time the parts of a step, in windows that take turns; the training is afterwards where it was before.

    Whole: the step. Resident: that on a batch which lies on the device, as all do of data that are `resident`. Local:
    the same with nothing exchanged. Exchange: as much as a step exchanges and no step, unless the device is `alone`.
    They take as long as so many `windows` of so many `steps` of each, in an order that is balanced and drawn by `seed`;
    the whole step in a row before the others, since what a loader gives has a history; before it the input is drained,
    no longer than `drain_max_s`.
    Then local steps one by one, all ranks beginning each together: what of their jitter is common to all ranks shows.
    """
    seen = Causes()
    parts = [(seen.resident, trainer.resident_step), (seen.local, trainer.local_step)]
    if not alone and trainer.exchanged_bytes() is not None:
        parts += [(seen.exchange, trainer.exchange_step)]
    # Of a single turn nobody could be chosen by the others.
    turns, of_a_turn = max(2, windows * min(_TURNS_A_WINDOW, steps)), math.ceil(steps / _TURNS_A_WINDOW)
    put_back = trainer.kept()

    def take(step: Callable[[], None], steps: int) -> Window:
        trainer.max_over_ranks(0.0)
        return timed_window(trainer, steps, step)

    try:
        if not resident:
            # While parameters were checked and tested the loader has filled its queue.
            _drain(trainer, drain_max_s)
            seen.whole += [take(trainer.step, steps) for _ in range(windows)]
        for index in range(_CAUSES_WARM_UP):
            for _, step in parts:
                # The first ones trace, compile and fill caches.
                take(step, 1 + index)
        for order in balanced_orders(len(parts), turns, seed):
            for taken, step in (parts[part] for part in order):
                taken.append(take(step, of_a_turn))
        for _ in range(min(max(windows * steps, _FEWEST_SINGLE_STEPS), _MOST_SINGLE_STEPS)):
            trainer.max_over_ranks(0.0)
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


def balanced_orders(count: int, turns: int, seed: int) -> Iterator[list[int]]:
    """Yield an order of so many parts for every turn: each part comes equally often at each place and after each other.

    Rows of Williams' design (1949), of an odd count with those read backwards, drawn without replacement and relabelled
    at random; a last design that is not used up is balanced as far as it goes.
    """
    rng = random.Random(seed)
    rows: list[list[int]] = []
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    for _ in range(turns):
        if not rows:
            names = rng.sample(range(count), count)
            rows = [[names[(part + shift) % count] for part in zigzag] for shift in range(count)]
            rows += [row[::-1] for row in rows] if count % 2 else []
            rng.shuffle(rows)
        yield rows.pop()


def _drain(trainer: Trainer, max_s: float) -> tuple[int, float]:
    """Take what the input may have ready, then as many steps; return how many of these, and the slowest rank's seconds.

    Loaders that began together give their batches in bursts. After an empty queue the first burst is waited for, also
    by steps that are slower than their input: with so many steps that is over. After `max_s` no more is taken: a queue
    that is waited for is empty.
    """
    ahead, steps = trainer.batches_ahead(), 0
    began_s, spent_s = now_s(), 0.0
    for place in range(2 * ahead):
        if spent_s >= max_s:
            break
        if place < ahead:
            trainer.next_batch()
        else:
            trainer.step()
            steps += 1
        # All ranks must agree when to stop.
        spent_s = trainer.max_over_ranks(now_s() - began_s)
    return steps, spent_s


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
