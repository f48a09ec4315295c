"""Where CPUs and GPUs sit in a host, and how ranks divide its CPUs between them.

Linux describes both in sysfs. Containers and virtual machines may hide parts of it: a CPU about which nothing is known
counts as a core of its own, on NUMA node 0.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from scalestudy.cluster.rotation import rotated

_SYSTEM = Path("/sys")


class Processor(NamedTuple):
    """A logical CPU; they sort so that neighbours share a NUMA node, a package, and a core."""

    node: int
    package: int
    # The kernel's number for the core: it orders the cores of a package, but does not name one (dies may reuse it).
    core_id: int
    # The lowest CPU of the core, which names it.
    core: int
    cpu: int


Core = tuple[Processor, ...]


def processors(cpus: Iterable[int], system: Path = _SYSTEM) -> list[Processor]:
    """Describe the given CPUs, sorted by NUMA node, core and hardware thread."""
    nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in (system / "devices/system/node").glob("node[0-9]*")
        for cpu in _numbers(folder / "cpulist")
    }
    return sorted(_processor(cpu, nodes.get(cpu, 0), system) for cpu in cpus)


def cores_of(usable: Iterable[Processor]) -> list[Core]:
    """Group sorted processors by core."""
    cores: dict[int, list[Processor]] = {}
    for processor in usable:
        cores.setdefault(processor.core, []).append(processor)
    return [tuple(threads) for threads in cores.values()]


def siblings(cpus: Iterable[int], system: Path = _SYSTEM) -> list[int]:
    """Return the CPUs and all that share a core with them, whoever may use those."""
    found = set(cpus)
    for cpu in list(found):
        found |= set(_numbers(system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    return sorted(found)


def listed_numbers(text: str) -> list[int]:
    """Return the numbers of Linux's lists, 0, 1, 2 and 8 of `0-2,8`; raises ValueError where it is no such list."""
    ranges = [part.partition("-") for part in text.strip().split(",")]
    return [number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)]


def gpu_node(pci_address: str | None, system: Path = _SYSTEM) -> int | None:
    """Return the NUMA node of the device at a PCI address as NVML writes it, None where it is not known."""
    # NVML writes the domain in eight digits and capitals, sysfs in four and small letters: 00000000:3B:00.0.
    domain, _, place = (pci_address or "").strip().lower().partition(":")
    with suppress(OSError, ValueError):
        node = int((system / f"bus/pci/devices/{int(domain, 16):04x}:{place}/numa_node").read_text(encoding="utf-8"))
        # -1: the firmware does not say.
        return node if node >= 0 else None
    return None


def own_cpus(
    usable: Sequence[Processor],
    *,
    places: range,
    local_devices: int,
    devices_per_node: int,
    threads: int,
    hyper_threads: bool,
    near: Sequence[int | None] = (),
    turn: int = 0,
) -> tuple[int, ...]:
    """Return the CPUs of a rank that has the `places` among the `local_devices` that its trial uses on this node.

    Every device has its own, the same at every world size, because they are cut for all devices that a node could use:
    as many as the study allows and as fit. `near` is the NUMA node of each GPU; without GPUs the shares of CPUs are
    the devices. Which of them the trial takes depends on the `turn` (`rotation`).
    """
    fitting = len(usable if hyper_threads else cores_of(usable)) // threads
    if fitting < local_devices:
        # This node has fewer cores than the study was told of.
        fitting = len(usable) // threads
    if fitting < local_devices:
        # Too few for all of them: a scheduler has given this rank its own, or the ranks must share.
        return tuple(sorted(processor.cpu for processor in usable))
    slots = min(devices_per_node, fitting)
    taken = rotated(turn, local_devices, len(near) or slots)
    others = [device for device in range(max(len(near), slots)) if device not in taken]
    # Where CPUs are too few for every GPU, the trial's own GPUs have theirs.
    cut = sorted([*taken, *others][:slots])
    dealt = shares(usable, slots, threads, [near[device] if device < len(near) else None for device in cut])
    return tuple(sorted(cpu for place in places for cpu in dealt[cut.index(taken[place])]))


