"""tf.distribute with a custom training loop over Keras 3 models: MultiWorkerMirroredStrategy and MirroredStrategy."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

# Read by Keras once, when it is imported.
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from scalestudy.cluster.host import peak_resident_bytes
from scalestudy.cluster.rank import Rank
from scalestudy.trainers import keras_models, tf_data
from scalestudy.trainers.data import load_arrays
from scalestudy.trainers.models import initial_parameters, model_spec
from scalestudy.trainers.record import Memory
from scalestudy.trainers.trial import ADAM_BETAS, ADAM_EPSILON, Optimizer, Trial


class _TfDistribute:
    """What the two strategies share; `ranks` are those whose devices this process drives."""

    def __init__(self, trial: Trial, strategy: Any, ranks: range) -> None:
        self._trial = trial
        self._strategy = strategy
        self._ranks = ranks

    def build(self) -> None:
        spec = model_spec(self._trial.model, self._trial.data)
        with self._strategy.scope():
            self._network = keras_models.build(spec)
            keras_models.load(self._network, initial_parameters(spec, self._trial.seed))
            self._optimizer = make_optimizer(self._trial.optimizer)
            self._optimizer.build(self._network.trainable_variables)
        self._arrays = load_arrays(self._trial.data)
        # The step closes over its input: as an argument it would be taken apart and checked anew at every call.
        if self._trial.data.source == "synthetic":
            batch = self._resident_batch()
            self._train = tf.function(lambda: self._strategy.run(self._replica_step, args=batch))
        else:
            batches = iter(
                self._strategy.distribute_datasets_from_function(
                    lambda _: tf_data.dataset(self._trial, self._ranks, self._arrays)
                )
            )
            self._train = tf.function(lambda: self._strategy.run(self._replica_step, args=next(batches)))
        self._largest = tf.function(
            lambda value: self._strategy.run(
                lambda: tf.reduce_max(tf.distribute.get_replica_context().all_gather(value[None], axis=0))
            )
        )

    def step(self) -> None:
        self._loss = self._train()

    def synchronize(self) -> None:
        if self._trial.device == "gpu":
            tf.test.experimental.sync_devices()

    def loss(self) -> float:
        losses = self._strategy.experimental_local_results(self._loss)
        return float(np.mean([loss.numpy() for loss in losses]))

    def test_accuracy(self) -> float | None:
        if self._arrays is None:
            return None
        images, labels = tf_data.to_nhwc(self._arrays.test_images), self._arrays.test_labels
        logits = np.concatenate(
            [self._network(images[i : i + 256], training=False).numpy() for i in range(0, len(images), 256)]
        )
        return float(np.mean(logits.argmax(axis=1) == labels))

    def memory(self) -> Memory:
        if self._trial.device != "gpu":
            return Memory(peak_resident_bytes=peak_resident_bytes())
        peaks = [
            tf.config.experimental.get_memory_info(device.name.removeprefix("/device:"))["peak"]
            for device in tf.config.list_logical_devices("GPU")
        ]
        return Memory(peak_resident_bytes=peak_resident_bytes(), peak_allocated_bytes=max(peaks))

    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        return self.replicas()[0]

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

    def versions(self) -> dict[str, str]:
        build = tf.sysconfig.get_build_info()
        found = {"tensorflow": tf.__version__, "keras": keras.__version__}
        if self._trial.device == "gpu":
            found |= {name: str(build[f"{name}_version"]) for name in ("cuda", "cudnn")}
        return found

    def threads(self) -> dict[str, int]:
        return {
            "intra_op": tf.config.threading.get_intra_op_parallelism_threads(),
            "inter_op": tf.config.threading.get_inter_op_parallelism_threads(),
        }

    def close(self) -> None:
        # Nobody may leave while another rank still waits in a collective; the strategy has no close of its own.
        # Once one rank is through, all have come here; whoever then finds its peer gone has waited long enough.
        with suppress(tf.errors.OpError):
            self.max_over_ranks(0.0)

    def _resident_batch(self) -> tuple[Any, Any]:
        """Return images and labels with each replica's own on its device."""
        images, labels = (
            self._strategy.experimental_distribute_values_from_function(
                lambda context, part=part: tf_data.resident_batch(self._trial, context.replica_id_in_sync_group)[part]
            )
            for part in (0, 1)
        )
        return images, labels

    def _replica_step(self, images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = self._network(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            # Keras 3 sums the replicas' gradients; the step wants their mean.
            share = loss / self._trial.world_size
        variables = self._network.trainable_variables
        self._optimizer.apply_gradients(zip(tape.gradient(share, variables), variables, strict=True))
        return loss


class TfMultiWorker(_TfDistribute):
    """The trainer `tf-multiworker`: one process a device, a gRPC ring (CPU) or NCCL (GPU)."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        _configure(trial, devices=1)
        communication = tf.distribute.experimental.CommunicationImplementation
        if trial.device == "gpu":
            gpus = tf.config.list_physical_devices("GPU")
            tf.config.set_visible_devices(gpus[rank.local_rank], "GPU")
            tf.config.experimental.set_memory_growth(gpus[rank.local_rank], True)
        strategy = tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                implementation=communication.NCCL if trial.device == "gpu" else communication.RING
            )
        )
        super().__init__(trial, strategy, range(rank.rank, rank.rank + 1))


class TfMirrored(_TfDistribute):
    """The trainer `tf-mirrored`: one process drives every device of its node; on CPU a device is a logical one."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        _configure(trial, devices=trial.world_size)
        if trial.device == "gpu":
            gpus = tf.config.list_physical_devices("GPU")[: trial.world_size]
            tf.config.set_visible_devices(gpus, "GPU")
            for gpu in gpus:
                tf.config.experimental.set_memory_growth(gpu, True)
        else:
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * trial.world_size)
        devices = [device.name for device in tf.config.list_logical_devices(trial.device.upper())]
        super().__init__(trial, tf.distribute.MirroredStrategy(devices), range(trial.world_size))


def make_optimizer(chosen: Optimizer) -> keras.Optimizer:
    """Return Keras' SGD with momentum or Adam with torch's constants."""
    if chosen.name == "sgd":
        return keras.optimizers.SGD(chosen.learning_rate, momentum=chosen.momentum)
    return keras.optimizers.Adam(chosen.learning_rate, beta_1=ADAM_BETAS[0], beta_2=ADAM_BETAS[1], epsilon=ADAM_EPSILON)


def _configure(trial: Trial, devices: int) -> None:
    """Set what TensorFlow reads before its first device is used."""
    keras.utils.set_random_seed(trial.seed)
    tf.config.threading.set_intra_op_parallelism_threads(trial.threads_per_device * devices)
    # Two at least: a thread that waits in a collective must not stop the one that feeds it.
    tf.config.threading.set_inter_op_parallelism_threads(max(2, trial.threads_per_device * devices))
    # fp32 means fp32: no TF32 in convolutions or matrix products.
    tf.config.experimental.enable_tensor_float_32_execution(False)
