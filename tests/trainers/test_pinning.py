"""A rank takes its place for real: in a process that may use some CPUs, with GPUs that the NVML stand-in shows."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.cluster.host import usable_cpus
from scalestudy.cluster.processors import Processor, cores_of, processors
from scalestudy.cluster.rank import Rank
from scalestudy.launch.local import local_ranks
from scalestudy.trainers.devices import own_devices, settled
from scalestudy.trainers.pinning import bound_cpus
from scalestudy.trainers.record import Placement, RankReport
from scalestudy.trainers.trial import Trial

ASK = """
import os, sys
from pathlib import Path
from scalestudy.trainers.pinning import rank_gpus
from scalestudy.trainers.trial import Trial
trial = Trial.model_validate_json(sys.argv[1])
found = rank_gpus(trial, os.environ.get("CUDA_VISIBLE_DEVICES"), Path(sys.argv[2]))
print(*(f"{gpu.uuid}:{gpu.numa_node}" for gpu in found))
"""
TAKE = """
import os, sys
from scalestudy.cluster.rank import Rank
from scalestudy.trainers.pinning import _held, placed, take_place
from scalestudy.trainers.trial import Trial
from pathlib import Path
trial, rank = Trial.model_validate_json(sys.argv[1]), Rank.model_validate_json(sys.argv[2])
rank = placed(trial, rank, os.environ)
place = take_place(trial, rank, os.environ, Path("a folder"))
assert tuple(sorted(os.sched_getaffinity(0))) == place.cpus
print(rank.model_dump_json())
print(place.model_dump_json())
print(*(name for claim in _held for name in claim.names))
"""
CHOOSE = """
import os, sys
from scalestudy.launch.local import local_ranks
from scalestudy.trainers.pinning import placed, trial_claims
from scalestudy.trainers.trial import Trial
for asked in sys.argv[1:]:
    trial = Trial.model_validate_json(asked)
    ranks = local_ranks(trial.world_size)
    devices = [device for rank in ranks for device in placed(trial, rank, os.environ).devices]
    gpus = [name for name in trial_claims(trial, ranks, os.environ) if name.startswith("GPU-")]
    print(devices, *gpus)
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
        # The stand-in's gpu2 is lost after a second, not at once; the two instances of gpu5 come last, and are not for
        # ranks beside whole GPUs.
        (None, "GPU-0000:0 GPU-0001:0 GPU-0002:0 GPU-0003:0 GPU-0004:1 GPU-0006:None GPU-0007:1"),
        ("4,0", "GPU-0004:1 GPU-0000:0"),
        ("5", "GPU-0006:None"),
        ("7,0", "MIG-0000:1"),
        ("", ""),
    ],
)
def test_ranks_know_the_gpus_that_they_can_take_and_their_numa_nodes(
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
        assert said(ASK, trial, tmp_path, LD_LIBRARY_PATH=str(tmp_path)) == ""


def test_a_rank_says_where_it_was_put(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(world_size=2, devices_per_node=2)
    usable = usable_cpus()
    for _, place, _ in taken(trial):
        assert set(place.cpus) <= set(usable)
        assert len(place.cores) == len(place.cpus) == (1 if len(usable) > 1 else len(usable))
        assert (len(place.numa_nodes), place.gpu_numa_nodes) == (1, ())
    # What the launcher gives is taken as it is.
    [(_, place, _)] = taken(make_trial(), SCALESTUDY_CPUS=str(usable[-1]))
    assert place.cpus == (usable[-1],)


def taken(trial: Trial, **variables: str) -> list[tuple[tuple[int, ...], Placement, set[str]]]:
    """Return the GPUs that every rank of a trial on this host takes, its place, and what it claims."""
    found = []
    for rank in local_ranks(trial.world_size):
        told, place, *names = said(
            TAKE, trial.model_dump_json(by_alias=True), rank.model_dump_json(), **variables
        ).splitlines()
        found.append(
            (Rank.model_validate_json(told).devices, Placement.model_validate_json(place), set(" ".join(names).split()))
        )
    return found


@pytest.mark.skipif(len(cores_of(processors(usable_cpus()))) < 2, reason="one core: there is nothing to rotate")
def test_a_lone_rank_computes_on_another_core_in_the_next_repeat(make_trial: Callable[..., Trial]) -> None:
    found = [
        taken(make_trial(devices_per_node=2, repeat=repeat, rotate_devices=rotate))[0]
        for repeat, rotate in ((0, True), (1, True), (1, False))
    ]
    assert {devices for devices, _, _ in found} == {()}
    first, second, fixed = [place.cores for _, place, _ in found]
    assert first != second
    assert first == fixed


# With gpu5 as a whole GPU there are eight; gpu2 is not lost while this lasts.
EIGHT = {"NVML_STANDIN_MIG": "0", "NVML_STANDIN_LOST_S": "60"}


@pytest.mark.parametrize(
    ("visible", "cases"),
    [
        (
            None,
            [
                ({"repeat": 0}, "[0] GPU-0000"),
                ({"repeat": 5}, "[5] GPU-0005"),
                ({"repeat": 5, "rotate_devices": False}, "[0] GPU-0000"),
                ({"repeat": 3, "world_size": 2}, "[6, 7] GPU-0006 GPU-0007"),
            ],
        ),
        # Of what CUDA shows, as where Slurm or Ray have chosen it: gpu6 and gpu2 are its numbers 0 and 1.
        ("6,2", [({"repeat": 1}, "[1] GPU-0002"), ({"repeat": 1, "world_size": 2}, "[0, 1] GPU-0006 GPU-0002")]),
        ("3", [({"repeat": 4}, "[0] GPU-0003")]),
    ],
)
def test_a_repeat_takes_the_next_gpus_and_claims_those(
    make_trial: Callable[..., Trial], nvml_standin: Path, visible: str | None, cases: list[tuple[dict[str, int], str]]
) -> None:
    trials = [make_trial(device="gpu", **changes).model_dump_json(by_alias=True) for changes, _ in cases]
    variables = {"LD_LIBRARY_PATH": str(nvml_standin), **EIGHT}
    variables |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert said(CHOOSE, *trials, **variables).splitlines() == [expected for _, expected in cases]


def test_a_rank_claims_the_gpu_that_it_drives(make_trial: Callable[..., Trial], nvml_standin: Path) -> None:
    trial = make_trial(device="gpu", repeat=3)
    [(devices, place, names)] = taken(trial, LD_LIBRARY_PATH=str(nvml_standin), **EIGHT)
    assert devices == (3,)
    assert len(place.gpu_numa_nodes) == 1
    if place.claimed_by is None:
        assert {name for name in names if name.startswith("GPU-")} == {"GPU-0003"}


def test_one_process_drives_all_gpus_of_its_repeat(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(trainer="tf-mirrored", device="gpu", world_size=2, repeat=1)
    [rank] = local_ranks(1)
    assert own_devices(trial, settled(trial, rank, gpus=8)) == (2, 3)


def test_of_the_last_node_which_has_fewer_ranks_others_are_taken_too(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(device="gpu", world_size=6, devices_per_node=4, repeat=1)
    last = [Rank(rank=4 + i, world_size=6, local_rank=i, local_world_size=2, node_rank=1, host="b") for i in range(2)]
    assert [settled(trial, rank, gpus=4).devices for rank in last] == [(2,), (3,)]


def test_a_rank_that_nobody_has_placed_has_the_gpus_of_its_local_rank(make_trial: Callable[..., Trial]) -> None:
    """As in records from before repeats took turns."""
    trial = make_trial(device="gpu", world_size=2, repeat=1)
    assert [list(own_devices(trial, rank)) for rank in local_ranks(2)] == [[0], [1]]
    mirrored = make_trial(trainer="tf-mirrored", device="gpu", world_size=2, repeat=1)
    assert list(own_devices(mirrored, local_ranks(1)[0])) == [0, 1]
    # Where NVML does not answer, nobody knows of others.
    assert settled(trial, local_ranks(2)[1], gpus=0).devices == (1,)


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
