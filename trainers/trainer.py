"""What one way to train in parallel must offer, and which ones there are."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.options import (
    DdpOptions,
    HorovodOptions,
    MirroredOptions,
    MultiWorkerOptions,
    Options,
    changes,
)
from scalestudy.trainers.record import Memory
from scalestudy.trainers.trial import Execution, Trial


class AllReduce(Protocol):
    """One message a device, and the framework's own collective for it."""

    def __call__(self) -> None:
        """Sum the messages of all devices; may return before the device is done."""

    def sums(self) -> list[NDArray[np.float32]]:
        """Return what every device of this process has got."""


class Trainer(Protocol):
    """One process of a trial; made by `Trainer(trial, rank)`, which meets the other ranks and no more."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        """Import is done; join the process group and take the device."""

    @staticmethod
    def visible_gpus() -> int:
        """Return how many GPUs the framework sees."""

    @staticmethod
    def cuda_build() -> str | None:
        """Return the version of CUDA that the framework is built with, None where it is built without."""

    @staticmethod
    def allocator_summary() -> str | None:
        """Return what the device's allocator holds, None where it was not used."""

    @staticmethod
    def allocator_refusals() -> int | None:
        """Return how many requests the device's allocator has refused, None where the framework does not count them."""

    def build(self) -> None:
        """Make model, optimizer and input, the parameters as `models.initial_parameters` has them."""

    def step(self) -> None:
        """Take one synchronous step, gradients exchanged; may return before the device is done."""

    def resident_step(self) -> None:
        """Take a step on one batch that lies on the device, gradients exchanged."""

    def local_step(self) -> None:
        """Take the same step with nothing exchanged: every device trains alone."""

    def exchange_step(self) -> None:
        """Exchange what a step exchanges, and compute nothing."""

    def exchanged_bytes(self) -> int | None:
        """Return the bytes of gradients that a step reduces on every device, None where that is not known."""

    def next_batch(self) -> None:
        """Take a batch from the input, and no step."""

    def batches_ahead(self) -> int:
        """Return how many batches the input may hold ready for this process, at the most; 0 where none is loaded."""

    def all_reduce(self, values: Callable[[int], NDArray[np.float32]]) -> "AllReduce":
        """Put `values` of every global rank on its device, to be summed; needs no `build`."""

    def kept(self) -> Callable[[], None]:
        """Keep all that a step changes; what is returned puts it back."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def device_timer(self) -> Callable[[], float | None]:
        """Start the device's own clock; what is returned waits for the device and returns seconds, None without one."""

    def loss(self) -> float:
        """Return the loss of this process' shard in the last step."""

    def test_accuracy(self) -> float | None:
        """Return the share of test images named rightly, or None without a test split."""

    def memory(self) -> Memory:
        """Return the process' peak, and the device allocator's since `reset_peaks` or, before it, since the start."""

    def reset_peaks(self) -> None:
        """Count the device allocator's peaks from what it holds now."""

    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        """Return the trainable parameters by the model spec's names and in its layout."""

    def replicas(self) -> tuple[Mapping[str, NDArray[np.float32]], ...]:
        """Return `parameters` of every device this process drives."""

    def max_over_ranks(self, value: float) -> float:
        """Return the largest value any rank gave: all ranks must call it, so it is a barrier too."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the framework and what it computes and communicates with."""

    def settings(self) -> dict[str, str | int]:
        """Return what else governs the framework, as it is in force: threads, memory format, …"""

    def close(self) -> None:
        """Leave the process group."""


