import sys
from typing import cast

import pytest

from scalestudy.trainers.software import capture, overruled, tf32_in_force, version_of
from scalestudy.trainers.trainer import Trainer


class Described:
    """As much of a trainer as is asked for its software."""

    def versions(self) -> dict[str, str]:
        return {"torch": "2.13.0"}

    def settings(self) -> dict[str, str | int]:
        return {"intra_op": 1}


def kept(environ: dict[str, str]) -> dict[str, str]:
    return capture(cast(Trainer, Described()), environ).variables


def test_what_governs_a_rank_is_kept_and_nothing_that_may_be_secret() -> None:
    environ = {
        "OMP_NUM_THREADS": "1",
        "NCCL_IB_DISABLE": "1",
        "TF_XLA_FLAGS": "--tf_xla_auto_jit=2",
        "TF_VAR_password": "hunter2",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "PATH": "/bin",
        "HOROVOD_CACHE_CAPACITY": "1024",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "1234",
    }
    found = capture(cast(Trainer, Described()), environ)
    assert set(found.variables) == {"OMP_NUM_THREADS", "NCCL_IB_DISABLE", "TF_XLA_FLAGS", "HOROVOD_CACHE_CAPACITY"}
    assert found.versions["torch"] == "2.13.0"
    assert found.settings == {"intra_op": 1}


def test_what_is_unzipped_and_not_installed_costs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where installed distributions are looked for: nowhere.
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    assert version_of("scalestudy") == "unknown"
    assert capture(cast(Trainer, Described()), {}).versions == {
        "scalestudy": "unknown",
        "numpy": "unknown",
        "torch": "2.13.0",
    }


@pytest.mark.parametrize(
    "name",
    [
        "ATEN_CPU_CAPABILITY",
        "ONEDNN_MAX_CPU_ISA",
        "DNNL_DEFAULT_FPMATH_MODE",
        "NVIDIA_TF32_OVERRIDE",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        "TORCHINDUCTOR_MAX_AUTOTUNE",
        "TORCHDYNAMO_DISABLE",
        "TRITON_CACHE_DIR",
        "GOMP_CPU_AFFINITY",
        "GOMP_SPINCOUNT",
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "MALLOC_ARENA_MAX",
        "MALLOC_CONF",
        "GLIBC_TUNABLES",
        "TCMALLOC_RELEASE_RATE",
        "MIMALLOC_LARGE_OS_PAGES",
        "FI_PROVIDER",
        "UCX_TLS",
        "UCC_TLS",
        "RDMAV_FORK_SAFE",
        "IBV_FORK_SAFE",
        "MLX5_SINGLE_THREADED",
        "OMPI_MCA_btl",
        "PMIX_MCA_gds",
        "MV2_ENABLE_AFFINITY",
        "MPIR_CVAR_CH4_OFI_ENABLE_RMA",
        "DISABLE_ADDMM_CUDA_LT",
        "GPU_MAX_HW_QUEUES",
        "HUGETLB_MORECORE",
        "CUBLAS_WORKSPACE_CONFIG",
        "CUBLASLT_WORKSPACE_SIZE",
        "CUDNN_LOGLEVEL_DBG",
        "NVTE_FLASH_ATTN",
        "OFI_NCCL_PROTOCOL",
        "KERAS_BACKEND",
        "KERAS_HOME",
        "TF_ENABLE_ONEDNN_OPTS",
        "TF2_BEHAVIOR",
        "VECLIB_MAXIMUM_THREADS",
        "BLIS_NUM_THREADS",
        "GOTO_NUM_THREADS",
        "OPENBLAS_CORETYPE",
        "NPY_DISABLE_CPU_FEATURES",
        "NUMEXPR_MAX_THREADS",
        "TBB_NUM_THREADS",
        "PYTHONMALLOC",
        "PYTHONOPTIMIZE",
        "PYTHONPATH",
        "PYTHON_GIL",
        "THP_MEM_ALLOC_ENABLE",
        "LRU_CACHE_CAPACITY",
    ],
)
def test_families_that_change_speed_precision_or_the_choice_of_libraries_are_kept(name: str) -> None:
    assert kept({name: "1"}) == {name: "1"}


