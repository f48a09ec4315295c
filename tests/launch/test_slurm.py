"""The Slurm launcher's pure parts: command lines as a table of golden text, and Slurm's answers taken apart."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.cluster.host import Topology
from scalestudy.launch.errors import InputError
from scalestudy.launch.launcher import check_capacity, nodes_needed, unfit
from scalestudy.launch.slurm import (
    SlurmLauncher,
    failed_tasks,
    gpus_of_trial,
    rank_addresses,
    step_environment,
    step_options,
)
from scalestudy.launch.slurm_ask import Node, gpu_count, log_pattern, parsed_gpus, parsed_node, without_options
from scalestudy.trainers.trial import Trial

MakeTrial = Callable[..., Trial]


@pytest.mark.parametrize(
    ("given", "visible", "gpus"), [(0, "", 0), (8, "0,1,2,3,4,5,6,7", 8), (1, "MIG-1", 1), (7, "MIG-1,MIG-2", 1)]
)
def test_of_mig_instances_a_trial_can_use_one(given: int, visible: str, gpus: int) -> None:
    found, limit = gpus_of_trial(given, visible)
    assert found == gpus
    assert (limit is not None) == (found < given)


@pytest.mark.parametrize(
    ("changes", "count", "expected"),
    [
        (
            {"world_size": 4, "devices_per_node": 2},
            4,
            "--nodes=2 --nodelist=a,b --ntasks=4 --distribution=plane=2 --cpu-bind=none --overlap --gres=none",
        ),
        (
            {"world_size": 3, "devices_per_node": 2, "device": "gpu", "threads_per_device": 6},
            3,
            "--nodes=2 --nodelist=a,b --ntasks=3 --distribution=plane=2 --cpu-bind=none --overlap --gres=gpu:2",
        ),
        (
            {"world_size": 1, "devices_per_node": 8, "device": "gpu"},
            1,
            "--nodes=1 --nodelist=a --ntasks=1 --distribution=plane=1 --cpu-bind=none --overlap --gres=gpu:1",
        ),
        (
            # One task drives all devices of its node.
            {
                "trainer": "tf-mirrored",
                "world_size": 4,
                "devices_per_node": 4,
                "device": "gpu",
                "threads_per_device": 6,
            },
            1,
            "--nodes=1 --nodelist=a --ntasks=1 --distribution=plane=1 --cpu-bind=none --overlap --gres=gpu:4",
        ),
    ],
)
def test_a_step_asks_for_its_own_nodes_tasks_and_devices(
    make_trial: MakeTrial, changes: dict[str, object], count: int, expected: str
) -> None:
    trial = make_trial(**changes)
    names = ["a", "b"][: trial.nodes]
    assert shlex.join(step_options("12", names, count, trial, Path("/out/50%"), alone=True)) == (
        f"srun --jobid=12 --job-name={trial.id} {expected} --mem=0 --mpi=none --kill-on-bad-exit=1 "
        "--time=4 --output=/out/50%%/rank-%t.log"
    )


def test_on_nodes_that_other_jobs_use_slurm_says_which_cpus_are_the_ranks(make_trial: MakeTrial) -> None:
    trial = make_trial(trainer="tf-mirrored", world_size=2, devices_per_node=2, threads_per_device=3)
    options = step_options("12", ["a"], 1, trial, Path("/out"), alone=False)
    assert "--cpus-per-task=6 --cpu-bind=cores" in shlex.join(options)


@pytest.mark.parametrize(
    ("alone", "rotate", "shown"), [(True, True, 8), (True, False, 2), (False, True, 2), (False, False, 2)]
)
def test_a_step_sees_all_gpus_of_whole_nodes_where_repeats_take_turns_on_them(
    make_trial: MakeTrial, alone: bool, rotate: bool, shown: int
) -> None:
    trial = make_trial(world_size=2, device="gpu", rotate_devices=rotate)
    assert f"--gres=gpu:{shown}" in step_options("12", ["a"], 2, trial, Path("/out"), alone=alone, gpus=8)
    on_cpu = make_trial(world_size=2, rotate_devices=rotate)
    assert "--gres=none" in step_options("12", ["a"], 2, on_cpu, Path("/out"), alone=alone, gpus=8)


def test_every_rank_has_an_address_of_its_node_and_no_port_stands_twice() -> None:
    free = [[5, 6, 7], [5, 7, 8]]
    assert rank_addresses(["a", "b"], free, 3, per_node=2) == ["a:5", "a:6", "b:7"]


def test_nothing_that_slurm_set_in_the_job_reaches_an_srun(make_trial: MakeTrial) -> None:
    inherited = {"SLURM_NTASKS": "8", "SRUN_CPUS_PER_TASK": "2", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/root"}
    assert without_options(inherited) == {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/root"}
    environment = step_environment(inherited, make_trial(threads_per_device=3), 1, ["a:1", "b:2"])
    assert "SLURM_NTASKS" not in environment
    assert (environment["SCALESTUDY_ADDRESSES"], environment["OMP_NUM_THREADS"]) == ("a:1,b:2", "3")


def test_failed_tasks_are_read_in_the_order_srun_tells_of_them() -> None:
    # As srun of Slurm 22.05 wrote it; newer ones add `(core dumped)`.
    said = """srun: error: node2: task 3: Exited with exit code 7
