"""What this machine has, what is missing for which trainer or launcher, and how to get it."""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from scalestudy.cluster.host import this_host, usable_cpus
from scalestudy.cluster.host_counters import HostCounters
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
# A framework on a cold network file system takes its time.
_PROBE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's table; `advice` says how to get what is missing."""

    group: Literal["machine", "trainer", "launcher"]
    subject: str
    ready: bool
    detail: str
    advice: str = ""


def findings(programs: Mapping[str, Program]) -> list[Finding]:
    """Look at this machine; each trainer's framework is imported by its own interpreter, or else by this one."""
    host = this_host()
    gpus = (
        f"{len(host.gpus)} × {host.gpus[0]}, driver {host.nvidia_driver}" if host.gpus else "none with an NVIDIA driver"
    )
    found = [
        Finding(
            group="machine",
            subject="CPU",
            ready=True,
            detail=f"{len(usable_cpus())} usable CPUs, {host.cpu_model}",
        ),
        Finding(group="machine", subject="memory", ready=True, detail=f"{host.memory_bytes / 2**30:.0f} GiB"),
        Finding(
            group="machine",
            subject="GPU",
            ready=bool(host.gpus),
            detail=gpus,
            advice="" if host.gpus else "trials run on CPU; for GPUs install NVIDIA's driver",
        ),
        _cpu_energy(),
    ]
    with ThreadPoolExecutor(len(usable_cpus())) as pool:
        found += pool.map(lambda name: _trainer(name, programs.get(name, sys.executable), len(host.gpus)), TRAINERS)
    found.append(Finding(group="launcher", subject="local", ready=True, detail="ranks as processes of this host"))
    found += [_slurm(), _ray()]
    return found


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


def _slurm() -> Finding:
    try:
        nodes = slurm_ask.nodes()
    except slurm_ask.SlurmError as error:
        return Finding(
            group="launcher",
            subject="slurm",
            ready=False,
            detail=str(error),
            advice="use a login node; with Slurm elsewhere, set SLURM_CONF to its slurm.conf",
        )
    gpus = sum(node.gpus for node in nodes)
    return Finding(
        group="launcher",
        subject="slurm",
        ready=True,
        detail=f"{sum(node.up for node in nodes)} of {len(nodes)} nodes are up, {gpus} GPUs in all",
    )


def _trainer(name: str, program: Program, gpus: int) -> Finding:
    if not isinstance(program, str):
        detail = f"{program.runtime} container {program.image}, which is not looked into from outside"
        return Finding(group="trainer", subject=name, ready=True, detail=detail)
    try:
        told = subprocess.run(
            [program, "-m", "scalestudy.trainers.probe", name],
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=_PROBE_S,
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
    return Finding(
        group="trainer",
        subject=name,
        ready=found.gpus == gpus,
        detail=f"{program}: Python {found.python}, {versions}; sees {found.gpus} of {gpus} GPUs",
        advice="" if found.gpus == gpus else "install a build of it with CUDA, for this driver",
    )
