"""Which software, settings and environment variables govern a rank."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from scalestudy.cluster.host import usable_cpus
from scalestudy.trainers.record import Software
from scalestudy.trainers.trainer import Trainer

# Variables that change what a framework computes with, or how it communicates.
_GOVERNING = (
    "CUDA_",
    "GLOO_",
    "GRPC_",
    "HOROVOD_",
    "KMP_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "OPENBLAS_",
    "TF_",
    "TORCH",
    "XLA_",
)
# Terraform's variables share TensorFlow's prefix, and may hold secrets. Others are a rank's own, or a trial's.
_FOREIGN = (
    "TF_CLI_",
    "TF_TOKEN_",
    "TF_VAR_",
    "HOROVOD_CROSS_",
    "HOROVOD_GLOO_RENDEZVOUS_",
    "HOROVOD_HOSTNAME",
    "HOROVOD_LOCAL_",
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "TORCHINDUCTOR_CACHE_DIR",
)


def capture(trainer: Trainer, environ: Mapping[str, str]) -> Software:
    """Describe the process that runs `trainer`."""
    return Software(
        python=platform.python_version(),
        versions={name: version_of(name) for name in ("scalestudy", "numpy")} | trainer.versions(),
        settings=trainer.settings(),
        cpus=tuple(usable_cpus()),
        variables={
            # What is not UTF-8 could not be written into a record.
            name: value.encode(errors="backslashreplace").decode()
            for name, value in sorted(environ.items())
            if name.startswith(_GOVERNING) and not name.startswith(_FOREIGN)
        },
    )


def version_of(distribution: str) -> str:
    """Return a distribution's version, `unknown` where it is importable but not installed: it costs no trial."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