@pytest.mark.parametrize(
    "name",
    [
        "TF_TOKEN_app_terraform_io",
        "TORCH_HUB_TOKEN",
        "KERAS_API_KEY",
        "NCCL_SECRET",
        "HOROVOD_SECRET_KEY",
        "GRPC_PROXY_PASSWORD",
        "CUDA_REGISTRY_PASSWD",
        "LD_SDK_KEY",
        "TF_AWS_CREDENTIALS",
        "tf_token",
        "PYTORCH_HF_APIKEY",
        # A rank's own, a trial's, or what a container's image says of how it was built.
        "HOROVOD_RANK",
        "OMPI_COMM_WORLD_RANK",
        "TORCHELASTIC_RUN_ID",
        "PYTHONBREAKPOINT",
        "PYTHONHASHSEED",
        "PYTHON_SHA256",
        "NVIDIA_REQUIRE_CUDA",
        # Nobody's that we know.
        "HOME",
        "FISH_VERSION",
    ],
)
def test_secrets_and_what_is_the_ranks_own_are_not_kept(name: str) -> None:
    assert kept({name: "hunter2"}) == {}


def test_a_partition_key_is_no_secret_and_a_url_loses_its_password() -> None:
    assert kept({"NCCL_IB_PKEY": "3"}) == {"NCCL_IB_PKEY": "3"}
    assert kept({"GRPC_PROXY": "http://me:hunter2@proxy:3128/x"}) == {"GRPC_PROXY": "http://…@proxy:3128/x"}


@pytest.mark.parametrize(
    ("device", "precision", "variables", "in_force"),
    [
        ("gpu", "fp32", {"NVIDIA_TF32_OVERRIDE": "1"}, "NVIDIA_TF32_OVERRIDE=1 makes fp32 compute in TF32"),
        ("gpu", "tf32", {"NVIDIA_TF32_OVERRIDE": "0"}, "NVIDIA_TF32_OVERRIDE=0 turns TF32 off"),
        # What the trial asks for anyhow.
        ("gpu", "fp32", {"NVIDIA_TF32_OVERRIDE": "0"}, None),
        ("gpu", "tf32", {"NVIDIA_TF32_OVERRIDE": "1"}, None),
        ("gpu", "bf16", {"NVIDIA_TF32_OVERRIDE": "1"}, None),
        ("gpu", "fp32", {"NVIDIA_TF32_OVERRIDE": ""}, None),
        ("gpu", "fp32", {"NVIDIA_TF32_OVERRIDE": " 00"}, None),
        ("gpu", "tf32", {"NVIDIA_TF32_OVERRIDE": " 0 "}, "NVIDIA_TF32_OVERRIDE=0 turns TF32 off"),
        # No library of NVIDIA's computes there.
        ("cpu", "fp32", {"NVIDIA_TF32_OVERRIDE": "1"}, None),
        ("cpu", "fp32", {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, "ONEDNN_DEFAULT_FPMATH_MODE=BF16 lets fp32"),
        ("cpu", "fp32", {"DNNL_DEFAULT_FPMATH_MODE": "any"}, "DNNL_DEFAULT_FPMATH_MODE=any lets fp32"),
        ("cpu", "fp32", {"TF_SET_ONEDNN_FPMATH_MODE": "BF16"}, "TF_SET_ONEDNN_FPMATH_MODE=BF16 lets fp32"),
        ("cpu", "fp32", {"ONEDNN_DEFAULT_FPMATH_MODE": "strict"}, None),
        ("cpu", "bf16", {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, None),
    ],
)
def test_a_variable_that_overrules_the_precision_is_named(
    device: str, precision: str, variables: dict[str, str], in_force: str | None
) -> None:
    found = overruled(precision, device, variables)
    assert found is None if in_force is None else found is not None and found.startswith(f"precision: {in_force}")


@pytest.mark.parametrize(
    ("device", "allowed", "override", "in_force"),
    [
        ("gpu", False, "1", True),
        ("gpu", True, "0", False),
        ("gpu", True, None, True),
        ("gpu", False, None, False),
        ("cpu", False, "1", False),
    ],
)
def test_tf32_is_what_nvidias_libraries_do_and_not_what_the_framework_believes(
    device: str, allowed: bool, override: str | None, in_force: bool
) -> None:
    environ = {} if override is None else {"NVIDIA_TF32_OVERRIDE": override}
    assert tf32_in_force(allowed, device, environ) is in_force
