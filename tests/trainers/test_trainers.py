"""Real training: several ranks are one process on the same global batch, and everyone learns the same."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalestudy.cluster.ports import free_ports
from scalestudy.launch.launcher import processes
from scalestudy.launch.local import environment, local_ranks
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Optimizer, Trial

pytestmark = pytest.mark.slow

STEPS = 5
GLOBAL_BATCH = 64
DIGITS = Data(source="digits", channels=1, image_size=32, classes=10)
MakeTrial = Callable[..., Trial]


def take_steps(trial: Trial, folder: Path, steps: int = STEPS) -> list[dict[str, np.ndarray]]:
    """Run every rank of a trial for some steps; return each device's parameters, and its process' losses."""
    folder.mkdir()
    (folder / "trial.json").write_text(trial.model_dump_json(by_alias=True))
    ranks = local_ranks(processes(trial))
    addresses = [f"127.0.0.1:{port}" for port in free_ports(len(ranks))]
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("take_steps.py")), str(folder), str(steps)],
            env=environment(os.environ, trial, rank, addresses) | {"SCALESTUDY_LIFELINE": ""},
        )
        for rank in ranks
    ]
    try:
        assert [process.wait(timeout=180) for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [dict(np.load(folder / f"rank-{device}.npz")) for device in range(trial.world_size)]


@pytest.mark.parametrize("optimizer", [Optimizer(name="sgd"), Optimizer(name="adam", learning_rate=1e-3)], ids=str)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_ranks_equal_one_process_on_the_same_global_batch(
    trainer: str, optimizer: Optimizer, make_trial: MakeTrial, tmp_path: Path
) -> None:
    trial = make_trial(trainer=trainer, data=DIGITS, optimizer=optimizer)
    [one] = take_steps(trial.model_copy(update={"per_device_batch": GLOBAL_BATCH}), tmp_path / "one")
    two = take_steps(
        trial.model_copy(update={"world_size": 2, "per_device_batch": GLOBAL_BATCH // 2}), tmp_path / "two"
    )
    for name in one.keys() - {"losses"}:
        assert np.array_equal(two[0][name], two[1][name]), f"{name}: the replicas differ"
        assert np.abs(two[0][name] - one[name]).max() <= 1e-4, name
    # Every rank's own shard: its loss is another one, their mean the global batch's.
    assert np.mean([rank["losses"] for rank in two], axis=0) == pytest.approx(one["losses"], abs=1e-4)


def test_every_trainer_starts_from_the_same_parameters_and_sees_the_same_shards(
    make_trial: MakeTrial, tmp_path: Path
) -> None:
    losses = {}
    for trainer in TRAINERS:
        trial = make_trial(trainer=trainer, data=DIGITS, world_size=2, per_device_batch=32)
        losses[trainer] = np.mean([rank["losses"] for rank in take_steps(trial, tmp_path / trainer, 30)], axis=0)
    # 30 steps of 64 images are more than an epoch: the reshuffle is the same too.
    assert losses["tf-multiworker"] == pytest.approx(losses["torch-ddp"], rel=1e-3)
    assert losses["tf-mirrored"] == pytest.approx(losses["torch-ddp"], rel=1e-3)


def test_batch_normalized_models_train_on_two_ranks_with_equal_parameters(
    make_trial: MakeTrial, tmp_path: Path
) -> None:
    data = Data(source="synthetic-host", channels=3, image_size=32, classes=10)
    for trainer in TRAINERS:
        trial = make_trial(trainer=trainer, model="resnet18", data=data, world_size=2, per_device_batch=4)
        first, second = take_steps(trial, tmp_path / trainer, 2)
        assert all(np.array_equal(first[name], second[name]) for name in first.keys() - {"losses"})
        assert np.isfinite(first["losses"]).all()


def test_images_of_a_folder_are_decoded_and_trained_on_by_every_framework(
    make_trial: MakeTrial, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(12):
            pixels = rng.integers(256, size=(40 + index, 50, 3), dtype=np.uint8)
            suffix = ("jpg", "png", "JPEG")[index % 3]
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.{suffix}")
    data = Data(source="images", folder=str(tmp_path / "images"), channels=3, image_size=32, classes=2)
    for trainer in TRAINERS:
        trial = make_trial(trainer=trainer, data=data, world_size=2, per_device_batch=4, loader_workers=1)
        first, second = take_steps(trial, tmp_path / trainer)
        assert np.isfinite(first["losses"]).all()
        assert all(np.array_equal(first[name], second[name]) for name in first.keys() - {"losses"})
