"""The doctor's reasons why a framework sees no GPU, on the messages that the frameworks write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalestudy.launch.doctor import unusable
from scalestudy.trainers.probe import Probe
from scalestudy.trainers.trainer import TRAINERS

SCALESTUDY = Path(sys.executable).with_name("scalestudy")
# As TensorFlow 2.21 and torch 2.13 wrote them; `Cannot dlopen` stands so in TensorFlow's library.
CANNOT_DLOPEN = (
    "W0000 00:00:1795582018.519724   31601 gpu_device.cc:2436] Cannot dlopen some GPU libraries. Please make sure the "
    "missing libraries mentioned above are installed properly\nSkipping registering GPU devices...\n"
)
CUINIT = (
    "E0000 00:00:1795582018.519724   31601 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error: Failed "
    "call to cuInit: UNKNOWN ERROR (303)\n"
)
INITIALIZATION = (
    "/venv/torch/cuda/__init__.py:1170: UserWarning: CUDA initialization: CUDA unknown error - this may be due to an "
    "incorrectly set up environment\n  r = torch._C._cuda_getDeviceCount()\n"
)


def probe(**changes: object) -> Probe:
    fields = {"python": "3.11", "versions": {"torch": "2.13.0"}, "gpus": 0, "cuda": "13.0", "driver_cuda": "13.1"}
    fields |= {"allowed": "0,1"}
    return Probe.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("found", "said", "why", "advice"),
    [
        (probe(versions={"tensorflow-cpu": "2.21"}, cuda=None), "", "tensorflow-cpu is built without CUDA", "and-cuda"),
        (probe(cuda=None, driver_cuda=None), "", "torch is built without CUDA", "--force-reinstall torch"),
        (probe(driver_cuda=None), "", "the driver's libcuda.so.1 is not found", "--nv"),
        (
            probe(driver_cuda="12.9"),
            "",
            "torch is built for CUDA 13.0, and the driver runs CUDA 12.9 at most",
            "update the driver, or install a build of torch for CUDA 12",
        ),
        # Its interpreter is a script that sets it.
        (probe(allowed=""), CUINIT, "CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"),
        (probe(gpus=1, allowed="0"), "", "CUDA_VISIBLE_DEVICES is '0'", "unset CUDA_VISIBLE_DEVICES"),
        # The variable that the GPUs were counted under explains nothing.
        (
            probe(versions={"tensorflow": "2.21"}, cuda="12.5.1", allowed="0,1"),
            CANNOT_DLOPEN,
            "Cannot dlopen some GPU libraries",
            "pip install 'tensorflow[and-cuda]'",
        ),
        (
            probe(versions={"tensorflow-cpu": "2.21"}, cuda="12.5.1"),
            CANNOT_DLOPEN,
            "Cannot dlopen some GPU libraries",
            "pip uninstall tensorflow-cpu",
        ),
        # A build for an older minor version runs on any driver of its major version.
        (
            probe(versions={"tensorflow": "2.21"}, cuda="12.5.1", driver_cuda="12.2"),
            CANNOT_DLOPEN,
            "Cannot dlopen some GPU libraries",
            "pip install 'tensorflow[and-cuda]'",
        ),
        (
            probe(),
            CUINIT,
            "failed call to cuInit: INTERNAL: CUDA error: Failed call to cuInit: UNKNOWN ERROR (303)",
            "",
        ),
        (
            probe(),
            INITIALIZATION,
            "CUDA initialization: CUDA unknown error - this may be due to an incorrectly set up environment",
            "nvidia-smi",
        ),
        (probe(), "", "torch does not say why", "nvidia-smi"),
        (probe(gpus=2, nccl=False), "", "Horovod is built without NCCL", "trainers/horovod.sh"),
        (probe(gpus=2, nccl=True), CUINIT, "", ""),
    ],
)
def test_why_gpus_cannot_be_used_and_how_to_mend_it(found: Probe, said: str, why: str, advice: str) -> None:
    told, mend = unusable(found, 2, said, listed="0,1")
    assert told == why
    assert advice in mend


def test_without_a_gpu_nothing_is_amiss() -> None:
    assert unusable(probe(cuda=None, driver_cuda=None, nccl=False), 0, "") == ("", "")


@pytest.mark.parametrize(
    ("found", "why", "advice"),
    [
        (
            probe(cuda=None, driver_cuda=None),
            "torch is built without CUDA, and Slurm's nodes have GPUs",
            "envs TENSORFLOW=tensorflow,",
        ),
        (
            probe(versions={"tensorflow-cpu": "2.21"}, cuda=None, driver_cuda=None),
            "tensorflow-cpu is built without CUDA, and Slurm's nodes have GPUs",
            "tensorflow[and-cuda]",
        ),
        (
            probe(driver_cuda=None, nccl=False),
            "Horovod is built without NCCL, and Slurm's nodes have GPUs",
            "HOROVOD_GPU_OPERATIONS=NCCL trainers/horovod.sh",
        ),
        (
            probe(versions={"tensorflow": "2.21"}, driver_cuda=None, cudnn=False),
            "no cuDNN is installed for it, and Slurm's nodes have GPUs",
            "tensorflow[and-cuda]",
        ),
        # A login node has no driver, and need not have one.
        (probe(driver_cuda=None, nccl=True), "", ""),
    ],
)
def test_on_a_login_node_the_gpus_are_those_of_the_nodes(found: Probe, why: str, advice: str) -> None:
    told, mend = unusable(found, 0, "", slurm_gpus=32)
    assert told == why
    assert advice in mend


@pytest.mark.slow
def test_the_doctor_asks_each_interpreter_what_it_sees(nvml_standin: Path) -> None:
    """Eight GPUs, one in MIG mode, that only NVML knows of: no framework here can see one, and each must say why."""
    environ = {**os.environ, "LD_LIBRARY_PATH": str(nvml_standin), "COLUMNS": "500"}
    told = subprocess.run([SCALESTUDY, "doctor"], capture_output=True, text=True, env=environ, check=True).stdout
    lines = {words[2]: line for line in told.splitlines() if len(words := line.split()) > 2}
    assert {"CPU", "GPU", "local", "slurm", "ray", *TRAINERS} <= lines.keys()
    for name in ("torch-ddp", "tf-mirrored", "tf-multiworker"):
        assert lines[name].startswith("no")
        assert "sees 0 of 7 GPUs: t" in lines[name]
        # Which of the two it is depends on the builds that are installed.
        assert "is built without CUDA" in lines[name] or "the driver's libcuda.so.1 is not found" in lines[name]
