import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from scalestudy.cluster.clock import now_s
from scalestudy.trainers.measure import Measured, balanced_orders, measure, measure_causes, steady, steps_for
from scalestudy.trainers.record import Memory
from scalestudy.trainers.trial import Measurement


class Clock:
    """A clock that moves only as a trainer moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("scalestudy.trainers.measure.now_s", clock)
    return clock


class TimedTrainer:
    """A trainer whose steps take known times, three times as long at first and ever shorter; it logs its calls."""

    def __init__(self, clock: Clock, step_s: float, slow_steps: int = 0) -> None:
        self.clock = clock
        self.step_s = step_s
        self.slow_steps = slow_steps
        self.steps = 0
        self.ahead = 0
        self.batch_s = 0.0
        self.log: list[str] = []

    def step(self) -> None:
        self.steps += 1
        self.log.append("step")
        self.clock.now_s += self.step_s * max(1, 3 - 2 * self.steps / max(1, self.slow_steps))

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def device_timer(self) -> Callable[[], float | None]:
        return lambda: None

    def resident_step(self) -> None:
        self.log.append("resident")
        self.clock.now_s += self.step_s

    def local_step(self) -> None:
        self.log.append("local")
        self.clock.now_s += self.step_s

    def exchange_step(self) -> None:
        self.log.append("exchange")
        self.clock.now_s += self.step_s

    def exchanged_bytes(self) -> int:
        return 4

    def batches_ahead(self) -> int:
        return self.ahead

    def next_batch(self) -> None:
        self.log.append("batch")
        self.clock.now_s += self.batch_s

    def kept(self) -> Callable[[], None]:
        self.log.append("kept")
        return lambda: self.log.append("put back")

    def memory(self) -> Memory:
        return Memory(peak_resident_bytes=self.steps)

    def reset_peaks(self) -> None:
        """Nothing is counted here."""

    def loss(self) -> float:
        return float("nan") if self.steps == 1 else 1 / self.steps

    def max_over_ranks(self, value: float) -> float:
        self.log.append("barrier")
        return value


def measured(trainer: TimedTrainer, **plan: float) -> Measured:
    trainer.step()
    return measure(trainer, Measurement(**plan), lambda _: None)  # type: ignore[arg-type]


def test_the_warm_up_lasts_until_steps_are_steady(clock: Clock) -> None:
    seen = measured(TimedTrainer(clock, 0.001, slow_steps=60), window_s=0.02, windows=3, warm_up_max_s=20)
    assert seen.warm_up_steady
    assert sum(window.steps for window in seen.warm_up_windows) >= 40
    assert len(seen.windows) == 3


def test_a_warm_up_that_never_gets_steady_ends_with_its_budget_and_says_so(clock: Clock) -> None:
    seen = measured(TimedTrainer(clock, 0.001), window_s=0.02, windows=1, warm_up_max_s=0.01)
    assert not seen.warm_up_steady
    assert len(seen.windows) == 1


def test_a_warm_up_is_not_over_before_its_least_length(clock: Clock) -> None:
    """Eight windows agree at once, and the step may still become another one."""
    trainer = TimedTrainer(clock, 0.001)
    trainer.step()
    plan = Measurement(window_s=0.02, windows=1, warm_up_max_s=20)
    seen = measure(trainer, plan, lambda _: None, warm_up_min_s=2.0)  # type: ignore[arg-type]
    assert seen.warm_up_steady
    assert 2.0 <= sum(window.end_s - window.start_s for window in seen.warm_up_windows) < 2.1


def test_the_least_length_is_no_more_than_the_most(clock: Clock) -> None:
    trainer = TimedTrainer(clock, 0.001)
    trainer.step()
    plan = Measurement(window_s=0.02, windows=1, warm_up_max_s=1)
    seen = measure(trainer, plan, lambda _: None, warm_up_min_s=10.0)  # type: ignore[arg-type]
    assert sum(window.end_s - window.start_s for window in seen.warm_up_windows) < 1.1


def test_what_was_read_ahead_is_taken_before_the_first_window(clock: Clock) -> None:
    trainer = TimedTrainer(clock, 0.001)
    trainer.ahead = 3
    seen = measured(trainer, window_s=0.01, windows=1, warm_up_max_s=0.1)
    # Once before the warm-up, once before the timed windows; with as many steps the first burst of a loader is over.
    drained = [*["batch", "barrier"] * 3, *["step", "barrier"] * 3]
    assert trainer.log[:14] == ["step", *drained, "synchronize"]
    steps = seen.windows[-1].steps
    timed = ["barrier", "synchronize", *["step"] * steps, "synchronize", "barrier"]
    assert trainer.log[-16 - steps :] == [*drained, *timed]


def test_a_slow_input_is_drained_within_the_limits_and_a_window_is_timed_all_the_same(clock: Clock) -> None:
    """Of a hundred batches that take a second each no more are taken than in half of either limit."""
    trainer = TimedTrainer(clock, 1 / 64)
    trainer.ahead, trainer.batch_s = 100, 1.0
    seen = measured(trainer, window_s=1 / 64, windows=1000, warm_up_max_s=4, measure_max_s=6)
    assert trainer.log.count("batch") == 2 + 3
    # What is left of the limit is for windows.
    assert sum(window.end_s - window.start_s for window in seen.windows) == 3
    trainer = TimedTrainer(clock, 1 / 64)
    trainer.ahead, trainer.batch_s = 100, 10.0
    seen = measured(trainer, window_s=1 / 64, windows=1000, warm_up_max_s=4, measure_max_s=6)
    assert (trainer.log.count("batch"), len(seen.windows)) == (2, 1)


def test_before_the_parts_a_slow_input_is_drained_within_a_limit(clock: Clock) -> None:
    trainer = TimedTrainer(clock, 1 / 64)
    trainer.ahead, trainer.batch_s = 100, 1.0
    measure_causes(trainer, 2, 9, resident=False, alone=True, drain_max_s=3.0)  # type: ignore[arg-type]
    assert trainer.log.count("batch") == 3


def test_windows_of_whole_steps_follow_each_other_after_the_queue_was_drained(clock: Clock) -> None:
    trainer = TimedTrainer(clock, 0.001)
    trainer.ahead = 2
    seen = measure_causes(trainer, 2, 9, resident=False, alone=True)  # type: ignore[arg-type]
    assert [window.steps for window in seen.whole] == [9, 9]
    log = [entry for entry in trainer.log if entry != "synchronize"]
    window = ["barrier", *["step"] * 9]
    drained = [*["batch", "barrier"] * 2, *["step", "barrier"] * 2]
    assert log[:29] == ["kept", *drained, *window, *window]
    assert "batch" not in log[29:]


def test_parts_take_turns_in_windows_a_third_as_long(clock: Clock) -> None:
    trainer = TimedTrainer(clock, 0.001)
    seen = measure_causes(trainer, 4, 9, resident=False, alone=False)  # type: ignore[arg-type]
    assert [len(part) for part in (seen.local, seen.resident, seen.exchange, seen.whole)] == [12, 12, 12, 4]
    assert {window.steps for window in seen.local} == {3}
    assert len(seen.local_step_times_s) == 36
    # A step that is longer than a window is not taken three times as often for it.
    assert len(measure_causes(trainer, 4, 1, resident=True, alone=True).local) == 4  # type: ignore[arg-type]


def test_single_steps_begin_together(clock: Clock) -> None:
    trainer = TimedTrainer(clock, 0.001)
    measure_causes(trainer, 2, 5, resident=True, alone=True)  # type: ignore[arg-type]
    single = ["barrier", "synchronize", "local", "synchronize"] * 10
    assert trainer.log[-len(single) - 1 :] == [*single, "put back"]


@pytest.mark.parametrize(("count", "turns"), [(2, 2), (3, 6), (4, 4), (5, 10)])
def test_every_part_comes_equally_often_at_each_place_and_after_each_other(count: int, turns: int) -> None:
    orders = list(balanced_orders(count, turns, seed=7))
    places = Counter((place, part) for order in orders for place, part in enumerate(order))
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert set(places.values()) == {turns // count}
    assert len(followed) == count * (count - 1)
    assert set(followed.values()) == {turns * (count - 1) // (count * (count - 1))}


def test_orders_are_drawn_and_the_same_on_every_rank() -> None:
    drawn = [tuple(map(tuple, balanced_orders(4, 12, seed))) for seed in range(5)]
    assert len(set(drawn)) == 5
    assert drawn[3] == tuple(map(tuple, balanced_orders(4, 12, 3)))


def test_without_a_warm_up_the_windows_are_taken_all_the_same(clock: Clock) -> None:
    seen = measured(TimedTrainer(clock, 0.001), window_s=0.02, windows=2, warm_up_max_s=0)
    assert (seen.warm_up_windows, len(seen.windows)) == ([], 2)


def test_the_device_is_synchronized_at_a_windows_two_ends_alone(clock: Clock) -> None:
    trainer = TimedTrainer(clock, 0.001)
    seen = measured(trainer, window_s=0.01, windows=2, warm_up_max_s=0)
    # All ranks begin together: what they look at before the timed windows takes them unlike long.
    expected = ["step", "barrier"]
    for window in seen.windows:
        expected += ["synchronize", *["step"] * window.steps, "synchronize", "barrier"]
    assert trainer.log == expected


def test_windows_hold_as_many_steps_as_fill_them(clock: Clock) -> None:
    seen = measured(TimedTrainer(clock, 1 / 256), window_s=1 / 16, windows=3, warm_up_max_s=2)
    assert [window.steps for window in seen.windows] == [16, 16, 16]


def test_measuring_ends_with_its_budget(clock: Clock) -> None:
    seen = measured(TimedTrainer(clock, 1 / 64), window_s=1 / 64, windows=1000, warm_up_max_s=0, measure_max_s=5 / 64)
    assert len(seen.windows) == 5


def test_every_windows_loss_is_kept_with_its_step_and_one_that_is_none_as_null(clock: Clock) -> None:
    seen = measured(TimedTrainer(clock, 0.001), window_s=0.01, windows=2, warm_up_max_s=0)
    steps = [seen.windows[0].steps, seen.windows[0].steps + seen.windows[1].steps]
    assert [step for step, _ in seen.losses] == [1, 1 + steps[0], 1 + steps[1]]
    assert [loss for _, loss in seen.losses] == [None, 1 / (1 + steps[0]), 1 / (1 + steps[1])]


@pytest.mark.parametrize(
    ("steps_s", "expected"),
    [
        ([1.0] * 7, False),
        ([1.0] * 8, True),
        ([2.0] * 4 + [1.0] * 4, False),
        ([1.04] * 4 + [1.0] * 4, True),
        ([9.0, 2.0] + [1.0] * 8, True),
        ([1.0] * 4 + [1.0, 9.0, 1.0, 1.0], True),
    ],
)
def test_steady_compares_the_medians_of_the_last_eight_windows(steps_s: list[float], expected: bool) -> None:
    assert steady(steps_s) is expected


def test_a_step_longer_than_the_window_is_a_window_of_its_own() -> None:
    assert steps_for(0.5, 2.0) == 1
    assert steps_for(0.5, 0.03) == 17


def test_the_clock_is_the_wall_clock_and_never_runs_backwards() -> None:
    stamps = [now_s() for _ in range(1000)]
    assert stamps == sorted(stamps)
    assert stamps[0] == pytest.approx(time.time(), abs=5)
