"""What tf.distribute's trainers hand to TensorFlow, and what TensorFlow's own users have unasked."""

from typing import Any

import keras
import pytest
import tensorflow as tf

from scalestudy.trainers.options import MultiWorkerOptions
from scalestudy.trainers.tf_distribute import communication_options
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Device

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("implementation", "device", "hint"),
    [
        ("auto", "gpu", "NCCL"),
        ("auto", "cpu", "AUTO"),
        ("ring", "gpu", "RING"),
        ("ring", "cpu", "RING"),
        ("nccl", "gpu", "NCCL"),
    ],
)
def test_workers_with_gpus_are_connected_by_nccl_unless_the_study_says_otherwise(
    implementation: Any, device: Device, hint: str
) -> None:
    """TensorFlow takes NCCL only where the hint says so: `AUTO` on GPUs would be a ring through the host."""
    found = communication_options(MultiWorkerOptions(implementation=implementation, bytes_per_pack=7), device)
    assert (found.implementation.value, found.bytes_per_pack) == (hint, 7)


def test_the_usual_execution_is_what_keras_own_fit_does_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras compiles by XLA on GPUs where nothing is distributed, and turns XLA off under tf.distribute."""
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: [gpu])

    def compiled_by_xla() -> bool:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(optimizer="sgd", loss="mse")
        return bool(model.jit_compile)

    assert compiled_by_xla()
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        assert not compiled_by_xla()
    assert {TRAINERS[name].execution for name in ("tf-multiworker", "tf-mirrored")} == {"graph"}
