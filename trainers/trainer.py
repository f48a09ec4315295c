"""What one way to train in parallel must offer, and which ones there are."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.record import Memory
from scalestudy.trainers.trial import Trial


class Trainer(Protocol):
    """One process of a trial; made by `Trainer(trial, rank)`, which meets the other ranks and no more."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        """Import is done; join the process group and take the device."""

    def build(self) -> None:
        """Make model, optimizer and input, the parameters as `models.initial_parameters` has them."""

    def step(self) -> None:
        """Take one synchronous step, gradients exchanged; may return before the device is done."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def loss(self) -> float:
        """Return the loss of this process' shard in the last step."""

    def test_accuracy(self) -> float | None:
        """Return the share of test images named rightly, or None without a test split."""

    def memory(self) -> Memory:
        """Return peaks since the process began."""

    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        """Return the trainable parameters by the model spec's names and in its layout."""

    def replicas(self) -> tuple[Mapping[str, NDArray[np.float32]], ...]:
        """Return `parameters` of every device this process drives."""

    def max_over_ranks(self, value: float) -> float:
        """Return the largest value any rank gave: all ranks must call it, so it is a barrier too."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the framework and what it computes and communicates with."""

    def threads(self) -> dict[str, int]:
        """Return the framework's thread settings as they are in force."""

    def close(self) -> None:
        """Leave the process group."""


@dataclass(frozen=True, kw_only=True)
class TrainerEntry:
    """Where a trainer lives and what the controller must know of it without importing a framework."""

    module: str
    class_name: str
    distribution: str
    execution: str
    process_per_device: bool = True

    def load(self) -> type[Trainer]:
        """Import the framework and return the trainer's class."""
        trainer: type[Trainer] = getattr(import_module(self.module), self.class_name)
        return trainer


TRAINERS = {
    "torch-ddp": TrainerEntry(
        module="scalestudy.trainers.torch_ddp",
        class_name="TorchDdp",
        distribution="torch",
        execution="eager",
    ),
    "tf-multiworker": TrainerEntry(
        module="scalestudy.trainers.tf_distribute",
        class_name="TfMultiWorker",
        distribution="tensorflow",
        execution="graph",
    ),
    "tf-mirrored": TrainerEntry(
        module="scalestudy.trainers.tf_distribute",
        class_name="TfMirrored",
        distribution="tensorflow",
        execution="graph",
        process_per_device=False,
    ),
}