srun: launch/slurm: _step_signal: Terminating StepId=2.1
srun: error: node2: task 2: Terminated
srun: error: node1: tasks 0-1,4: Segmentation fault (core dumped)
srun: error: node3: task 5: Out Of Memory
srun: error: node3: task 6: Something new
srun: Force Terminated StepId=2.1
"""
    assert failed_tasks(said) == [(3, 7), (2, -15), (0, -11), (1, -11), (4, -11), (5, -9), (6, 1)]
    assert failed_tasks("srun: cluster configuration lacks support for cpu binding\n") == []


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:2", 2), ("gpu:a100:4(S:0-1),nvme:1", 4), ("gpu:a100:4,gpu:v100:2", 6), ("gpu", 1), ("", 0)],
)
def test_gpus_are_counted_in_slurms_list_of_resources(gres: str, count: int) -> None:
    assert gpu_count(gres) == count


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (["Nodes=node[1-2] CPU_IDs=0-3 Mem=0 GRES=gpu:2(IDX:0-1)"], 2),
        (
            [
                "Nodes=a[1-2] CPU_IDs=0-3 Mem=0 GRES=gpu:a100:4(IDX:0-3)",
                "Nodes=b1 CPU_IDs=0-3 Mem=0 GRES=gpu:2(IDX:0,3)",
            ],
            2,
        ),
        (["Nodes=a1 CPU_IDs=0 Mem=0 GRES=nvme:1,gpu:a100:1(IDX:0),gpu:v100:2(IDX:2-3)"], 3),
        (["Nodes=a1 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)", "Nodes=a2 CPU_IDs=0 Mem=0 GRES="], 0),
        (["Nodes=node[1-2] CPU_IDs=0 Mem=0 GRES="], 0),
        ([], 0),
    ],
)
def test_a_jobs_gpus_are_those_that_every_node_gives_it(lines: list[str], count: int) -> None:
    # As scontrol shows it: the first two lines are of the job and are not to be read.
    shown = ["JobId=1 JobName=x", "   JOB_GRES=gpu:4", "   NodeList=node[1-2]", *(f"     {line} " for line in lines)]
    assert parsed_gpus("\n".join([*shown, "   TresPerNode=gres:gpu:8"])) == count


@pytest.mark.parametrize(
    ("state", "up"),
    [("idle", True), ("mixed", True), ("allocated+", True), ("draining", True), ("planned-", True)]
    + [(state, False) for state in ("down", "down*", "idle*", "drained", "fail", "failing")],
)
def test_a_node_is_up_unless_slurm_says_otherwise(state: str, up: bool) -> None:
    node = parsed_node(f"node1|127.0.0.11|{state}|8|gpu:2|2|2")
    assert node == Node("node1", "127.0.0.11", state, cpus=8, gpus=2, cores=4)
    assert node.up == up


def test_a_cluster_that_hands_out_cores_has_no_more_of_them_than_cpus() -> None:
    assert parsed_node("node1|127.0.0.11|idle|4|(null)|1|8").cores == 4


def test_outside_an_allocation_the_launcher_says_how_to_get_one() -> None:
    with pytest.raises(InputError, match="SLURM_JOB_ID is not set.*sbatch slurm/scale.sh STUDY.yaml"):
        SlurmLauncher({}, None, {})


def test_a_trainer_of_one_node_is_unfit_for_several_and_holds_none_of_them(make_trial: MakeTrial) -> None:
    mirrored = make_trial(trainer="tf-mirrored", world_size=4, devices_per_node=2)
    assert unfit(mirrored) == "tf-mirrored drives the devices of one node; 4 devices, 2 a node, need 2 nodes"
    assert (nodes_needed(mirrored), nodes_needed(make_trial(world_size=4, devices_per_node=2))) == (1, 2)


def test_more_nodes_than_there_are_is_one_line(make_trial: MakeTrial) -> None:
    trials = [make_trial(world_size=8, devices_per_node=2)]
    with pytest.raises(InputError) as caught:
        check_capacity(trials, Path("s.yaml"), "slurm", Topology(nodes=2, cpus_per_node=4))
    assert str(caught.value) == (
        "s.yaml: world_sizes: 8 is above the capacity of launcher 'slurm': 2 nodes with 2 cpu devices; use at most 4"
    )


def test_a_folder_that_slurm_cannot_write_logs_to_is_refused() -> None:
    with pytest.raises(InputError, match="holds a backslash"):
        log_pattern(Path("/out/a\\b"), "%j.log")
