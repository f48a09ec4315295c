"""What a trainer finds in this interpreter: `python -m scalestudy.trainers.probe TRAINER` prints it as JSON."""

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import sys

from scalestudy.cluster.frozen import Frozen
from scalestudy.trainers.trainer import TRAINERS


class Probe(Frozen):
    """Versions by distribution, how many GPUs the framework sees, and what that depends on.

    `cuda` is the version that the framework is built with, `driver_cuda` the newest that the driver here can run,
    `cudnn` is whether its environment or this host has that library of CUDA's, `allowed` is CUDA_VISIBLE_DEVICES, and
    `nccl` is whether Horovod is built with it.
    """

    python: str
    versions: dict[str, str]
    gpus: int
    cuda: str | None = None
    driver_cuda: str | None = None
    cudnn: bool = True
    allowed: str | None = None
    nccl: bool | None = None


def probe(name: str) -> Probe:
    """Import a trainer's framework and ask it; raises ImportError where it is not there."""
    entry = TRAINERS[name]
    trainer = entry.load()
    # There if the trainer has just imported it.
    horovod = sys.modules.get(f"horovod.{entry.distributions[0]}")
    return Probe(
        python=platform.python_version(),
        versions=dict(map(_installed, entry.distributions)),
        gpus=trainer.visible_gpus(),
        cuda=trainer.cuda_build(),
        driver_cuda=_driver_cuda(),
        cudnn=_cudnn(),
        allowed=os.environ.get("CUDA_VISIBLE_DEVICES"),
        nccl=horovod and bool(horovod.nccl_built()),
    )


def _driver_cuda() -> str | None:
    """Ask the driver as a framework finds it, which in a container is not as the host does."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cudnn() -> bool:
    """Look for cuDNN among what pip has installed, and where the loader looks."""
    packages = (str(package.metadata["Name"]) for package in importlib.metadata.distributions())
    return any(name.startswith("nvidia-cudnn") for name in packages) or ctypes.util.find_library("cudnn") is not None


def _installed(distribution: str) -> tuple[str, str]:
    # The smaller TensorFlow for hosts without a GPU is a distribution of its own.
    for candidate in (f"{distribution}-cpu", distribution):
        try:
            return candidate, importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return distribution, "unknown version"


if __name__ == "__main__":
    # By itself on the last line, whatever a framework prints when it is imported.
    sys.stdout.flush()
    sys.stdout.buffer.write(f"\n{probe(sys.argv[1]).model_dump_json()}\n".encode())
