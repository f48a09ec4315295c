"""What one host is and has: processor, memory, GPUs and their driver."""

import os
import platform
import resource
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from scalestudy.cluster.frozen import Frozen


class Host(Frozen):
    """The hardware and system of one host, as far as they are known."""

    name: str
    system: str
    cpu_model: str
    # The host's own, not the share that a scheduler lets this process use.
    cpu_count: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    nvidia_driver: str | None = None


class Topology(Frozen):
    """What is on offer: `nodes`, each with so many CPUs and GPUs."""

    nodes: int
    cpus_per_node: int
    gpus_per_node: int = 0

    @classmethod
    def of(cls, nodes: Sequence[tuple[int, int]], device: str, least: int) -> "Topology":
        """Return what those of the nodes have in common that hold `least` devices; a node is its CPUs and its GPUs.

        `auto` means GPUs where any node has so many. Where no node has, all are counted.
        """
        with_gpus = [node for node in nodes if node[1] >= least]
        fitting = with_gpus if with_gpus and device != "cpu" else [node for node in nodes if node[0] >= least]
        fitting = fitting or list(nodes)
        return cls(
            nodes=len(fitting),
            cpus_per_node=min((cpus for cpus, _ in fitting), default=0),
            gpus_per_node=min((gpus for _, gpus in fitting), default=0),
        )

    def devices_per_node(self, device: str) -> int:
        """Return how many devices a node has; on CPU a device is one CPU."""
        return self.gpus_per_node if device == "gpu" else self.cpus_per_node


def this_host() -> Host:
    """Describe the host this process runs on."""
    gpus, driver = nvidia_gpus()
    return Host(
        name=socket.gethostname(),
        system=f"{platform.system()} {platform.release()}",
        cpu_model=_cpu_model(),
        cpu_count=psutil.cpu_count() or len(usable_cpus()),
        memory_bytes=psutil.virtual_memory().total,
        gpus=gpus,
        nvidia_driver=driver,
    )


def usable_cpus() -> list[int]:
    """Return the logical CPUs this process may run on: a container or a job may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def nvidia_gpus() -> tuple[tuple[str, ...], str | None]:
    """Return the NVIDIA GPUs' names and the driver's version; nothing where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(pynvml.nvmlDeviceGetName(handle) for handle in handles), pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


def local_topology() -> Topology:
    """Return what this host offers."""
    return Topology(nodes=1, cpus_per_node=len(usable_cpus()), gpus_per_node=len(nvidia_gpus()[0]))


def pin(cpus: list[int]) -> None:
    """Keep this process, and the threads it will start, on the given CPUs."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def process_age_s() -> float:
    """Return the seconds since this process began, by its own host's clock."""
    # Field 22 of proc(5)'s stat, in clock ticks since the boot; the name in field 2 may hold spaces.
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def peak_resident_bytes() -> int:
    """Return the most memory this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
