"""tf.distribute with a custom training loop over Keras 3 models: MultiWorkerMirroredStrategy and MirroredStrategy."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.distribute.cross_device_ops import CollectiveAllReduce

from scalestudy.cluster.rank import Rank
from scalestudy.trainers import keras_models, tf_data
from scalestudy.trainers.devices import own_devices
from scalestudy.trainers.options import MirroredOptions, MultiWorkerOptions
from scalestudy.trainers.tf_trainer import TfAllReduce, TfTrainer, take_gpus
from scalestudy.trainers.trial import Device, Trial


class _TfDistribute(TfTrainer):
    """What the two strategies share; `ranks` are those whose devices this process drives."""

    _strategy: Any
    _ranks: range

    def build(self) -> None:
        # As Keras 3 does it.
        self._summed_over = self._trial.world_size
        with self._strategy.scope():
            self._build_network()
        # The step closes over its input: as an argument it would be taken apart and checked anew at every call.
        if self._trial.data.source == "synthetic":
            batch = self._resident_batch()
            self._train = self._program(lambda: self._strategy.run(self._replica_step, args=batch))
            self._batch = lambda: batch
        else:
            batches = iter(
                self._strategy.distribute_datasets_from_function(
                    lambda _: tf_data.dataset(self._trial, self._ranks, self._arrays)
                )
            )
            self._train = self._program(lambda: self._strategy.run(self._replica_step, args=next(batches)))
            self._batch = lambda: next(batches)

    def exchange_step(self) -> None:
        self._exchange_alone()

    def all_reduce(self, values: Callable[[int], NDArray[np.float32]]) -> TfAllReduce:
        messages = self._distributed(lambda rank: tf.constant(values(rank)))
        return TfAllReduce(
            lambda: self._strategy.run(_summed, args=(messages,)), self._strategy.experimental_local_results
        )

    def loss(self) -> float:
        losses = self._strategy.experimental_local_results(self._loss)
        return float(np.mean([loss.numpy() for loss in losses]))

    def replicas(self) -> tuple[Mapping[str, NDArray[np.float32]], ...]:
        by_name = {
            name: self._strategy.experimental_local_results(variable.value)
            for name, variable in keras_models.named_variables(self._network).items()
        }
        return tuple(
            {name: keras_models.to_spec_layout(values[i].numpy()) for name, values in by_name.items()}
            for i in range(len(self._ranks))
        )

    def max_over_ranks(self, value: float) -> float:
        largest = self._largest(tf.constant(value, tf.float64))
        return float(self._strategy.experimental_local_results(largest)[0].numpy())

    def settings(self) -> dict[str, str | int]:
        extended = self._strategy.extended
        operations = extended._cross_device_ops
        # One class for every hint; the hint decides who carries the gradients.
        collective = isinstance(operations, CollectiveAllReduce)
        hint = extended._communication_options.implementation.value.lower()
        return {**super().settings(), "communication": hint if collective else type(operations).__name__}

    def close(self) -> None:
        # Nobody may leave while another rank still waits in a collective; the strategy has no close of its own.
        # Once one rank is through, all have come here; whoever then finds its peer gone has waited long enough.
        with suppress(tf.errors.OpError):
            self.max_over_ranks(0.0)

    @cached_property
    def _largest(self) -> Callable[[Any], Any]:
        return tf.function(  # type: ignore[no-any-return]
            lambda value: self._strategy.run(
                lambda: tf.reduce_max(tf.distribute.get_replica_context().all_gather(value[None], axis=0))
            )
        )

    @cached_property
    def _zeros(self) -> list[Any]:
        """As large as every gradient, on every device."""
        return [
            self._distributed(lambda _, shape=variable.shape: tf.zeros(shape))
            for variable in self._network.trainable_variables
        ]

    @cached_property
    def _exchange_alone(self) -> Callable[[], Any]:
        zeros = self._zeros
        return self._program(lambda: self._strategy.run(_summed, args=(zeros,)))

    @cached_property
    def _train_resident(self) -> Callable[[], Any]:  # type: ignore[override]
        batch = self._resident
        return self._program(lambda: self._strategy.run(self._replica_step, args=batch))

    @cached_property
    def _local_networks(self) -> list[tuple[Any, Any, Any, Any]]:
        """A plain network, its optimizer, images and labels on each device.

        The variables of a strategy are written by all replicas or by none.
        """
        made = []
        local = (self._strategy.experimental_local_results(part) for part in self._resident)
        for images, labels in zip(*local, strict=True):
            with tf.device(images.device):
                made.append((*self._made(), images, labels))
        return made

    @cached_property
    def _train_local(self) -> Callable[[], Any]:  # type: ignore[override]
        steps = [
            (self._passes(network, optimizer), network, optimizer, images, labels)
            for network, optimizer, images, labels in self._local_networks
        ]

        def train() -> None:
            for passes, network, optimizer, images, labels in steps:
                with tf.device(images.device):
                    _, gradients = passes(images, labels)
                    optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))

        return self._program(train)

    def _resident_batch(self) -> tuple[Any, Any]:
        """Return images and labels with each replica's own on its device."""
        images, labels = (
            self._distributed(lambda rank, part=part: tf_data.resident_batch(self._trial, rank)[part])
            for part in (0, 1)
        )
        return images, labels

    def _distributed(self, values: Callable[..., Any]) -> Any:
        """Return the values of every global rank, each on its device."""
        devices = self._strategy.extended.worker_devices

        def on_its_device(context: Any) -> Any:
            rank = context.replica_id_in_sync_group
            # The strategy itself leaves all of them on the first device.
            with tf.device(devices[rank - self._ranks.start]):
                return tf.identity(values(rank))

        return self._strategy.experimental_distribute_values_from_function(on_its_device)

    def _replica_step(self, images: Any, labels: Any) -> Any:
        loss, gradients = self._gradients(images, labels)
        if self._trial.precision == "fp16":
            gradients[0] += _nan_unless_finite_everywhere(gradients)
        self._optimizer.apply_gradients(zip(gradients, self._network.trainable_variables, strict=True))
        return loss


