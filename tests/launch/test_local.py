"""The local launcher with real processes: a short script stands where the worker's interpreter would."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scalestudy.cluster.processors import Processor
from scalestudy.launch.launcher import Exit
from scalestudy.launch.local import LocalLauncher, environment, local_ranks
from scalestudy.trainers.pinning import RankGpu, rank_cpus
from scalestudy.trainers.trial import Trial

Launch = Callable[..., Exit]
# Two NUMA nodes of four cores with two hardware threads, numbered as Linux does: 8 is the sibling of 0.
HOST = [Processor(core // 4, core // 4, core, core, core + 8 * thread) for core in range(8) for thread in range(2)]


@pytest.fixture
def launch(tmp_path: Path, make_trial: Callable[..., Trial]) -> Launch:
    def launch(script: str, deadline_s: float = 30, world_size: int = 2) -> Exit:
        interpreter = tmp_path / "interpreter"
        interpreter.write_text(f"#!/bin/bash\nfolder=$3\n{script}\n")
        interpreter.chmod(0o755)
        launcher = LocalLauncher({"torch-ddp": str(interpreter)})
        return launcher.run(make_trial(world_size=world_size), tmp_path, deadline_s, lambda: None)

    return launch


def gone(pid_file: Path) -> bool:
    """Whether the process is gone, or soon is: a killed one lingers until init reaps it."""
    pid = int(pid_file.read_text())
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_every_rank_is_told_who_it_is_and_logs_to_its_own_file(launch: Launch, tmp_path: Path) -> None:
    ended = launch('echo "rank $RANK of $WORLD_SIZE, master $MASTER_ADDR, $OMP_NUM_THREADS thread"; echo oops >&2')
    assert ended == Exit(codes=(0, 0), timed_out=False, first_failed=None)
    for rank in range(2):
        expected = f"rank {rank} of 2, master 127.0.0.1, 1 thread\noops\n"
        assert (tmp_path / f"rank-{rank}.log").read_text() == expected


def test_a_rank_that_fails_takes_the_waiting_ones_with_it(launch: Launch) -> None:
    began = time.monotonic()
    ended = launch("[ $RANK = 1 ] && exit 7; sleep 60")
    assert ended == Exit(codes=(-9, 7), timed_out=False, first_failed=1)
    assert time.monotonic() - began < 30


def test_a_rank_killed_by_a_signal_has_failed(launch: Launch) -> None:
    assert launch("kill -SEGV $$", world_size=1) == Exit(codes=(-11,), timed_out=False, first_failed=0)


def test_the_deadline_kills_the_whole_group(launch: Launch, tmp_path: Path) -> None:
    ended = launch("sleep 60 & echo $! > $folder/child-$RANK; wait", deadline_s=1)
    assert ended == Exit(codes=(-9, -9), timed_out=True, first_failed=None)
    assert gone(tmp_path / "child-0")
    assert gone(tmp_path / "child-1")


def test_what_a_rank_leaves_running_does_not_outlive_the_trial(launch: Launch, tmp_path: Path) -> None:
    assert launch("sleep 60 & echo $! > $folder/child-$RANK; exit 0").codes == (0, 0)
    assert gone(tmp_path / "child-0")


def test_an_interrupt_ends_every_rank(tmp_path: Path, make_trial: Callable[..., Trial]) -> None:
    interpreter = tmp_path / "interpreter"
    interpreter.write_text("#!/bin/bash\necho $$ > $3/pid-$RANK; sleep 60\n")
    interpreter.chmod(0o755)

    def interrupt() -> None:
        if (tmp_path / "pid-0").exists() and (tmp_path / "pid-1").exists():
            raise KeyboardInterrupt

    launcher = LocalLauncher({"torch-ddp": str(interpreter)})
    with pytest.raises(KeyboardInterrupt):
        launcher.run(make_trial(world_size=2), tmp_path, 30, interrupt)
    assert gone(tmp_path / "pid-0")
    assert gone(tmp_path / "pid-1")


def test_a_trial_leaves_no_file_descriptor_open(launch: Launch) -> None:
    launch("exit 0")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    launch("exit 0")
    launch("sleep 60", deadline_s=0.2)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_process_of_all_devices_has_the_threads_of_all(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(trainer="tf-mirrored", world_size=2, threads_per_device=3)
    [rank] = local_ranks(1)
    assert environment({}, trial, rank, ["127.0.0.1:1"])["OMP_NUM_THREADS"] == "6"
    assert rank_cpus(trial, rank, HOST) == (0, 1, 2, 4, 5, 6)


def test_ranks_are_pinned_apart_and_to_the_same_cpus_at_every_world_size(make_trial: Callable[..., Trial]) -> None:
    def found(world_size: int, **changes: object) -> list[tuple[int, ...]]:
        trial = make_trial(world_size=world_size, devices_per_node=4, **changes)
        return [rank_cpus(trial, rank, HOST) for rank in local_ranks(world_size)]

    # Cores of their own; or, where the study's threads are too many for that, both threads of half as many.
    for changes, all_four in (
        ({"threads_per_device": 2}, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (
            {"threads_per_device": 4, "hyper_threads": True},
            [(0, 1, 8, 9), (2, 3, 10, 11), (4, 5, 12, 13), (6, 7, 14, 15)],
        ),
    ):
        assert [found(size, **changes) for size in (1, 2, 4)] == [all_four[:1], all_four[:2], all_four]


def test_a_rank_is_pinned_beside_its_gpu(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(world_size=2, devices_per_node=2, threads_per_device=2, device="gpu")
    gpus = [RankGpu("GPU-a", 1), RankGpu("GPU-b", 0)]
    assert [rank_cpus(trial, rank, HOST, gpus) for rank in local_ranks(2)] == [(4, 5), (0, 1)]
