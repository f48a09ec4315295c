"""What tf.distribute's trainers hand to TensorFlow, and what TensorFlow's own users have unasked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from scalestudy.cluster.ports import free_ports
from scalestudy.launch.local import environment, local_ranks
from scalestudy.trainers import keras_models
from scalestudy.trainers.models import model_spec
from scalestudy.trainers.options import MultiWorkerOptions
from scalestudy.trainers.tf_distribute import communication_options
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Device, Trial

pytestmark = pytest.mark.slow

# A rank as far as its first steps, and what is in force in it.
_RANK = """
import json, os, sys
from scalestudy.cluster.rank import Rank
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial
trial = Trial.model_validate_json(sys.argv[1])
trainer = TRAINERS[trial.trainer].load()(trial, Rank.from_environ(os.environ))
trainer.build()
trainer.step()
import keras
types = sorted({str(variable.dtype) for variable in [*trainer._network.variables, *trainer._optimizer.variables]})
config = keras.config
print(json.dumps([trainer.loss(), types, config.backend(), config.image_data_format(), config.epsilon()]))
os._exit(0)
"""


@pytest.mark.parametrize(
    ("trainer", "model", "settings"),
    [
        ("tf-multiworker", "cnn", '{"image_data_format": "channels_first", "floatx": "float16", "epsilon": 0.1}'),
        ("tf-mirrored", "resnet18", '{"image_data_format": "channels_first", "floatx": "float64", "backend": "torch"}'),
        ("horovod-tf", "cnn", '{"floatx": "bfloat17", "epsilon": 1, "backend": "jax"}'),
    ],
)
def test_no_keras_json_changes_what_is_measured(
    make_trial: Callable[..., Trial],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer: str,
    model: str,
    settings: str,
) -> None:
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras/keras.json").write_text(settings)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / ".keras"))
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    trial = make_trial(trainer=trainer, model=model)
    [rank], [port] = local_ranks(1), free_ports(1)
    done = subprocess.run(
        [sys.executable, "-c", _RANK, trial.model_dump_json(by_alias=True)],
        env=environment(os.environ, trial, rank, [f"127.0.0.1:{port}"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loss, types, *config = json.loads(done.stdout.splitlines()[-1])
    assert 0 < loss < 10
    # The optimizer counts its steps in int32 or int64.
    assert [name for name in types if name.startswith("float")] == ["float32"]
    assert config == ["tensorflow", "channels_last", 1e-7]


@pytest.mark.parametrize("model", ["cnn", "resnet18"])
def test_models_name_their_layout(model: str) -> None:
    """Also where somebody else has imported Keras, and set it, before."""
    spec = model_spec(model, Data(source="synthetic", channels=3, image_size=32, classes=10))
    keras.config.set_image_data_format("channels_first")
    try:
        network = keras_models.build(spec)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert network.output_shape == (None, 10)
    assert [variable.shape for variable in network.variables] == [
        variable.shape for variable in keras_models.build(spec).variables
    ]


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


@pytest.mark.parametrize(
    ("trainer", "devices"), [("tf-multiworker", (5,)), ("tf-mirrored", (2, 3)), ("horovod-tf", (5,))]
)
def test_a_process_trains_on_the_gpus_that_it_was_given(
    make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, trainer: str, devices: tuple[int, ...]
) -> None:
    class TakenError(Exception):
        """Of what comes after, nothing can be done without a GPU."""

    def grow(gpu: Any, enable: bool) -> None:
        raise TakenError(gpu.name)

    gpus = [tf.config.PhysicalDevice(f"gpu{index}", "GPU") for index in range(8)]
    used: list[Any] = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: gpus)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, _: used.extend(devices))
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", grow)
    # Threads are set before the first device is used, and another test has used one.
    monkeypatch.setattr("scalestudy.trainers.tf_trainer.TfTrainer.__init__", lambda *_, **__: None)
    trial = make_trial(trainer=trainer, device="gpu", world_size=len(devices))
    [rank] = local_ranks(1)
    with pytest.raises(TakenError, match=f"gpu{devices[0]}"):
        TRAINERS[trainer].load()(trial, rank.model_copy(update={"devices": devices}))
    assert used == [gpus[device] for device in devices]


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