class TfMultiWorker(_TfDistribute):
    """The trainer `tf-multiworker`: one process a device, a gRPC ring (CPU) or NCCL (GPU)."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        super().__init__(trial, devices=1)
        assert isinstance(trial.options, MultiWorkerOptions)
        if trial.device == "gpu":
            take_gpus(own_devices(trial, rank))
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=communication_options(trial.options, trial.device)
        )
        self._ranks = range(rank.rank, rank.rank + 1)


def communication_options(options: MultiWorkerOptions, device: Device) -> Any:
    """Return TensorFlow's CommunicationOptions; on GPUs `auto` is NCCL.

    TensorFlow's runtime takes NCCL only where the hint says `nccl`. Left to itself it sends what lies on GPUs through
    the host, in a ring over gRPC (`GetCollectiveName` in collective_param_resolver_local.cc).
    """
    hint = "nccl" if options.implementation == "auto" and device == "gpu" else options.implementation
    return tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=options.bytes_per_pack,
        implementation=tf.distribute.experimental.CommunicationImplementation[hint.upper()],
    )


class TfMirrored(_TfDistribute):
    """The trainer `tf-mirrored`: one process drives every device of its node; on CPU a device is a logical one."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        super().__init__(trial, devices=trial.world_size)
        assert isinstance(trial.options, MirroredOptions)
        if trial.device == "gpu":
            take_gpus(own_devices(trial, rank))
        else:
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * trial.world_size)
        devices = [device.name for device in tf.config.list_logical_devices(trial.device.upper())]
        operations = {
            "auto": lambda: None,
            "nccl": tf.distribute.NcclAllReduce,
            "hierarchical_copy": tf.distribute.HierarchicalCopyAllReduce,
            "reduction_to_one_device": tf.distribute.ReductionToOneDevice,
        }[trial.options.cross_device_ops]
        self._strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=operations())
        self._ranks = range(trial.world_size)


def _summed(messages: Any) -> Any:
    """Return the sum over replicas, as Keras' optimizers have it of gradients."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, messages)


def _nan_unless_finite_everywhere(gradients: list[Any]) -> Any:
    """Return 0, or NaN on every replica where any has a gradient that is not finite.

    Keras' LossScaleOptimizer looks at each replica's own gradients, before they are exchanged: replicas that disagree
    would wait for each other without end, or drift apart.
    """
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
    bad = tf.distribute.get_replica_context().all_reduce("SUM", tf.where(finite, 0.0, 1.0))
    return tf.where(bad > 0, np.nan, 0.0)
