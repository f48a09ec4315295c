"""What every TensorFlow trainer does: the model in its precision, and the step, eager, as a graph or by XLA."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from scalestudy.trainers.trainer import KERAS_VARIABLES

# Before Keras is imported, also where nobody has asked for a trainer.
os.environ.update(KERAS_VARIABLES)

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from scalestudy.cluster.host import peak_resident_bytes
from scalestudy.trainers import keras_models, tf_data
from scalestudy.trainers.data import load_arrays, most_batches_ahead
from scalestudy.trainers.models import initial_parameters, model_spec
from scalestudy.trainers.record import Memory
from scalestudy.trainers.software import tf32_in_force
from scalestudy.trainers.trial import ADAM_BETAS, ADAM_EPSILON, Optimizer, Trial

_POLICIES = {"fp32": "float32", "tf32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}
# torch's GradScaler starts there; Keras would at half of it.
_FIRST_LOSS_SCALE = 2.0**16


class TfTrainer:
    """A process that trains on `devices` devices; a subclass says how gradients are exchanged."""

    # Over how many replicas the exchange adds gradients up, where the step wants their mean.
    _summed_over = 1
    # One step on this process' next batch, and one on a batch that stays, each returns its loss; and the next batch.
    _train: Callable[[], Any]
    _train_resident: Callable[[], Any]
    _train_local: Callable[[], Any]
    _batch: Callable[[], Any]

    def __init__(self, trial: Trial, devices: int) -> None:
        self._trial = trial
        keras.utils.set_random_seed(trial.seed)
        # Where another has imported Keras before, a keras.json may be in force.
        keras.config.set_floatx("float32")
        keras.config.set_image_data_format("channels_last")
        keras.config.set_dtype_policy(_POLICIES[trial.precision])
        # All of this is read before the first device is used.
        tf.config.threading.set_intra_op_parallelism_threads(trial.threads_per_device * devices)
        # Two at least: a thread that waits in a collective must not stop the one that feeds it.
        tf.config.threading.set_inter_op_parallelism_threads(max(2, trial.threads_per_device * devices))
        # fp32 means fp32: TensorFlow would use TF32 unasked.
        tf.config.experimental.enable_tensor_float_32_execution(trial.precision == "tf32")

    @staticmethod
    def visible_gpus() -> int:
        return len(tf.config.list_physical_devices("GPU"))

    @staticmethod
    def cuda_build() -> str | None:
        version = tf.sysconfig.get_build_info().get("cuda_version")
        return version and str(version)

    @staticmethod
    def allocator_summary() -> str | None:
        held = {name: tf.config.experimental.get_memory_info(name) for name in _gpu_names()}
        return "\n".join(f"{name}: {info}" for name, info in held.items()) or None

    @staticmethod
    def allocator_refusals() -> int | None:
        return None

    def step(self) -> None:
        self._loss = self._train()

    def resident_step(self) -> None:
        self._loss = self._train_resident()

    def local_step(self) -> None:
        self._train_local()

    def exchanged_bytes(self) -> int:
        return sum(4 * int(np.prod(variable.shape)) for variable in self._network.trainable_variables)

    def batches_ahead(self) -> int:
        return most_batches_ahead(self._trial)

    def next_batch(self) -> None:
        self._take()

    @cached_property
    def _take(self) -> Callable[[], None]:
        """Take a batch as this trial executes it, and return nothing: what a graph returns goes to the first device."""

        def take() -> None:
            self._batch()

        return self._program(take)

    @cached_property
    def _resident(self) -> tuple[Any, Any]:
        """The batch that stays: images and labels."""
        images, labels = self._batch()
        return images, labels

    def kept(self) -> Callable[[], None]:
        variables = [*self._network.variables, *self._optimizer.variables]
        values = [variable.numpy() for variable in variables]

        def put_back() -> None:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

        return put_back

    def synchronize(self) -> None:
        if self._trial.device == "gpu":
            tf.test.experimental.sync_devices()

    def device_timer(self) -> Callable[[], float | None]:
        # TensorFlow shows no events of the device.
        return lambda: None

    def loss(self) -> float:
        return float(self._loss.numpy())

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
        peaks = [tf.config.experimental.get_memory_info(name)["peak"] for name in _gpu_names()]
        return Memory(peak_resident_bytes=peak_resident_bytes(), peak_allocated_bytes=max(peaks))

    def reset_peaks(self) -> None:
        if self._trial.device == "gpu":
            for name in _gpu_names():
                tf.config.experimental.reset_memory_stats(name)

    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        return self.replicas()[0]

    def replicas(self) -> tuple[Mapping[str, NDArray[np.float32]], ...]:
        return (
            {
                name: keras_models.to_spec_layout(variable.numpy())
                for name, variable in keras_models.named_variables(self._network).items()
            },
        )

    def versions(self) -> dict[str, str]:
        build = tf.sysconfig.get_build_info()
        found = {"tensorflow": tf.__version__, "keras": keras.__version__}
        if self._trial.device == "gpu":
            found |= {name: str(build[f"{name}_version"]) for name in ("cuda", "cudnn")}
        return found

    def settings(self) -> dict[str, str | int]:
        return {
            "intra_op": tf.config.threading.get_intra_op_parallelism_threads(),
            "inter_op": tf.config.threading.get_inter_op_parallelism_threads(),
            "dtype_policy": keras.config.dtype_policy().name,
            "tf32": int(
                tf32_in_force(
                    tf.config.experimental.tensor_float_32_execution_enabled(), self._trial.device, os.environ
                )
            ),
        }

    def _build_network(self) -> None:
        """Make the network with its parameters and optimizer, and the two passes through it."""
        self._network, self._optimizer = self._made()
        self._arrays = load_arrays(self._trial.data)
        self._gradients = self._passes(self._network, self._optimizer)

    def _made(self) -> tuple[Any, Any]:
        spec = model_spec(self._trial.model, self._trial.data)
        network = keras_models.build(spec)
        keras_models.load(network, initial_parameters(spec, self._trial.seed))
        optimizer: Any = make_optimizer(self._trial.optimizer)
        if self._trial.precision == "fp16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=_FIRST_LOSS_SCALE)
        optimizer.build(network.trainable_variables)
        return network, optimizer

    def _passes(self, network: Any, optimizer: Any) -> Callable[[Any, Any], tuple[Any, list[Any]]]:
        """Return the two passes through a network: from images and labels to the loss and every gradient."""

        def backpropagate(images: Any, labels: Any) -> tuple[Any, list[Any]]:
            with tf.GradientTape() as tape:
                logits = network(images, training=True)
                if self._trial.precision in ("bf16", "fp16"):
                    # The loss is no place for ten bits of mantissa; torch's autocast does the same.
                    logits = tf.cast(logits, tf.float32)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
                scaled = optimizer.scale_loss(loss / self._summed_over)
            return loss, tape.gradient(scaled, [variable.value for variable in network.trainable_variables])

        # XLA has the two passes, where the work is; the exchange between processes stays outside of it.
        return tf.function(backpropagate, jit_compile=True) if self._trial.execution == "compiled" else backpropagate

    def _program(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return the step as this trial executes it."""
        return step if self._trial.execution == "eager" else tf.function(step)


