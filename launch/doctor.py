"""What this machine has, what is missing for which trainer or launcher, and how to get it."""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from scalestudy.cluster.cuda_devices import offer
from scalestudy.cluster.host import this_host, usable_cpus
from scalestudy.cluster.host_counters import HostCounters
from scalestudy.cluster.nvml import inventory
from scalestudy.launch import slurm_ask
from scalestudy.launch.launcher import Program
from scalestudy.trainers.probe import Probe
from scalestudy.trainers.trainer import TRAINERS

# By the module that an interpreter does not find.
_INSTALL = {
    "torch": "pip install 'scalestudy[torch]'",
    "tensorflow": "pip install 'scalestudy[tensorflow]' (or tensorflow-cpu where there is no NVIDIA GPU)",
    "horovod": "make horovod, or for another Python: trainers/horovod.sh PYTHON",
    "scalestudy": "install scalestudy there too: PYTHON -m pip install . in its repository",
}
# How to get a build for GPUs where there is one without.
_WITH_CUDA = {
    "torch": "PYTHON -m pip install --force-reinstall torch, from an index whose torch has CUDA, as PyPI's has",
    "tensorflow": "PYTHON -m pip uninstall tensorflow-cpu, then PYTHON -m pip install 'tensorflow[and-cuda]', in an "
    "environment without torch",
}
_MAKE_WITHOUT_A_GPU = "HOROVOD_GPU_OPERATIONS=NCCL make envs TENSORFLOW=tensorflow"
# What a framework writes when it cannot use the GPUs.
_COMPLAINT = re.compile(
    "Could not load dynamic library.*|Cannot dlopen some GPU libraries|CUDA initialization: .*"
    "|failed call to cuInit: .*"
)
# A framework on a cold network file system takes its time.
_PROBE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's table; `ready` is null for what it cannot look into, `advice` says how to get it."""

    group: Literal["machine", "trainer", "launcher"]
    subject: str
    ready: bool | None
    detail: str
    advice: str = ""


def findings(programs: Mapping[str, Program]) -> list[Finding]:
    """Look at this machine; each trainer's framework is imported by its own interpreter, or else by this one."""
    host = this_host()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    usable = offer(listed, inventory()).gpus
    found = [
        Finding(
            group="machine",
            subject="CPU",
            ready=True,
            detail=f"{len(usable_cpus())} usable CPUs, {host.cpu_model}",
        ),
        Finding(group="machine", subject="memory", ready=True, detail=f"{host.memory_bytes / 2**30:.0f} GiB"),
        *gpu_findings(listed),
        _cpu_energy(),
    ]
    slurm, slurm_gpus = _slurm()
    with ThreadPoolExecutor(len(usable_cpus())) as pool:
        found += pool.map(lambda name: _trainer(name, programs.get(name, sys.executable), usable, slurm_gpus), TRAINERS)
    found.append(Finding(group="launcher", subject="local", ready=True, detail="ranks as processes of this host"))
    found += [slurm, _ray()]
    return found


def gpu_findings(listed: str | None) -> list[Finding]:
    """Say which GPUs there are and how many of them a trial can have, and of each that fails how to mend it."""
    found = inventory()
    offered = offer(listed, found)
    models = Counter(gpu.model for gpu in found.whole)
    what = ", ".join(f"{count} × {model}" for model, count in models.items())
    if what:
        what += f", driver {found.driver or 'of unknown version'}; trials can use {offered.gpus}"
    there = found.whole or found.failing or found.fault
    why = found.fault or offered.fault or offered.limit
    first = Finding(
        group="machine",
        subject="GPU",
        ready=bool(offered.gpus),
        detail="; ".join(filter(None, [what, why])) if there else "none with an NVIDIA driver",
        advice="" if there else "trials run on CPU; for GPUs install NVIDIA's driver",
    )
    rest = [
        Finding(group="machine", subject=name, ready=False, detail=said, advice=advice)
        for name, said, advice in found.failing
    ]
    return [first, *rest]


def _cpu_energy() -> Finding:
    why_not = HostCounters().missing.get("host energy_j")
    if why_not is None:
        return Finding(group="machine", subject="CPU energy", ready=True, detail="RAPL can be read")
    advice = "energy per image on CPU needs a host that shows its RAPL counters; virtual machines rarely do"
    if "Permission" in why_not:
        advice = "an administrator can let users read it: chmod o+r /sys/class/powercap/intel-rapl*/energy_uj"
    return Finding(group="machine", subject="CPU energy", ready=False, detail=why_not, advice=advice)


def _ray() -> Finding:
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            group="launcher",
            subject="ray",
            ready=False,
            detail="ray is not installed here",
            advice="pip install 'scalestudy[ray]'",
        )
    address = os.environ.get("RAY_ADDRESS")
    where = f"RAY_ADDRESS is {address}" if address else "RAY_ADDRESS is not set: a cluster of this host, if one runs"
    return Finding(group="launcher", subject="ray", ready=True, detail=f"ray {version}; {where}")


