"""Which software, settings and environment variables govern a rank."""

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from scalestudy.cluster.host import usable_cpus
from scalestudy.trainers.record import Software
from scalestudy.trainers.trainer import Trainer

# Families of variables that change how fast or how precisely a rank computes, how it communicates, or which libraries
# it loads. A family, since every release of a library adds a member.
_GOVERNING = (
    # Frameworks and their compilers.
    *("ATEN_", "AUTOGRAPH_", "HOROVOD_", "IPEX_", "ITEX_", "KERAS_", "KINETO_", "NVFUSER_", "NVTE_", "PYTORCH_"),
    *("TENSORFLOW_", "TF_", "TF2_", "TORCH", "TRITON_", "XLA_"),
    # Mathematics, and the threads it runs on.
    *("ARMPL_", "BLIS_", "CUBLAS", "CUDNN_", "CUTLASS_", "DNNL_", "GOMP_", "GOTO_", "KMP_", "MKL_", "MKLDNN_", "NPY_"),
    *("NUMEXPR_", "NUMPY_", "NVIDIA_", "OMP_", "ONEDNN_", "OPENBLAS_", "TBB_", "VECLIB_"),
    # Devices.
    *("AMD_", "CUDA_", "DISABLE_ADDMM_", "FLASH_ATTENTION_", "GPU_", "HIP_", "HSA_", "MIOPEN_", "ONEAPI_", "ROCR_"),
    *("ROCM_", "SYCL_", "UR_", "ZE_"),
    # Communication.
    *("CCL_", "FI_", "GLOO_", "GRPC_", "IBV_", "I_MPI_", "MLX4_", "MLX5_", "MPICH_", "NCCL_", "NVSHMEM_", "OFI_NCCL_"),
    *("GDRCOPY_", "MPIR_CVAR_", "MV2_", "MVP_", "PMIX_MCA_", "PRTE_MCA_"),
    *("OMPI_MCA_", "PSM2_", "PSM3_", "RCCL_", "RDMAV_", "SHARP_", "UCC_", "UCX_"),
    # Memory, the dynamic linker and the interpreter; torch's two on Arm.
    *("GLIBC_TUNABLES", "HUGETLB_", "HWLOC_", "JEMALLOC_", "LD_", "MALLOC_", "MIMALLOC_", "PYTHON", "TCMALLOC_"),
    *("LRU_CACHE_CAPACITY", "THP_MEM_ALLOC_ENABLE"),
    # Decoding of images.
    *("JSIMD_", "OPENCV_", "PILLOW_"),
)
# Terraform's variables share TensorFlow's prefix, and may hold secrets. Others are a rank's own, a trial's, a job's, or
# say how an image was built.
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
    "NVIDIA_BUILD_",
    "NVIDIA_REQUIRE_",
    "OMPI_MCA_ess_",
    "OMPI_MCA_orte_",
    "PYTHONBREAKPOINT",
    "PYTHONHASHSEED",
    "PYTHONIOENCODING",
    "PYTHONSTARTUP",
    "PYTHONUNBUFFERED",
    "PYTHON_GET_PIP_",
    "PYTHON_PIP_VERSION",
    "PYTHON_SETUPTOOLS_VERSION",
    "PYTHON_SHA256",
    "PYTHON_VERSION",
    "TORCHELASTIC_RUN_ID",
    "TORCHINDUCTOR_CACHE_DIR",
)
_SECRET = re.compile(
    r"(^|_)(API_?KEYS?|AUTH|CREDENTIALS?|KEYS?|PASSPHRASE|PASSW(OR)?D|PAT|SECRETS?|TOKENS?)(_|$)", re.IGNORECASE
)
_USER_OF_URL = re.compile(r"//[^/@\s]+@")
# NVIDIA's libraries obey it whatever a framework asks for.
_TF32 = "NVIDIA_TF32_OVERRIDE"
# oneDNN's modes other than STRICT let what is fp32 be rounded to fewer bits.
_FPMATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE")


def capture(trainer: Trainer, environ: Mapping[str, str]) -> Software:
    """Describe the process that runs `trainer`."""
    return Software(
        python=platform.python_version(),
        versions={name: version_of(name) for name in ("scalestudy", "numpy")} | trainer.versions(),
        settings=trainer.settings(),
        cpus=tuple(usable_cpus()),
        variables={
            # What is not UTF-8 could not be written into a record.
            name: _USER_OF_URL.sub("//…@", value.encode(errors="backslashreplace").decode())
            for name, value in sorted(environ.items())
            if _governs(name)
        },
    )


def version_of(distribution: str) -> str:
    """Return a distribution's version, `unknown` where it is importable but not installed: it costs no trial."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def overruled(precision: str, device: str, environ: Mapping[str, str]) -> str | None:
    """Return which variable makes a device compute in another precision than a trial's, None where none does."""
    if device == "gpu":
        value, on = environ.get(_TF32), _tf32_override(environ)
        if on and precision == "fp32":
            return f"precision: {_TF32}={value} makes fp32 compute in TF32; unset it, or let the study ask for tf32"
        if on is False and precision == "tf32":
            return f"precision: {_TF32}=0 turns TF32 off; unset it, or let the study ask for fp32"
    elif precision == "fp32":
        for name in _FPMATH:
            if (value := environ.get(name)) and value.upper() != "STRICT":
                return (
                    f"precision: {name}={value} lets fp32 be rounded to fewer bits; unset it, or let the study ask for "
                    "bf16"
                )
    return None


def tf32_in_force(allowed: bool, device: str, environ: Mapping[str, str]) -> bool:
    """Return whether fp32 is computed in TF32, given what the framework allows."""
    on = _tf32_override(environ) if device == "gpu" else None
    return allowed if on is None else on


def _tf32_override(environ: Mapping[str, str]) -> bool | None:
    value = environ.get(_TF32, "").strip()
    # As a number is read: 00 is none.
    return bool(value.strip("+0")) if value else None


def _governs(name: str) -> bool:
    return name.startswith(_GOVERNING) and not name.startswith(_FOREIGN) and not _SECRET.search(name)
