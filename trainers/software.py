"""Which software, threads and environment variables govern a rank."""

import platform
from collections.abc import Mapping
from importlib.metadata import version

from scalestudy.cluster.host import usable_cpus
from scalestudy.trainers.record import Software
from scalestudy.trainers.trainer import Trainer

# Variables that change what a framework computes with, or how it communicates.
_GOVERNING = (
    "CUDA_",
    "GLOO_",
    "GRPC_",
    "KMP_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "OPENBLAS_",
    "TF_",
    "TORCH_",
    "XLA_",
)
# Terraform's variables share TensorFlow's prefix, and may hold secrets.
_FOREIGN = ("TF_CLI_", "TF_TOKEN_", "TF_VAR_")


def capture(trainer: Trainer, environ: Mapping[str, str]) -> Software:
    """Describe the process that runs `trainer`."""
    return Software(
        python=platform.python_version(),
        versions={"scalestudy": version("scalestudy"), "numpy": version("numpy"), **trainer.versions()},
        threads=trainer.threads(),
        cpus=tuple(usable_cpus()),
        variables={
            name: value
            for name, value in sorted(environ.items())
            if name.startswith(_GOVERNING) and not name.startswith(_FOREIGN)
        },
    )
