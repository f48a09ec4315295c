"""Horovod on TensorFlow: one process a device, gradients averaged by Horovod's own Gloo (CPU) or NCCL (GPU)."""

import importlib.metadata
from collections.abc import Callable
from functools import cached_property
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from scalestudy.cluster.rank import Rank
from scalestudy.trainers import tf_data
from scalestudy.trainers.devices import own_devices
from scalestudy.trainers.horovod_rendezvous import join
from scalestudy.trainers.tf_trainer import TfAllReduce, TfTrainer, take_gpus
from scalestudy.trainers.trial import Trial


class HorovodTf(TfTrainer):
    """The trainer `horovod-tf`."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        super().__init__(trial, devices=1)
        self._rank = rank
        if trial.device == "gpu":
            take_gpus(own_devices(trial, rank))
        self._options = join(hvd, trial, rank)

    def build(self) -> None:
        self._build_network()
        for variable in self._network.variables:
            # Not hvd.broadcast_variables: it asks for .ref(), which a variable of Keras 3 does not have.
            variable.assign(hvd.broadcast(variable.value, root_rank=0))
        # One call for all gradients, also eagerly: tensor by tensor Horovod could fuse none. DistributedGradientTape
        # does so too, and like this leaves one rank alone; it would put the exchange into what XLA compiles.
        self._exchange = tf.function(self._average) if self._rank.world_size > 1 else list
        if self._trial.data.source == "synthetic":
            batch = tf_data.resident_batch(self._trial, self._rank.rank)
            self._train = self._program(lambda: self._train_on(*batch))
            self._batch = lambda: batch
        else:
            fed = tf_data.dataset(self._trial, range(self._rank.rank, self._rank.rank + 1), self._arrays)
            if self._trial.device == "gpu":
                # tf.distribute does so by itself.
                fed = fed.apply(tf.data.experimental.prefetch_to_device(tf.config.list_logical_devices("GPU")[0].name))
            batches = iter(fed)
            self._train = self._program(lambda: self._train_on(*next(batches)))
            self._batch = lambda: next(batches)

    @cached_property
    def _train_resident(self) -> Callable[[], Any]:  # type: ignore[override]
        batch = self._resident
        return self._program(lambda: self._train_on(*batch))

    @cached_property
    def _zeros(self) -> list[Any]:
        """As large as every gradient."""
        return [tf.zeros(variable.shape) for variable in self._network.trainable_variables]

    @cached_property
    def _train_local(self) -> Callable[[], Any]:  # type: ignore[override]
        batch = self._resident
        return self._program(lambda: self._train_on(*batch, exchange=list))

    def max_over_ranks(self, value: float) -> float:
        return float(hvd.allreduce(tf.constant(value, tf.float64), op=hvd.Max, name="largest").numpy())

    def exchange_step(self) -> None:
        self._exchange(self._zeros)

    def exchanged_bytes(self) -> int:
        return super().exchanged_bytes() // (2 if self._options.compression == "fp16" else 1)

    def all_reduce(self, values: Callable[[int], NDArray[np.float32]]) -> TfAllReduce:
        message = tf.constant(values(self._rank.rank))
        name = f"message.{message.shape[0]}"
        return TfAllReduce(lambda: hvd.allreduce(message, op=hvd.Sum, name=name), lambda summed: [summed])

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "horovod": importlib.metadata.version("horovod")}

    def settings(self) -> dict[str, str | int]:
        return {**super().settings(), "communication": "nccl" if self._trial.device == "gpu" else "gloo"}

    def close(self) -> None:
        hvd.shutdown()

    def _train_on(self, images: Any, labels: Any, exchange: Callable[[list[Any]], list[Any]] | None = None) -> Any:
        loss, gradients = self._gradients(images, labels)
        exchanged = (exchange or self._exchange)(gradients)
        self._optimizer.apply_gradients(zip(exchanged, self._network.trainable_variables, strict=True))
        return loss

    def _average(self, gradients: list[Any]) -> list[Any]:
        compression = getattr(hvd.Compression, self._options.compression)
        return [
            hvd.allreduce(gradient, op=hvd.Average, compression=compression, name=f"gradient.{index}")
            for index, gradient in enumerate(gradients)
        ]
