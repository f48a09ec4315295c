"""What kept ranks from their CPUs is named: on made-up counts, quiet ones among them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalestudy.analysis import answer, contention
from scalestudy.analysis.frames import frames
from scalestudy.analysis.tables import tables
from scalestudy.cluster.cpu_use import CpuUse
from scalestudy.trainers.record import Placement, RankReport, Record
from scalestudy.trainers.trial import Trial

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]


def use(own_s: float, busy_s: float | None, elapsed_s: float = 10.0, **changes: Any) -> CpuUse:
    return CpuUse(elapsed_s=elapsed_s, own_s=own_s, busy_s=busy_s, **changes)


QUIET = use(9.9, 10.0)


def ranks(record: Record, *changes: dict[str, Any]) -> Record:
    """Return the record with a CPU of its own for every rank, and what is said of each."""
    reports: list[RankReport] = []
    for cpu, (report, change) in enumerate(zip(record.reports, changes, strict=True)):
        placement = Placement(cpus=(cpu,), cores=(cpu,), numa_nodes=(0,))
        usual = {"placement": placement, "cpu_before": QUIET, "cpu_measured": QUIET}
        reports.append(report.model_copy(update=usual | change))
    return record.model_copy(update={"reports": tuple(reports)})


@pytest.fixture
def told(make_trial: MakeTrial, make_record: MakeRecord) -> Callable[..., list[tuple[str, str]]]:
    """Return a maker of the notices of a trial of two ranks, of which the first is as said."""

    def told(second: dict[str, Any] | None = None, /, **first: Any) -> list[tuple[str, str]]:
        record = ranks(make_record(make_trial(world_size=2), 1.0), first, second or {})
        return [(kind, text) for _, kind, text in contention.notices(record)]

    return told


def test_ranks_alone_on_their_cpus_are_not_worth_a_word(told: Callable[..., list[tuple[str, str]]]) -> None:
    assert told() == []
    assert told(cpu_measured=None, cpu_before=None) == []
    # The kernel's ticks: a fifth of a short span, and of a longer one what a sampler takes.
    assert told(cpu_measured=use(0.16, 0.2, 0.2)) == []
    assert told(cpu_measured=use(9.5, 10.0)) == []
    # A rank that waits is not one whose CPUs are taken.
    assert told(cpu_measured=use(3.0, 3.1)) == []


def test_other_work_on_the_ranks_cpus_is_named_before_and_while_it_was_measured(
    told: Callable[..., list[tuple[str, str]]],
) -> None:
    assert told(cpu_measured=use(5.0, 10.0)) == [
        ("shared", "other work took 50% of the time of the CPUs of rank 0 on here while it was measured")
    ]
    assert told(cpu_before=use(2.0, 10.0)) == [
        ("busy before", "other work took 80% of the time of the CPUs of rank 0 on here before the timed windows")
    ]


def test_a_loop_on_one_of_many_cpus_holds_up_all_of_them(told: Callable[..., list[tuple[str, str]]]) -> None:
    """Three percent of sixteen CPUs, and every step waits for the thread that has half of one."""
    many = {"placement": Placement(cpus=tuple(range(16, 32)), cores=tuple(range(16, 32)), numa_nodes=(0,))}
    assert told(**many, cpu_measured=use(150.0, 155.0, run_delay_s=60.0)) == [
        ("shared", "other work took 3% of the time of the CPUs of rank 0 on here while it was measured")
    ]
    # Interrupts are in the CPUs' time, and in nobody's: no thread waits for long.
    assert told(**many, cpu_measured=use(150.0, 155.0, run_delay_s=0.5)) == []
    # Nor are a rank's own threads that wait for each other.
    assert told(**many, cpu_measured=use(154.9, 155.0, run_delay_s=60.0)) == []


def test_ranks_that_share_cpus_are_no_other_work(told: Callable[..., list[tuple[str, str]]]) -> None:
    both = Placement(cpus=(0, 1), cores=(0, 1), numa_nodes=(0,))
    shared = {"placement": both, "cpu_measured": use(9.5, 19.5), "cpu_before": None}
    assert told(shared, **shared) == []
    half = shared | {"cpu_measured": use(5.0, 19.5)}
    assert [kind for kind, _ in told(half, **half)] == ["shared", "shared"]


def test_where_the_cpus_time_is_not_known_a_rank_that_had_to_wait_says_so(
    told: Callable[..., list[tuple[str, str]]],
) -> None:
    assert told(cpu_measured=use(5.0, None, run_delay_s=0.5)) == []
    assert told(cpu_measured=use(5.0, None, run_delay_s=4.8)) == [
        ("shared", "rank 0 on here was ready and waited 4.8 s for a CPU while it was measured")
    ]


def test_what_another_trial_had_claimed_is_named(told: Callable[..., list[tuple[str, str]]]) -> None:
    placement = Placement(cpus=(0,), cores=(0,), numa_nodes=(0,), claimed_by="process 7, trial /other")
    assert told(placement=placement) == [
        ("shared", "rank 0 on here used CPUs or GPUs that another trial had claimed (process 7, trial /other)")
    ]


def test_a_quota_and_a_host_short_of_memory_are_named_once_a_host(told: Callable[..., list[tuple[str, str]]]) -> None:
    quota = {"quota_cpus": 1.5, "periods": 991, "throttled_periods": 128, "throttled_s": 2.5}
    held = {"cpu_measured": use(9.9, 10.0, **quota, stalled_s={"memory": 3.0, "io": 0.1, "cpu": 9.0})}
    assert told(held, **held) == [
        ("quota", "here: 128 of 991 periods, its CPU quota is 1.5 CPUs"),
        ("stalled", "here waited for memory (it swaps, or reclaims what is cached) 30% of the time"),
    ]
    assert told(cpu_measured=use(9.9, 10.0, **(quota | {"throttled_periods": 1, "throttled_s": 0.01}))) == []


@pytest.mark.parametrize("throttled", [0, 128])
def test_a_quota_takes_the_place_of_other_causes(
    make_trial: MakeTrial, make_record: MakeRecord, throttled: int
) -> None:
    def record(world_size: int, repeat: int) -> Record:
        made = make_record(make_trial(world_size=world_size, repeat=repeat), 0.1 * world_size + 0.001 * repeat)
        quota = {"quota_cpus": 1.5, "periods": 991, "throttled_periods": throttled if world_size > 1 else 0}
        windows = made.reports[0].windows
        reports = tuple(
            report.model_copy(
                update={
                    "cpu_measured": use(9.9, 10.0, **quota, throttled_s=1.0),
                    "resident_windows": windows,
                    "local_windows": windows,
                    "local_step_times_s": (0.1,) * 10,
                }
            )
            for report in made.reports
        )
        return made.model_copy(update={"reports": reports})

    records = [record(world_size, repeat) for world_size in (1, 2) for repeat in range(6)]
    found = frames(records, Path("/nowhere"))
    said = " ".join(answer._why(tables(found).points))
    assert "slower computing costs 49%" in said
    assert ("A CPU quota held ranks up in 13% of its periods" in said) == (throttled > 0)
    assert ("memory bandwidth" in said) == (throttled == 0)
