"""What one host is and has: processor, memory, GPUs and their driver."""

import os
import platform
import resource
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from scalestudy.cluster.frozen import Frozen


class Host(Frozen):
    """The hardware and system of one host, as far as they are known."""

    name: str
    system: str
    cpu_model: str
    cpu_count: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    nvidia_driver: str | None = None


class Topology(Frozen):
    """Nodes and devices on offer: `devices_per_node` of one kind on each of `nodes`."""

    nodes: int
    devices_per_node: int
    device: str
    cpus_per_node: int

    @property
    def devices(self) -> int:
        """All devices on offer."""
        return self.nodes * self.devices_per_node


def this_host() -> Host:
    """Describe the host this process runs on."""
    gpus, driver = nvidia_gpus()
    return Host(
        name=socket.gethostname(),
        system=f"{platform.system()} {platform.release()}",
        cpu_model=_cpu_model(),
        cpu_count=len(usable_cpus()),
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


def local_topology(device: str) -> Topology:
    """Return what this host offers; on CPU a device is one core, on GPU one GPU."""
    cpus = len(usable_cpus())
    devices = len(nvidia_gpus()[0]) if device == "gpu" else cpus
    return Topology(nodes=1, devices_per_node=devices, device=device, cpus_per_node=cpus)


def pin(cpus: list[int]) -> None:
    """Keep this process, and the threads it will start, on the given CPUs."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def peak_resident_bytes() -> int:
    """Return the most memory this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