@dataclass(frozen=True, kw_only=True)
class TrainerEntry:
    """Where a trainer lives and what the controller must know of it without importing a framework.

    `distributions` are what must be installed for it, `execution` is how its users run it unless they ask otherwise,
    `refused` says why another way does not exist, and `variables` must be set before anything of it is imported.
    """

    module: str
    class_name: str
    distributions: tuple[str, ...]
    execution: Execution
    options: type[Options]
    refused: Mapping[Execution, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    process_per_device: bool = True

    def load(self) -> type[Trainer]:
        """Import the framework and return the trainer's class."""
        os.environ.update(self.variables)
        trainer: type[Trainer] = getattr(import_module(self.module), self.class_name)
        return trainer


# Keras reads them once, and TensorFlow and Horovod import it. No user's keras.json, for which a device has no room: it
# may name another layout, type or backend than the one that is measured, or be damaged.
KERAS_VARIABLES = {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}

TRAINERS = {
    "torch-ddp": TrainerEntry(
        module="scalestudy.trainers.torch_ddp",
        class_name="TorchDdp",
        distributions=("torch",),
        execution="eager",
        options=DdpOptions,
    ),
    "tf-multiworker": TrainerEntry(
        module="scalestudy.trainers.tf_distribute",
        class_name="TfMultiWorker",
        distributions=("tensorflow",),
        execution="graph",
        options=MultiWorkerOptions,
        variables=KERAS_VARIABLES,
    ),
    "tf-mirrored": TrainerEntry(
        module="scalestudy.trainers.tf_distribute",
        class_name="TfMirrored",
        distributions=("tensorflow",),
        execution="graph",
        options=MirroredOptions,
        variables=KERAS_VARIABLES,
        process_per_device=False,
    ),
    "horovod-torch": TrainerEntry(
        module="scalestudy.trainers.horovod_torch",
        class_name="HorovodTorch",
        distributions=("torch", "horovod"),
        execution="eager",
        options=HorovodOptions,
        refused={"graph": "Horovod's exchange is started by a thread of the host, which no CUDA graph can capture"},
    ),
    "horovod-tf": TrainerEntry(
        module="scalestudy.trainers.horovod_tf",
        class_name="HorovodTf",
        distributions=("tensorflow", "horovod"),
        execution="graph",
        options=HorovodOptions,
        variables=KERAS_VARIABLES,
    ),
}


# What of a trainer's options a CPU does not have.
_OPTIONS_OF_GPUS: Mapping[tuple[str, object], str] = {
    ("communication_hook", "bf16"): "torch has it for NCCL alone; use 'fp16'",
    # Seen on resnet18 and two ranks: in its first steps each waits in the callback of another bucket.
    ("communication_hook", "powersgd"): "gloo's ranks wait for each other without end over several buckets; use 'fp16'",
    ("hierarchical_allreduce", True): "Horovod has it for NCCL alone; use false",
    ("implementation", "nccl"): "NCCL connects GPUs; use 'auto' or 'ring'",
    ("cross_device_ops", "nccl"): "NCCL connects GPUs; use 'auto'",
}


def refusal(trial: Trial) -> tuple[str, str] | None:
    """Return which field of a trial asks for what does not exist, and why it does not, or None."""
    entry = TRAINERS[trial.trainer]
    if trial.execution in entry.refused:
        return "execution", f"{trial.execution!r}: {trial.trainer}: {entry.refused[trial.execution]}"
    if trial.execution == "graph" and getattr(trial.options, "communication_hook", None) == "powersgd":
        return "execution", "'graph': PowerSGD decides on the host what each step sends; use 'eager' or 'compiled'"
    if trial.device == "cpu":
        if trial.execution == "graph" and entry.distributions[0] == "torch":
            return "execution", "'graph': torch has CUDA graphs alone, and the device is a cpu; use 'compiled'"
        if trial.precision == "tf32":
            return "precision", "'tf32': a format of NVIDIA GPUs, and the device is a cpu; use 'fp32' or 'bf16'"
        for name, value in trial.options.model_dump().items():
            if why := _OPTIONS_OF_GPUS.get((name, value)):
                return f"options.{trial.trainer}.{name}", f"{value!r}: the device is a cpu, and {why}"
    return None


def series_name(trial: Trial) -> str:
    """Return the trainer, and what is not as its users have it unasked: `torch-ddp compiled bucket_cap_mb=1`."""
    execution = trial.execution if trial.execution != TRAINERS[trial.trainer].execution else ""
    return " ".join(filter(None, [trial.trainer, execution, changes(trial.options)]))
