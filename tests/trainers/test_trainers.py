"""Real training: several ranks are one process on the same global batch, and everyone learns the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
from PIL import Image

from scalestudy.cluster.ports import free_ports
from scalestudy.launch.launcher import processes
from scalestudy.launch.local import environment, local_ranks
from scalestudy.trainers.options import (
    DdpOptions,
    HorovodOptions,
    MirroredOptions,
    MultiWorkerOptions,
    Options,
    changes,
)
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Execution, Optimizer, Trial

pytestmark = pytest.mark.slow

STEPS = 5
GLOBAL_BATCH = 64
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
DIGITS = Data(source="digits", channels=1, image_size=32, classes=10)
MakeTrial = Callable[..., Trial]


# What take_steps.py leaves beside the parameters.
TOLD = {"losses", "compiled"}


def take_steps(
    trial: Trial, folder: Path, steps: int = STEPS, *policy: str, **variables: str
) -> list[dict[str, np.ndarray]]:
    """Run every rank of a trial for some steps; return each device's parameters, and its process' losses."""
    variables = {"SCALESTUDY_LIFELINE": "", **variables}
    folder.mkdir()
    (folder / "trial.json").write_text(trial.model_dump_json(by_alias=True))
    ranks = local_ranks(processes(trial))
    addresses = [f"127.0.0.1:{port}" for port in free_ports(len(ranks))]
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("take_steps.py")), str(folder), str(steps), *policy],
            env=environment(os.environ, trial, rank, addresses) | variables,
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
    for name in one.keys() - TOLD:
        assert np.array_equal(two[0][name], two[1][name]), f"{name}: the replicas differ"
        assert np.abs(two[0][name] - one[name]).max() <= 1e-4, name
    # Every rank's own shard: its loss is another one, their mean the global batch's.
    assert np.mean([rank["losses"] for rank in two], axis=0) == pytest.approx(one["losses"], abs=1e-4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_parts_of_a_step_are_timed_without_a_trace_in_the_training(
    trainer: str, make_trial: MakeTrial, tmp_path: Path
) -> None:
    """Local steps drive replicas apart; afterwards they are where they were, and so is the optimizer."""
    trial = make_trial(trainer=trainer, world_size=2, optimizer=Optimizer(name="adam", learning_rate=1e-3))
    plain = take_steps(trial, tmp_path / "plain", 6)
    interrupted = take_steps(trial, tmp_path / "interrupted", 6, INTERLUDE="1")
    for rank, same in zip(interrupted, plain, strict=True):
        assert rank["losses"] == pytest.approx(same["losses"], rel=1e-4)
    for name in interrupted[0].keys() - TOLD:
        assert np.array_equal(interrupted[0][name], interrupted[1][name]), f"{name}: the replicas differ"


def test_every_trainer_starts_from_the_same_parameters_and_sees_the_same_shards(
    make_trial: MakeTrial, tmp_path: Path
) -> None:
    losses = {}
    for trainer in TRAINERS:
        trial = make_trial(trainer=trainer, data=DIGITS, world_size=2, per_device_batch=32)
        losses[trainer] = np.mean([rank["losses"] for rank in take_steps(trial, tmp_path / trainer, 30)], axis=0)
    # 30 steps of 64 images are more than an epoch: the reshuffle is the same too.
    for trainer in TRAINERS:
        assert losses[trainer] == pytest.approx(losses["torch-ddp"], rel=1e-3), trainer


def other_ways() -> Iterator[Any]:
    """Every way to run a trainer on CPU that is not its usual one, with how far its losses may be from those.

    The tolerances are some ten times what was seen.
    """
    for name, entry in TRAINERS.items():
        executions: list[Execution] = ["eager", "compiled"] if entry.distributions[0] == "torch" else list(EXECUTIONS)
        # Another order of the same sums.
        yield from (way(name, 1e-4, execution=other) for other in executions if other != entry.execution)
        # bf16 keeps 8 bits of mantissa, fp16 11.
        yield way(name, 2e-3, precision="bf16")
        yield way(name, 1e-3, precision="fp16")
    yield way("torch-ddp", 1e-5, options=DdpOptions(bucket_cap_mb=0.05, gradient_as_bucket_view=True))
    yield way("torch-ddp", 1e-5, options=DdpOptions(static_graph=True))
    yield way("torch-ddp", 1e-4, options=DdpOptions(communication_hook="fp16"))
    for name in ("horovod-torch", "horovod-tf"):
        yield way(name, 1e-5, options=HorovodOptions(fusion_threshold_mb=0, cycle_time_ms=3.5, autotune=True))
        yield way(name, 1e-4, options=HorovodOptions(compression="fp16"))
    yield way("tf-multiworker", 1e-5, options=MultiWorkerOptions(implementation="ring", bytes_per_pack=4096))
    yield way("tf-mirrored", 1e-5, options=MirroredOptions(cross_device_ops="hierarchical_copy"))
    yield way("tf-mirrored", 1e-5, options=MirroredOptions(cross_device_ops="reduction_to_one_device"))


def way(trainer: str, tolerance: float, **fields: Any) -> Any:
    named = [changes(value) if isinstance(value, get_args(Options)) else value for value in fields.values()]
    return pytest.param(trainer, fields, tolerance, id=f"{trainer} {' '.join(map(str, named))}")


class Usual(NamedTuple):
    """A trainer as its users run it, on two devices: the mean loss of every step, and what rank 0 said of itself."""

    losses: np.ndarray
    look: dict[str, Any]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Trial], Usual]:
    """Return what a trainer does as its users run it, run once."""
    found: dict[str, Usual] = {}

    def run(trial: Trial) -> Usual:
        if trial.trainer not in found:
            folder = tmp_path_factory.mktemp("usual") / trial.trainer
            ranks = take_steps(trial, folder, 30, LOOK="1")
            losses = np.mean([rank["losses"] for rank in ranks], axis=0)
            found[trial.trainer] = Usual(losses, json.loads((folder / "look-0.json").read_text()))
        return found[trial.trainer]

    return run


def two_of(trainer: str, make_trial: MakeTrial) -> Trial:
    return make_trial(trainer=trainer, data=DIGITS, world_size=2, per_device_batch=32)


@pytest.mark.parametrize(("trainer", "changes", "tolerance"), list(other_ways()))
def test_every_way_to_run_a_trainer_learns_what_the_usual_one_does(
    trainer: str,
    changes: dict[str, Any],
    tolerance: float,
    make_trial: MakeTrial,
    usual: Callable[[Trial], Usual],
    tmp_path: Path,
) -> None:
    trial = two_of(trainer, make_trial)
    expected = usual(trial).losses
    ranks = take_steps(trial.model_copy(update=changes), tmp_path / "two", 30)
    for name in ranks[0].keys() - TOLD:
        assert np.array_equal(ranks[0][name], ranks[1][name]), f"{name}: the replicas differ"
    losses = np.mean([rank["losses"] for rank in ranks], axis=0)
    assert losses == pytest.approx(expected, rel=tolerance)
    if "precision" in changes:
        assert not np.array_equal(losses, expected), "the precision is not in force"
    if trial.trainer in ("torch-ddp", "horovod-torch") and changes.get("execution") == "compiled":
        assert ranks[0]["compiled"] > 0, "torch.compile has compiled nothing"


def test_every_replica_of_one_process_has_its_values_and_its_local_network_on_its_own_device(
    make_trial: MakeTrial, usual: Callable[[Trial], Usual]
) -> None:
    look = usual(two_of("tf-mirrored", make_trial)).look
    devices = [f"/job:localhost/replica:0/task:0/device:CPU:{index}" for index in range(2)]
    assert look["resident"] == [devices, devices]
    assert look["zeros"] == [devices]
    assert look["local"] == [[device] for device in devices]


@pytest.mark.parametrize("trainer", ["tf-multiworker", "tf-mirrored"])
def test_taking_a_batch_is_no_collective(trainer: str, make_trial: MakeTrial, usual: Callable[[Trial], Usual]) -> None:
    """Of data that might end, workers would agree before every batch whether there is one more."""
    look = usual(two_of(trainer, make_trial)).look
    assert not [operation for operation in look["take"] if "Collective" in operation or operation.endswith("If")]
    # A look that sees nothing would prove nothing.
    assert [operation for operation in look["take"] if "GetNext" in operation]
    assert [operation for operation in look["train"] if "CollectiveReduce" in operation]


@pytest.mark.parametrize(
    ("trainer", "communication"),
    [
        ("torch-ddp", "gloo"),
        ("horovod-torch", "gloo"),
        ("horovod-tf", "gloo"),
        ("tf-multiworker", "auto"),
        ("tf-mirrored", "ring"),
    ],
)
def test_who_carries_the_gradients_is_on_record(
    trainer: str, communication: str, make_trial: MakeTrial, usual: Callable[[Trial], Usual]
) -> None:
    look = usual(two_of(trainer, make_trial)).look
    assert look["settings"]["communication"] == communication
    if "train_hints" in look:
        assert look["train_hints"] == [communication]


@pytest.mark.horovod
def test_what_horovod_and_one_process_differ_by_in_tensorflow_is_rounding(
    make_trial: MakeTrial, tmp_path: Path
) -> None:
    """After 55 steps they differ by 2e-7 of their size in float32, and by 4e-16 in float64: arithmetic would stay."""
    trial = make_trial(trainer="horovod-tf", data=DIGITS)
    one_trial = trial.model_copy(update={"per_device_batch": GLOBAL_BATCH})
    two_trial = trial.model_copy(update={"world_size": 2, "per_device_batch": GLOBAL_BATCH // 2})
    far = {}
    for policy in ("float32", "float64"):
        [one] = take_steps(one_trial, tmp_path / f"one-{policy}", 55, policy)
        two = take_steps(two_trial, tmp_path / f"two-{policy}", 55, policy)[0]
        far[policy] = max(
            np.linalg.norm(two[name] - one[name]) / np.linalg.norm(one[name]) for name in one.keys() - TOLD
        )
    assert far["float64"] <= 1e-12


@pytest.mark.horovod
def test_batch_normalized_models_train_on_two_ranks_with_equal_parameters(
    make_trial: MakeTrial, tmp_path: Path
) -> None:
    data = Data(source="synthetic-host", channels=3, image_size=32, classes=10)
    for trainer in TRAINERS:
        trial = make_trial(trainer=trainer, model="resnet18", data=data, world_size=2, per_device_batch=4)
        first, second = take_steps(trial, tmp_path / trainer, 2)
        assert all(np.array_equal(first[name], second[name]) for name in first.keys() - TOLD)
        assert np.isfinite(first["losses"]).all()


@pytest.mark.horovod
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
        assert all(np.array_equal(first[name], second[name]) for name in first.keys() - TOLD)