def shares(
    usable: Sequence[Processor], slots: int, threads: int, near: Sequence[int | None] = ()
) -> list[tuple[int, ...]]:
    """Deal `threads` CPUs to each slot, on the NUMA node that `near` names for it if there is room.

    While there are enough cores every CPU is the first thread of a core that no other slot uses. If not, slots take
    cores with all their threads, and two slots share a core only where that cannot be avoided.
    """
    if slots * threads > len(usable):
        raise ValueError(f"{slots} × {threads} CPUs are asked for, there are {len(usable)}")
    cores = cores_of(usable)
    if slots * threads <= len(cores):
        cores = [core[:1] for core in cores]
    homes = [near[slot] if slot < len(near) else None for slot in range(slots)]
    dealt = _whole_cores(cores, threads, homes, by_node=True)
    if _missing(dealt, threads):
        # What is left over on several nodes may still make a share of whole cores.
        across = _whole_cores(cores, threads, homes, by_node=False)
        dealt = min(dealt, across, key=lambda found: _missing(found, threads))
    spare = sorted({cpu for core in cores for cpu in core} - {cpu for own in dealt for cpu in own})
    for own, home in zip(dealt, homes, strict=True):
        while len(own) < threads:
            beside = own[0].node if own else home
            own.append(spare.pop(next((i for i, cpu in enumerate(spare) if cpu.node == beside), 0)))
    return [tuple(sorted(processor.cpu for processor in own)) for own in dealt]


def _missing(dealt: Sequence[Sequence[Processor]], threads: int) -> int:
    return sum(threads - len(own) for own in dealt)


def _whole_cores(
    cores: Sequence[Core], threads: int, homes: Sequence[int | None], *, by_node: bool
) -> list[list[Processor]]:
    """Return each slot's CPUs on cores of its own; fewer than `threads` where the cores run out."""
    free = list(cores)
    dealt: list[list[Processor]] = [[] for _ in homes]
    packages: dict[int | None, int] = {core[0].node: core[0].package for core in cores}

    def take(slot: int, pool: Sequence[Core], least: int) -> None:
        picked = _picked(pool, threads)
        # First threads first: a core that is not needed whole gives up its later ones.
        found = [thread for threads_of in zip_longest(*picked) for thread in threads_of if thread is not None]
        if not dealt[slot] and len(found) >= least:
            dealt[slot] = found[:threads]
            for core in picked:
                free.remove(core)

    if by_node:
        for slot, home in enumerate(homes):
            if home is not None:
                take(slot, [core for core in free if core[0].node == home], threads)
        for slot, home in enumerate(homes):
            # Another node of the same package is nearer than one of another package.
            for node in sorted(packages, key=lambda node: (packages[node] != packages.get(home), node)):
                take(slot, [core for core in free if core[0].node == node], threads)
    for slot, home in enumerate(homes):
        take(slot, sorted(free, key=lambda core: core[0].node != home), 1)
    return dealt


def _picked(cores: Sequence[Core], threads: int) -> list[Core]:
    """Return cores that have `threads` threads together, with none to spare if possible; all of them if too few."""
    picked: list[Core] = []
    left = list(cores)
    while threads > 0 and left:
        # Large cores first: small ones make odd shares full at the end.
        fitting = [core for core in left if len(core) <= threads]
        core = max(fitting, key=len) if fitting else min(left, key=len)
        left.remove(core)
        picked.append(core)
        threads -= len(core)
    return picked


def _processor(cpu: int, node: int, system: Path) -> Processor:
    topology = system / f"devices/system/cpu/cpu{cpu}/topology"
    siblings = _numbers(topology / "thread_siblings_list")
    package, core_id = (next(iter(_numbers(topology / name)), -1) for name in ("physical_package_id", "core_id"))
    return Processor(
        node=node,
        package=max(package, 0),
        core_id=core_id if core_id >= 0 else cpu,
        core=min(siblings) if cpu in siblings else cpu,
        cpu=cpu,
    )


def _numbers(path: Path) -> list[int]:
    """Read sysfs' lists of numbers; nothing where there is no such file or it holds something else."""
    with suppress(OSError, ValueError):
        return listed_numbers(path.read_text(encoding="utf-8"))
    return []