def _slurm() -> tuple[Finding, int]:
    """Look at the cluster; returns the GPUs of its nodes, too."""
    try:
        nodes = slurm_ask.nodes()
    except slurm_ask.SlurmError as error:
        advice = "use a login node; with Slurm elsewhere, set SLURM_CONF to its slurm.conf"
        return Finding(group="launcher", subject="slurm", ready=False, detail=str(error), advice=advice), 0
    gpus = sum(node.gpus for node in nodes)
    detail = f"{sum(node.up for node in nodes)} of {len(nodes)} nodes are up, {gpus} GPUs in all"
    return Finding(group="launcher", subject="slurm", ready=True, detail=detail), gpus


def _trainer(name: str, program: Program, gpus: int, slurm_gpus: int) -> Finding:
    if not isinstance(program, str):
        detail = f"{program.runtime} container {program.image}, which is not looked into from outside"
        return Finding(group="trainer", subject=name, ready=None, detail=detail)
    try:
        told = subprocess.run(
            [program, "-m", "scalestudy.trainers.probe", name],
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=_PROBE_S,
            # Warnings of TensorFlow's say why it sees no GPU.
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "1"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(group="trainer", subject=name, ready=False, detail=f"{program}: {error}")
    if told.returncode:
        said = (told.stderr.strip().splitlines() or [f"ended with exit code {told.returncode}"])[-1]
        missing = re.search(r"No module named '(\w+)", said)
        advice = _INSTALL.get(missing[1], "") if missing else ""
        or_else = "or name another Python for it under `environments` in the study"
        return Finding(
            group="trainer",
            subject=name,
            ready=False,
            detail=f"{program}: {said}",
            advice=f"{advice}, {or_else}" if advice else or_else.removeprefix("or "),
        )
    found = Probe.model_validate_json(told.stdout.strip().splitlines()[-1])
    versions = ", ".join(f"{distribution} {version}" for distribution, version in found.versions.items())
    why, advice = unusable(found, gpus, told.stderr, slurm_gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Finding(
        group="trainer",
        subject=name,
        ready=not why,
        detail=f"{program}: Python {found.python}, {versions}; sees {found.gpus} of {gpus} GPUs" + (why and f": {why}"),
        advice=advice,
    )


def unusable(found: Probe, gpus: int, said: str, slurm_gpus: int = 0, listed: str | None = None) -> tuple[str, str]:
    """Return why a trainer cannot use all GPUs of this host, or those of Slurm's nodes, and how to mend it.

    Both are empty where it can. `said` is what its framework wrote meanwhile, and `listed` the CUDA_VISIBLE_DEVICES
    under which `gpus` were counted. A login node has no GPU of its own, and its environments are those of the nodes.
    """
    framework = next(iter(found.versions))
    usual = framework.removesuffix("-cpu")
    complaint = _COMPLAINT.search(said)
    where = "" if gpus else ", and Slurm's nodes have GPUs"
    if not found.cuda:
        if found.gpus >= gpus and not slurm_gpus:
            return "", ""
        make = "make envs" if gpus else _MAKE_WITHOUT_A_GPU
        return f"{framework} is built without CUDA{where}", f"{make}, or: {_WITH_CUDA[usual]}"
    if found.gpus >= gpus:
        if slurm_gpus and usual == "tensorflow" and not found.cudnn:
            return (
                "no cuDNN is installed for it, and Slurm's nodes have GPUs",
                f"{_MAKE_WITHOUT_A_GPU}, or: {_WITH_CUDA[usual]}",
            )
        if found.nccl is False and (gpus or slurm_gpus):
            on = "on this host" if gpus else "where nvcc is"
            return (
                f"Horovod is built without NCCL{where}",
                f"{on}: HOROVOD_GPU_OPERATIONS=NCCL trainers/horovod.sh PYTHON",
            )
        return "", ""
    if found.driver_cuda is None:
        return (
            "the driver's libcuda.so.1 is not found",
            "install NVIDIA's driver; start a container with its GPUs (apptainer --nv, docker --gpus all)",
        )
    if _major(found.driver_cuda) < _major(found.cuda):
        return (
            f"{framework} is built for CUDA {found.cuda}, and the driver runs CUDA {found.driver_cuda} at most",
            f"update the driver, or install a build of {framework} for CUDA {_major(found.driver_cuda)}",
        )
    if complaint and "dl" in complaint[0]:
        return complaint[0], f"make envs, or: {_WITH_CUDA[usual]}"
    if found.allowed != listed:
        return f"CUDA_VISIBLE_DEVICES is {found.allowed!r}", "unset CUDA_VISIBLE_DEVICES"
    return complaint[0] if complaint else f"{framework} does not say why", "nvidia-smi must list them all"


def _major(version: str) -> int:
    return int(version.partition(".")[0])
