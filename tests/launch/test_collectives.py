"""Which sweeps a study asks for, and what is refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from scalestudy.launch.cli import app
from scalestudy.launch.collectives import parse_bytes, sweep_trials
from scalestudy.launch.errors import InputError
from scalestudy.launch.study import Layout, load_study
from scalestudy.trainers.trial import Sweep

LAYOUT = Layout(device="cpu", devices_per_node=(8,), threads_per_device=1)
STUDY = """
schema: 1
name: s
trainers: [torch-ddp, tf-multiworker]
models: [{name: resnet18, batch: [4, 8], image_size: 32}, {name: cnn, data: digits, batch: 64}]
execution: {torch-ddp: [eager, compiled]}
options: {torch-ddp: {bucket_cap_mb: [1, 25]}}
precision: [fp32, bf16]
world_sizes: [1, 2, 4]
repeats: 2
"""


def trials_of(tmp_path: Path, text: str) -> list[tuple[str, int, int]]:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    trials = sweep_trials(load_study(path), path, LAYOUT, Sweep())
    assert len({trial.id for trial in trials}) == len(trials)
    return sorted((trial.trainer, trial.world_size, trial.repeat) for trial in trials)


def test_every_trainer_is_swept_once_a_world_size_and_repeat_whatever_else_a_study_varies(tmp_path: Path) -> None:
    expected = [(t, n, r) for t in ("tf-multiworker", "torch-ddp") for n in (2, 4) for r in (0, 1)]
    assert trials_of(tmp_path, STUDY) == expected
    assert trials_of(tmp_path, STUDY + "scaling: strong\n") == expected
    adaptive = STUDY.replace("repeats: 2", "repeats: {min: 7, max: 9, until: 2%}")
    assert {repeat for _, _, repeat in trials_of(tmp_path, adaptive)} == set(range(7))


def test_one_device_has_nobody_to_exchange_with(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="world_sizes: 1: one device has nobody to exchange with; add 2 or more"):
        trials_of(tmp_path, STUDY.replace("[1, 2, 4]", "[1]"))


@pytest.mark.parametrize(("text", "expected"), [("4", 4), ("1KB", 1024), ("64 mb", 2**26), ("1GB", 2**30)])
def test_sizes_are_read_in_powers_of_1024(text: str, expected: int) -> None:
    assert parse_bytes("--largest", text) == expected


@pytest.mark.parametrize("text", ["", "0", "3", "1TB", "1.5MB", "-4"])
def test_what_is_no_size_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(InputError, match="--largest: .* is no size such as 1KB, 64MB or 1GB"):
        parse_bytes("--largest", text)


def test_sizes_out_of_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(STUDY)
    told = CliRunner().invoke(app, ["collectives", str(path), "--smallest", "1MB", "--largest", "1KB"])
    assert isinstance(told.exception, InputError)
    assert "--smallest: '1MB' is above --largest '1KB'" in str(told.exception)


def test_a_trial_that_trains_keeps_the_id_it_had_before_there_were_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(STUDY)
    trial = sweep_trials(load_study(path), path, LAYOUT, Sweep())[0]
    assert trial.id != trial.model_copy(update={"sweep": None}).id
