"""What one host is and has: processor, memory, GPUs and their driver."""

import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from scalestudy.cluster.cgroup import cpu_quota, memory_limit_bytes
from scalestudy.cluster.cuda_devices import offer
from scalestudy.cluster.frozen import Frozen
from scalestudy.cluster.processors import cores_of, processors


class Host(Frozen):
    """The hardware and system of one host, as far as they are known."""

    name: str
    system: str
    cpu_model: str
    # The host's own, not the share that a scheduler lets this process use.
    cpu_count: int
    # What a container or a job may have of it, where that is less.
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    nvidia_driver: str | None = None


class NodeOffer(NamedTuple):
    """What one node has: logical CPUs, GPUs, and physical cores where they are known."""

    cpus: int
    gpus: int
    cores: int | None = None


class Topology(Frozen):
    """What is on offer: `nodes`, each with so many logical CPUs, physical cores and GPUs.

    Where a node has GPUs and none can be used, `gpu_fault` says why; `gpu_limit` says why there are no more.
    """

    nodes: int
    cpus_per_node: int
    # None where only CPUs are counted: each may then be a core or one of its hardware threads.
    cores_per_node: int | None = None
    gpus_per_node: int = 0
    gpu_fault: str | None = None
    gpu_limit: str | None = None
    # Why there are no more CPUs, where that is not what the host has.
    cpu_limit: str | None = None

    @classmethod
    def of(cls, nodes: Sequence[NodeOffer], device: str, least: int) -> "Topology":
        """Return what those of the nodes have in common that hold `least` devices.

        `auto` means GPUs where any node has so many. Where no node has, all are counted.
        """
        with_gpus = [node for node in nodes if node.gpus >= least]
        fitting = with_gpus if with_gpus and device != "cpu" else [node for node in nodes if node.cpus >= least]
        fitting = fitting or list(nodes)
        cores = [node.cores for node in fitting if node.cores is not None]
        return cls(
            nodes=len(fitting),
            cpus_per_node=min((node.cpus for node in fitting), default=0),
            cores_per_node=min(cores) if cores and len(cores) == len(fitting) else None,
            gpus_per_node=min((node.gpus for node in fitting), default=0),
        )

    def devices_per_node(self, device: str) -> int:
        """Return how many devices a node has; on CPU a device is a core, as far as cores are known."""
        if device == "gpu":
            return self.gpus_per_node
        return self.cpus_per_node if self.cores_per_node is None else self.cores_per_node

    def why_no_more(self, device: str) -> str:
        """Return in brackets why a node has no more devices, if there is more to it than how many it has."""
        why = self.gpu_limit if device == "gpu" else self.cpu_limit
        return f" ({why})" if why else ""


def this_host() -> Host:
    """Describe the host this process runs on."""
    gpus, driver = nvidia_gpus()
    return Host(
        name=socket.gethostname(),
        system=f"{platform.system()} {platform.release()}",
        cpu_model=_cpu_model(),
        cpu_count=psutil.cpu_count() or len(usable_cpus()),
        memory_bytes=min(psutil.virtual_memory().total, memory_limit_bytes() or sys.maxsize),
        gpus=gpus,
        nvidia_driver=driver,
    )


def usable_cpus() -> list[int]:
    """Return the logical CPUs this process may run on: a container or a job may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def allowed_cpus(count: int) -> tuple[int, str | None]:
    """Return how many of `count` CPUs this process' quota keeps busy, one at least, and in words why no more."""
    quota = cpu_quota()
    if quota is None or quota >= count:
        return count, None
    return max(1, int(quota)), f"a quota gives {quota:.3g} of {count} CPUs"


def nvidia_gpus() -> tuple[tuple[str, ...], str | None]:
    """Return the models of the NVIDIA GPUs that answer, and the driver's version; nothing where there are none."""
    from scalestudy.cluster.nvml import inventory

    found = inventory()
    return tuple(gpu.model for gpu in found.whole), found.driver


def local_topology(environ: Mapping[str, str] = os.environ) -> Topology:
    """Return what this host offers to ranks that inherit `environ`: GPUs as CUDA will show them."""
    from scalestudy.cluster.nvml import inventory

    cpus = usable_cpus()
    cores = len(cores_of(processors(cpus)))
    allowed, limit = allowed_cpus(len(cpus))
    offered = offer(environ.get("CUDA_VISIBLE_DEVICES"), inventory())
    return Topology(
        nodes=1,
        cpus_per_node=allowed,
        cores_per_node=min(cores, allowed),
        cpu_limit=limit,
        gpus_per_node=offered.gpus,
        gpu_fault=offered.fault,
        gpu_limit=offered.limit,
    )


def pin(cpus: Iterable[int]) -> None:
    """Keep this process, and the threads it will start, on the given CPUs."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def process_age_s() -> float:
    """Return the seconds since this process began, by its own host's clock."""
    # Field 22 of proc(5)'s stat, in clock ticks since the boot; the name in field 2 may hold spaces.
    started_ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def peak_resident_bytes() -> int:
    """Return the most memory this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
