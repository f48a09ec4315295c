import json

import pytest

from scalestudy.cluster.rank import Rank
from scalestudy.cluster.slurm_step import mask_sharers, step_environ, step_rank, tasks_per_node

# As Slurm 22.05 gives it to the last of three tasks, two on the first node and one on the second.
TASK = {
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURMD_NODENAME": "node3",
    "SCALESTUDY_ADDRESSES": "127.0.0.12:20001,127.0.0.12:20002,127.0.0.13:20003",
}


def test_a_tasks_rank_is_what_slurm_says() -> None:
    assert step_rank(TASK) == Rank(rank=2, world_size=3, local_rank=0, local_world_size=1, node_rank=1, host="node3")


def test_both_frameworks_are_told_where_the_other_ranks_are() -> None:
    environ = step_environ(TASK)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.12", "20001")
    assert json.loads(environ["TF_CONFIG"]) == {
        "cluster": {"worker": TASK["SCALESTUDY_ADDRESSES"].split(",")},
        "task": {"type": "worker", "index": 2},
    }
    assert Rank.from_environ(environ) == step_rank(TASK)


@pytest.mark.parametrize(
    ("text", "counts"), [("2", [2]), ("2,1", [2, 1]), ("8(x3),4", [8, 8, 8, 4]), ("1(x2),2(x2)", [1, 1, 2, 2])]
)
def test_slurms_short_form_of_counts_is_read(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "two", "2(x)"])
def test_what_is_no_list_of_counts_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE="):
        tasks_per_node(text)


def test_ranks_that_slurm_bound_to_the_same_cpus_are_known() -> None:
    bound = {**TASK, "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x00000011,0x00000022,0x00000011"}
    assert mask_sharers(bound, 0) == mask_sharers(bound, 2) == [0, 2]
    assert mask_sharers(bound, 1) == [1]


@pytest.mark.parametrize("kind", ["none", "cores", ""])
def test_a_task_that_slurm_binds_to_nothing_has_no_mask(kind: str) -> None:
    assert mask_sharers({**TASK, "SLURM_CPU_BIND_TYPE": kind}, 0) is None
    assert mask_sharers(TASK, 0) is None


def test_the_mask_of_a_step_that_is_not_ours_says_nothing_of_a_rank() -> None:
    step = {"SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x3"}
    assert mask_sharers(step, 0) is None
