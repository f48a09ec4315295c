"""One task of a Slurm step: which rank it is, read from what Slurm gives a task."""

import re
from collections.abc import Mapping

from scalestudy.cluster.rank import Rank, integer, rank_environ

# One host:port a rank, in rank order: what Slurm does not say, the launcher does.
ADDRESSES = "SCALESTUDY_ADDRESSES"


def step_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables and TF_CONFIG for this task; raises ValueError naming a variable that is wrong."""
    return rank_environ(step_rank(environ), environ[ADDRESSES].split(","))


def step_rank(environ: Mapping[str, str]) -> Rank:
    """Return this task's rank; the node's name is Slurm's, which several on one host do not share."""
    node_rank = integer(environ, "SLURM_NODEID")
    return Rank(
        rank=integer(environ, "SLURM_PROCID"),
        world_size=integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[node_rank],
        node_rank=node_rank,
        host=environ["SLURMD_NODENAME"],
    )


def mask_sharers(environ: Mapping[str, str], local_rank: int) -> list[int] | None:
    """Return the local ranks that Slurm bound to the same CPUs as this one, in order; None where it bound none.

    Only of a step of ours: in any other these variables are about another process.
    """
    if ADDRESSES not in environ or not environ.get("SLURM_CPU_BIND_TYPE", "").startswith("mask_cpu"):
        return None
    # One mask a task of this node.
    masks = [int(mask, 16) for mask in environ["SLURM_CPU_BIND_LIST"].split(",")]
    return [rank for rank, mask in enumerate(masks) if mask == masks[local_rank]]


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of every node from Slurm's short form: `2(x3),1` is 2, 2, 2, 1. Raises ValueError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is no list of counts such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
