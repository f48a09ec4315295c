"""Which CPUs a rank computes on: its own share of its node, near its GPUs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from scalestudy.cluster.claims import Claim
from scalestudy.cluster.cpu_claims import cpu_names
from scalestudy.cluster.host import pin, usable_cpus
from scalestudy.cluster.processors import Processor, gpu_node, own_cpus, processors, siblings
from scalestudy.cluster.rank import Rank
from scalestudy.cluster.slurm_step import mask_sharers
from scalestudy.trainers.record import Placement
from scalestudy.trainers.trial import Trial

# CPUs that a launcher chose for a rank.
GIVEN = "SCALESTUDY_CPUS"
_SYSTEM = Path("/sys")
_held: list[Claim] = []


def take_place(trial: Trial, rank: Rank, environ: Mapping[str, str], folder: Path) -> Placement:
    """Pin this process, and all threads that it will start, to the rank's CPUs; return where that is.

    What a rank takes is claimed for its trial, which lies in `folder`, until it leaves its place: whoever has it
    already is in the placement.
    """
    gpus = gpu_nodes(trial, environ.get("CUDA_VISIBLE_DEVICES"))
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
    beside = None if given else _claimed_beside(trial, rank, [processor.cpu for processor in own], environ, folder)
    return Placement(
        cpus=tuple(sorted(processor.cpu for processor in own)),
        cores=tuple(processor.core for processor in sorted(own, key=lambda processor: processor.cpu)),
        numa_nodes=tuple(sorted({processor.node for processor in own})),
        gpu_numa_nodes=tuple(gpus[device] for device in _devices(trial, rank) if device < len(gpus)),
        claimed_by=beside,
    )


def trial_claims(trial: Trial, ranks: Sequence[Rank], environ: Mapping[str, str]) -> list[str]:
    """Return the names of all that a trial's ranks of this host will use, as they will choose it themselves."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    usable, near = processors(usable_cpus()), gpu_nodes(trial, visible)
    cpus = sorted({cpu for rank in ranks for cpu in rank_cpus(trial, rank, usable, near)})
    devices = [device for rank in ranks for device in _devices(trial, rank)]
    # Both threads of a core: another trial on one of them would take half of it.
    return [*cpu_names(siblings(cpus)), *_gpu_names(trial, devices, visible)]


def leave_place() -> None:
    """Give back what this process has claimed."""
    while _held:
        _held.pop().release()


def holder_of(folder: Path) -> str:
    """Return what a claim for the trial in a folder says of who holds it."""
    return f"process {os.getpid()}, trial {folder}"


def _claimed_beside(
    trial: Trial, rank: Rank, cpus: Sequence[int], environ: Mapping[str, str], folder: Path
) -> str | None:
    """Claim what a rank uses, as far as nobody has it; return which other trial has some of it."""
    claim = Claim(holder_of(folder))
    _held.append(claim)
    gpus = _gpu_names(trial, _devices(trial, rank), environ.get("CUDA_VISIBLE_DEVICES"))
    others = [claim.take([name]) for name in [*cpu_names(cpus), *gpus]]
    # The ranks of one trial may have to share, and its launcher may have claimed all of them before.
    return next((other for other in others if other is not None and not other.endswith(f"trial {folder}")), None)


def _gpu_names(trial: Trial, devices: Sequence[int], visible: str | None) -> list[str]:
    if trial.device == "cpu":
        return []
    from scalestudy.cluster.nvml import visible_uuids

    # Of instances too: two of one GPU are for two users.
    uuids = visible_uuids(visible)
    return [uuids[device] for device in devices if device < len(uuids)]


def rank_cpus(
    trial: Trial,
    rank: Rank,
    usable: Sequence[Processor],
    gpus: Sequence[int | None] = (),
    *,
    hyper_threads: bool | None = None,
) -> tuple[int, ...]:
    """Return the CPUs of a rank among those that may be used on its node; `gpus` are the NUMA nodes of its GPUs."""
    return own_cpus(
        usable,
        devices=_devices(trial, rank),
        local_devices=rank.local_world_size * len(_devices(trial, rank)),
        devices_per_node=trial.devices_per_node,
        threads=trial.threads_per_device,
        hyper_threads=trial.hyper_threads if hyper_threads is None else hyper_threads,
        near=gpus,
    )


def bound_cpus(trial: Trial, rank: Rank, usable: Sequence[Processor], sharers: Sequence[int]) -> tuple[int, ...]:
    """Return the CPUs of a rank that a scheduler bound to `usable`, which the local ranks `sharers` have in common.

    They are cut for as many ranks as fit there, not for those of this trial: the same at every world size.
    """
    count = len(_devices(trial, rank))
    first = sharers.index(rank.local_rank) * count
    return own_cpus(
        usable,
        devices=range(first, first + count),
        local_devices=len(sharers) * count,
        devices_per_node=max(1, len(usable) // trial.threads_per_device),
        threads=trial.threads_per_device,
        # The scheduler counted hardware threads.
        hyper_threads=True,
    )


def gpu_nodes(trial: Trial, visible: str | None, system: Path = _SYSTEM) -> tuple[int | None, ...]:
    """Return the NUMA node of each GPU that CUDA shows, None where it is not known; nothing for a trial on CPU."""
    if trial.device == "cpu":
        return ()
    from scalestudy.cluster.nvml import visible_pci_addresses

    return tuple(gpu_node(address, system) for address in visible_pci_addresses(visible))


def _devices(trial: Trial, rank: Rank) -> range:
    """Return which of its node's devices a rank drives."""
    count = trial.world_size // rank.world_size
    return range(rank.local_rank * count, (rank.local_rank + 1) * count)
