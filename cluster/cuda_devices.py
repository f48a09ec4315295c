"""The GPUs of a host, and which of them CUDA shows to a process there."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from scalestudy.cluster.telemetry import Gpu

# From this driver on a process sees one compute instance of every GPU instance, and whole GPUs beside them. Before, it
# sees a single MIG instance and nothing else (NVIDIA's MIG user guide, "CUDA Device Enumeration").
_SEVERAL_INSTANCES = 570
# How one asks for no GPU at all, as against naming one that is not there.
_HIDE_ALL = re.compile(r"\s*(-\d.*|NoDevFiles|none|void)?\s*", re.IGNORECASE)
MIG_LIMIT = (
    "MIG instances cannot exchange gradients, NCCL refuses two ranks on one GPU: one instance alone can be measured, "
    "or switch MIG off (`nvidia-smi -mig 0`)"
)


class Failing(NamedTuple):
    """A GPU that is in the machine and cannot be used: what NVML says of it, and how to mend it."""

    name: str
    said: str
    advice: str


class Inventory(NamedTuple):
    """What NVML tells of a host: its GPUs that answer, MIG instances behind the GPU that they are part of.

    `fault` says what is wrong with a driver that does not work, `driver` is the version of one that does.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    failing: tuple[Failing, ...] = ()
    fault: str | None = None

    @property
    def whole(self) -> tuple[Gpu, ...]:
        """The GPUs themselves."""
        return tuple(gpu for gpu in self.gpus if not gpu.mig)


class Offer(NamedTuple):
    """How many GPUs a trial can have here; `fault` says why there are none where there should be some, `limit` why
    there are no more.
    """

    gpus: int = 0
    fault: str | None = None
    limit: str | None = None


def offer(listed: str | None, found: Inventory) -> Offer:
    """Return what is on offer to ranks that inherit `listed` as their CUDA_VISIBLE_DEVICES."""
    if listed is not None and _HIDE_ALL.fullmatch(listed):
        return Offer(limit=f"CUDA_VISIBLE_DEVICES={listed!r} hides all GPUs")
    if found.fault:
        return Offer(fault=found.fault)
    shown = visible_gpus(listed, found.gpus, found.driver)
    instances = any(gpu.mig for gpu in found.gpus)
    count = len(rank_gpus(listed, found))
    failing: dict[str, list[str]] = {}
    for name, said, _ in found.failing:
        failing.setdefault(said, []).append(name)
    why = [f"not working: {', '.join(names)} ({said})" for said, names in failing.items()]
    if listed is not None:
        what = len(shown) or "none: it names one that is not there, or one twice"
        why.append(f"CUDA_VISIBLE_DEVICES={listed!r} shows {what}")
    elif not instances and any(gpu.mig_mode for gpu in found.gpus):
        why.append("a GPU in MIG mode has no instance: create one, or switch MIG off (`nvidia-smi -mig 0`)")
    if len(shown) > count:
        why.append(MIG_LIMIT)
    if not shown and (found.gpus or found.failing):
        why += [found.failing[0].advice] if found.failing and not found.gpus else []
        there = len(found.whole) + len(found.failing)
        return Offer(fault=f"none of this host's {there} GPUs can be used: {'; '.join(why)}")
    return Offer(gpus=count, limit="; ".join(why) or None)


def rank_gpus(listed: str | None, found: Inventory) -> tuple[str, ...]:
    """Return the names of the devices that ranks can take, of those that CUDA shows: whole GPUs, or one instance.

    Ranks take devices by CUDA's numbers, the first ones up to how many there are: a GPU behind an instance is none.
    """
    shown = visible_gpus(listed, found.gpus, found.driver)
    instances = {gpu.name for gpu in found.gpus if gpu.mig}
    return tuple(takewhile(lambda name: name not in instances, shown)) or shown[:1]


def visible_gpus(listed: str | None, gpus: Sequence[Gpu], driver: str | None = None) -> tuple[str, ...]:
    """Return the names of the devices that CUDA shows, in its order: `listed` is CUDA_VISIBLE_DEVICES.

    As CUDA reads it: indices, or beginnings of UUIDs, and not both. What stands behind something it does not know is
    not seen, and a device that is named twice hides them all (torch's `_parse_visible_devices` was written after
    CUDA's own). Indices count the GPUs that can be used, MIG instances behind whole GPUs.
    """
    whole = [gpu for gpu in gpus if not gpu.mig and not gpu.mig_mode]
    first = _first_of_each([gpu for gpu in gpus if gpu.mig], driver)
    if listed is None:
        return _shown([*whole, *first], driver)
    chosen: list[Gpu] = []
    for token in _tokens(listed):
        if token.isdigit():
            there = [*whole, *first]
            here = there[int(token) : int(token) + 1]
        else:
            here = [gpu for gpu in gpus if any(name.startswith(token) for name in _uuids(gpu, gpus))]
        if len(here) != 1:
            break
        if here[0] in chosen:
            return ()
        chosen += here
    instances = {gpu.name: [part for part in first if _parent(part) == gpu.name] for gpu in gpus if gpu.mig_mode}
    return _shown([part for gpu in chosen for part in instances.get(gpu.name, [gpu])], driver)


def _tokens(listed: str) -> list[str]:
    """Return what a list names, up to the first that is of another kind than the first of all."""
    tokens = listed.split(",")
    prefix = listed[:4]
    if prefix in ("GPU-", "MIG-"):
        return list(takewhile(lambda token: token.startswith(prefix), tokens))
    # CUDA reads a number as strtoul does: what stands behind its digits does not matter.
    numbers = [re.match(r"\s*\+?(\d+)", token) for token in tokens]
    return [str(int(number[1])) for number in takewhile(bool, numbers) if number]


def _uuids(gpu: Gpu, gpus: Sequence[Gpu]) -> list[str]:
    """Return the names that CUDA knows a device by: drivers before 470 told MIG instances by their GPU and numbers."""
    if not gpu.mig:
        return [gpu.uuid]
    parent = next((whole.uuid for whole in gpus if whole.name == _parent(gpu)), "")
    return [gpu.uuid, f"MIG-{parent}/{gpu.gpu_instance}/{gpu.compute_instance}"]


def _parent(instance: Gpu) -> str:
    return instance.name.partition("/")[0]


def _first_of_each(instances: Sequence[Gpu], driver: str | None) -> list[Gpu]:
    """Return the first compute instance of every GPU instance: CUDA shows no more."""
    first: dict[object, Gpu] = {}
    for instance in instances:
        number: object = instance.name if instance.gpu_instance is None else instance.gpu_instance
        first.setdefault((_parent(instance), number if _several(driver) else None), instance)
    return list(first.values())


def _shown(chosen: Sequence[Gpu], driver: str | None) -> tuple[str, ...]:
    instances = _first_of_each([gpu for gpu in chosen if gpu.mig], driver)
    if instances and not _several(driver):
        return (instances[0].name,)
    return tuple(gpu.name for gpu in chosen if not gpu.mig or gpu in instances)


def _several(driver: str | None) -> bool:
    major = re.match(r"\d+", driver or "")
    return major is None or int(major[0]) >= _SEVERAL_INSTANCES
