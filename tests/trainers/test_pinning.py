"""A rank takes its place for real: in a process that may use some CPUs, with GPUs that the NVML stand-in shows."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.cluster.host import usable_cpus
from scalestudy.cluster.processors import Processor
from scalestudy.launch.local import local_ranks
from scalestudy.trainers.pinning import bound_cpus
from scalestudy.trainers.record import Placement, RankReport
from scalestudy.trainers.trial import Trial

ASK = """
import os, sys
from pathlib import Path
from scalestudy.trainers.pinning import gpu_nodes
from scalestudy.trainers.trial import Trial
trial = Trial.model_validate_json(sys.argv[1])
print(gpu_nodes(trial, os.environ.get("CUDA_VISIBLE_DEVICES"), Path(sys.argv[2])))
"""
TAKE = """
import os, sys
from scalestudy.cluster.rank import Rank
from scalestudy.trainers.pinning import take_place
from scalestudy.trainers.trial import Trial
from pathlib import Path
trial, rank = Trial.model_validate_json(sys.argv[1]), Rank.model_validate_json(sys.argv[2])
place = take_place(trial, rank, os.environ, Path("a folder"))
assert tuple(sorted(os.sched_getaffinity(0))) == place.cpus
print(place.model_dump_json())
"""


def said(script: str, *arguments: str | Path, **variables: str) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    told = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        # The stand-in's gpu2 is lost after a second, not at once; the two instances of gpu5 come last.
        (None, "(0, 0, 0, 0, 1, None, 1, 1, 1)"),
        ("4,0", "(1, 0)"),
        ("5", "(None,)"),
        ("", "()"),
    ],
)
def test_ranks_know_the_numa_node_of_the_gpus_that_cuda_shows(
    make_trial: Callable[..., Trial], nvml_standin: Path, tmp_path: Path, visible: str | None, expected: str
) -> None:
    for index, node in enumerate([0, 0, 0, 0, 1, 1, -1, 1]):
        folder = tmp_path / f"bus/pci/devices/0000:{index + 1:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    variables = {"LD_LIBRARY_PATH": str(nvml_standin)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    trial = make_trial(device="gpu").model_dump_json(by_alias=True)
    assert said(ASK, trial, tmp_path, **variables) == expected


def test_without_nvml_no_node_of_a_gpu_is_known(make_trial: Callable[..., Trial], tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    for device in ("gpu", "cpu"):
        trial = make_trial(device=device).model_dump_json(by_alias=True)
        assert said(ASK, trial, tmp_path, LD_LIBRARY_PATH=str(tmp_path)) == "()"


def test_a_rank_says_where_it_was_put(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(world_size=2, devices_per_node=2)
    usable = usable_cpus()
    for rank in local_ranks(2):
        answer = said(TAKE, trial.model_dump_json(by_alias=True), rank.model_dump_json())
        place = Placement.model_validate_json(answer)
        assert set(place.cpus) <= set(usable)
        assert len(place.cores) == len(place.cpus) == (1 if len(usable) > 1 else len(usable))
        assert (len(place.numa_nodes), place.gpu_numa_nodes) == (1, ())
    # What the launcher gives is taken as it is.
    answer = said(
        TAKE, trial.model_dump_json(by_alias=True), local_ranks(1)[0].model_dump_json(), SCALESTUDY_CPUS=str(usable[-1])
    )
    assert Placement.model_validate_json(answer).cpus == (usable[-1],)


def test_a_report_of_before_there_were_placements_is_read() -> None:
    [rank] = local_ranks(1)
    assert RankReport.model_validate({"rank": rank.model_dump()}).placement is None


def core(number: int) -> list[Processor]:
    """Return both hardware threads of a core of a host with four."""
    return [Processor(node=0, package=0, core_id=number, core=number, cpu=cpu) for cpu in (number, number + 4)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_that_slurm_bound_to_a_core_computes_alike_at_every_world_size(
    make_trial: Callable[..., Trial], world_size: int
) -> None:
    trial = make_trial(world_size=world_size, devices_per_node=4)
    found = [bound_cpus(trial, rank, core(rank.rank), [rank.local_rank]) for rank in local_ranks(world_size)]
    assert found == [(0,), (1,), (2,), (3,)][:world_size]


def test_ranks_that_slurm_bound_to_one_core_take_a_thread_each(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(world_size=2, devices_per_node=4)
    assert [bound_cpus(trial, rank, core(0), [0, 1]) for rank in local_ranks(2)] == [(0,), (4,)]


def test_a_rank_keeps_the_whole_core_that_two_threads_ask_for(make_trial: Callable[..., Trial]) -> None:
    for world_size in (1, 4):
        trial = make_trial(world_size=world_size, devices_per_node=4, threads_per_device=2)
        found = [bound_cpus(trial, rank, core(rank.rank), [rank.local_rank]) for rank in local_ranks(world_size)]
        assert found == [(0, 4), (1, 5), (2, 6), (3, 7)][:world_size]
