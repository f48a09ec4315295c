"""Which GPUs a rank drives, and which CPUs it computes on: its own share of its node, near its GPUs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scalestudy.cluster.claims import Claim
from scalestudy.cluster.cpu_claims import cpu_names
from scalestudy.cluster.host import pin, usable_cpus
from scalestudy.cluster.processors import Processor, gpu_node, own_cpus, processors, siblings
from scalestudy.cluster.rank import Rank
from scalestudy.cluster.slurm_step import mask_sharers
from scalestudy.trainers.devices import local_places, own_devices, settled, turn
from scalestudy.trainers.record import Placement
from scalestudy.trainers.trial import Trial

# CPUs that a launcher chose for a rank.
GIVEN = "SCALESTUDY_CPUS"
_SYSTEM = Path("/sys")
_held: list[Claim] = []


class RankGpu(NamedTuple):
    """A GPU, or the MIG instance, that ranks of a node can take; its NUMA node is None where it is not known."""

    uuid: str
    numa_node: int | None


def placed(trial: Trial, rank: Rank, environ: Mapping[str, str]) -> Rank:
    """Return the rank with the GPUs that it drives, of those that CUDA shows to it and the others of its node."""
    return settled(trial, rank, len(rank_gpus(trial, environ.get("CUDA_VISIBLE_DEVICES"))))


def take_place(trial: Trial, rank: Rank, environ: Mapping[str, str], folder: Path) -> Placement:
    """Pin this process, and all threads that it will start, to the CPUs of a `placed` rank; return where that is.

    What a rank takes is claimed for its trial, which lies in `folder`, until it leaves its place: whoever has it
    already is in the placement.
    """
    gpus = rank_gpus(trial, environ.get("CUDA_VISIBLE_DEVICES"))
    given = environ.get(GIVEN)
    usable = processors(usable_cpus())
    sharers = mask_sharers(environ, rank.local_rank)
    if given:
        pin([int(cpu) for cpu in given.split(",")])
    elif sharers:
        pin(bound_cpus(trial, rank, usable, sharers))
    else:
        pin(rank_cpus(trial, rank, usable, gpus))
    own = processors(usable_cpus())
    driven = [gpus[device] for device in own_devices(trial, rank) if device < len(gpus)]
    beside = None if given else _claimed_beside([processor.cpu for processor in own], driven, folder)
    return Placement(
        cpus=tuple(sorted(processor.cpu for processor in own)),
        cores=tuple(processor.core for processor in sorted(own, key=lambda processor: processor.cpu)),
        numa_nodes=tuple(sorted({processor.node for processor in own})),
        gpu_numa_nodes=tuple(gpu.numa_node for gpu in driven),
        claimed_by=beside,
    )


def trial_claims(trial: Trial, ranks: Sequence[Rank], environ: Mapping[str, str]) -> list[str]:
    """Return the names of all that a trial's ranks of this host will use, as they will choose it themselves."""
    usable, gpus = processors(usable_cpus()), rank_gpus(trial, environ.get("CUDA_VISIBLE_DEVICES"))
    cpus = sorted({cpu for rank in ranks for cpu in rank_cpus(trial, rank, usable, gpus)})
    devices = [device for rank in ranks for device in own_devices(trial, settled(trial, rank, len(gpus)))]
    # Both threads of a core: another trial on one of them would take half of it.
    return [*cpu_names(siblings(cpus)), *(gpus[device].uuid for device in devices if device < len(gpus))]


def leave_place() -> None:
    """Give back what this process has claimed."""
    while _held:
        _held.pop().release()


def holder_of(folder: Path) -> str:
    """Return what a claim for the trial in a folder says of who holds it."""
    return f"process {os.getpid()}, trial {folder}"


def _claimed_beside(cpus: Sequence[int], gpus: Sequence[RankGpu], folder: Path) -> str | None:
    """Claim what a rank uses, as far as nobody has it; return which other trial has some of it."""
    claim = Claim(holder_of(folder))
    _held.append(claim)
    others = [claim.take([name]) for name in [*cpu_names(cpus), *(gpu.uuid for gpu in gpus)]]
    # The ranks of one trial may have to share, and its launcher may have claimed all of them before.
    return next((other for other in others if other is not None and not other.endswith(f"trial {folder}")), None)


def rank_cpus(
    trial: Trial,
    rank: Rank,
    usable: Sequence[Processor],
    gpus: Sequence[RankGpu] = (),
    *,
    hyper_threads: bool | None = None,
) -> tuple[int, ...]:
    """Return the CPUs of a rank among those that may be used on its node, which has these GPUs for ranks."""
    places = local_places(trial, rank)
    return own_cpus(
        usable,
        places=places,
        local_devices=rank.local_world_size * len(places),
        devices_per_node=trial.devices_per_node,
        threads=trial.threads_per_device,
        hyper_threads=trial.hyper_threads if hyper_threads is None else hyper_threads,
        near=[gpu.numa_node for gpu in gpus],
        # Without GPUs that can be counted it is the first ones that a trial on GPU takes.
        turn=turn(trial) if gpus or trial.device == "cpu" else 0,
    )


def bound_cpus(trial: Trial, rank: Rank, usable: Sequence[Processor], sharers: Sequence[int]) -> tuple[int, ...]:
    """Return the CPUs of a rank that a scheduler bound to `usable`, which the local ranks `sharers` have in common.

    They are cut for as many ranks as fit there, not for those of this trial: the same at every world size.
    """
    count = len(local_places(trial, rank))
    first = sharers.index(rank.local_rank) * count
    return own_cpus(
        usable,
        places=range(first, first + count),
        local_devices=len(sharers) * count,
        devices_per_node=max(1, len(usable) // trial.threads_per_device),
        threads=trial.threads_per_device,
        # The scheduler counted hardware threads.
        hyper_threads=True,
    )


def rank_gpus(trial: Trial, visible: str | None, system: Path = _SYSTEM) -> tuple[RankGpu, ...]:
    """Return the GPUs that ranks can take, as CUDA numbers them under this CUDA_VISIBLE_DEVICES; none on CPU."""
    if trial.device == "cpu":
        return ()
    from scalestudy.cluster.nvml import takeable_gpus

    return tuple(RankGpu(uuid, gpu_node(address, system)) for uuid, address in takeable_gpus(visible))
