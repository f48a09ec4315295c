"""What this machine has, what is missing for which trainer or launcher, and how to get it."""

import importlib.metadata
import os
from dataclasses import dataclass
from typing import Literal

from scalestudy.cluster.host import this_host, usable_cpus
from scalestudy.launch import slurm_ask
from scalestudy.trainers.trainer import TRAINERS

_INSTALL = {
    "torch": "pip install 'scalestudy[torch]'",
    "tensorflow": "pip install 'scalestudy[tensorflow]' (or tensorflow-cpu where there is no NVIDIA GPU)",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's table; `advice` says how to get what is missing."""

    group: Literal["machine", "trainer", "launcher"]
    subject: str
    ready: bool
    detail: str
    advice: str = ""


def findings() -> list[Finding]:
    """Look at this machine; nothing is imported that takes long."""
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
    ]
    found += [_trainer(name, TRAINERS[name].distribution) for name in TRAINERS]
    found.append(Finding(group="launcher", subject="local", ready=True, detail="ranks as processes of this host"))
    found += [_slurm(), _ray()]
    return found


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


def _trainer(name: str, distribution: str) -> Finding:
    # The smaller build for hosts without a GPU is a distribution of its own.
    for candidate in (distribution, f"{distribution}-cpu"):
        try:
            version = importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
        return Finding(group="trainer", subject=name, ready=True, detail=f"{candidate} {version}")
    return Finding(
        group="trainer",
        subject=name,
        ready=False,
        detail=f"{distribution} is not installed here",
        advice=f"{_INSTALL[distribution]}, or name its Python under `environments` in the study",
    )