class TfAllReduce:
    """A sum over devices as a graph of its own; `local_results` are what every device of this process has of it."""

    def __init__(self, reduce: Callable[[], Any], local_results: Callable[[Any], Iterable[Any]]) -> None:
        self._reduce = tf.function(reduce)
        self._local_results = local_results

    def __call__(self) -> None:
        self._summed = self._reduce()

    def sums(self) -> list[NDArray[np.float32]]:
        return [value.numpy() for value in self._local_results(self._summed)]


def make_optimizer(chosen: Optimizer) -> keras.Optimizer:
    """Return Keras' SGD with momentum or Adam with torch's constants."""
    if chosen.name == "sgd":
        return keras.optimizers.SGD(chosen.learning_rate, momentum=chosen.momentum)
    return keras.optimizers.Adam(chosen.learning_rate, beta_1=ADAM_BETAS[0], beta_2=ADAM_BETAS[1], epsilon=ADAM_EPSILON)


def take_gpus(devices: Sequence[int]) -> None:
    """Use these GPUs alone, and of their memory what is needed; raises ValueError."""
    there = tf.config.list_physical_devices("GPU")
    if max(devices) >= len(there):
        numbers = ", ".join(map(str, devices))
        raise ValueError(f"TensorFlow sees {len(there)} GPUs, and this process needs those numbered {numbers}")
    gpus = [there[device] for device in devices]
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)


def _gpu_names() -> list[str]:
    """Return the GPUs in use, as TensorFlow's counters of memory want them named."""
    return [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices("GPU")]
