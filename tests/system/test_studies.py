"""The ready studies, run for real in a small variant, and a study whose trainers live in environments of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalestudy.trainers.record import Record
from scalestudy.trainers.trainer import TRAINERS, series_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
WriteStudy = Callable[..., Path]
Records = Callable[[Path], list[Record]]
SMALL: dict[str, Any] = {
    "models": [{"name": "cnn", "data": "digits", "batch": 8}],
    "world_sizes": [2],
    "repeats": 1,
    "device": "cpu",
}


def small(name: str) -> dict[str, Any]:
    """Return a ready study with the smallest model on two CPUs, and of every swept list its two ends."""
    study: dict[str, Any] = yaml.safe_load((ROOT / "studies" / f"{name}.yaml").read_text())
    for swept in study.get("options", {}).values():
        swept.update({option: [values[0], values[-1]] for option, values in swept.items()})
    return study | SMALL


def run(study: Path, out: Path) -> None:
    told = subprocess.run([SCALESTUDY, "run", study, "--out", out], capture_output=True, text=True, timeout=900)
    assert told.returncode == 0, told.stdout + told.stderr


def series(records: list[Record]) -> dict[str, Record]:
    assert {record.outcome for record in records} == {"ok"}, [record.reason for record in records]
    return {f"{series_name(record.trial)} {record.trial.precision}": record for record in records}


@pytest.mark.horovod
def test_frameworks_in_small(write_study: WriteStudy, records: Records, tmp_path: Path) -> None:
    run(write_study(**small("frameworks")), tmp_path / "out")
    assert set(series(records(tmp_path / "out"))) == {f"{name} fp32" for name in TRAINERS}


@pytest.mark.horovod
def test_modes_in_small(write_study: WriteStudy, records: Records, tmp_path: Path) -> None:
    study = small("modes")
    # One precision with all executions, and the other with none: compiling takes its time.
    run(write_study(**study | {"precision": "fp32"}), tmp_path / "out")
    found = series(records(tmp_path / "out"))
    run(write_study(**study | {"precision": "bf16", "execution": {}}), tmp_path / "bf16")
    found |= series(records(tmp_path / "bf16"))
    assert len(found) == 2 + 2 + 3 + 3 + 4
    assert (tmp_path / "out" / "figures" / "compilation.svg").exists()
    assert (tmp_path / "out" / "figures" / "ways.svg").exists()
    for trainer in ("torch-ddp", "horovod-torch"):
        usual, compiled = (found[f"{name} fp32"].reports[0] for name in (trainer, f"{trainer} compiled"))
        # Seconds, not tens of milliseconds: no cache that the other trial has filled hides what compiling costs.
        assert compiled.phases["first_step"] > usual.phases["first_step"]


def test_tuning_in_small(write_study: WriteStudy, records: Records, tmp_path: Path) -> None:
    run(write_study(**small("tuning")), tmp_path / "out")
    found = series(records(tmp_path / "out"))
    assert len(found) == 2 * 2 + 2 * 2 + 2 * 2 + 2
    assert "torch-ddp bucket_cap_mb=100 communication_hook=fp16 fp32" in found
    assert (tmp_path / "out" / "figures" / "ways.svg").exists()
    for name, expected in {
        "horovod-torch fusion_threshold_mb=16 cycle_time_ms=5 fp32": (str(16 * 2**20), "5.0"),
        "horovod-torch fp32": (None, None),
    }.items():
        for report in found[name].reports:
            assert report.software is not None
            variables = report.software.variables
            assert (variables.get("HOROVOD_FUSION_THRESHOLD"), variables.get("HOROVOD_CYCLE_TIME")) == expected


@pytest.fixture
def environments() -> dict[str, str]:
    """Return the interpreter of every trainer, each in the environment of its framework."""
    pythons = {name: ROOT / ".venvs" / name / "bin" / "python" for name in ("torch", "tensorflow")}
    missing = [str(python) for python in pythons.values() if not python.exists()]
    if missing:
        why = f"{', '.join(missing)} not there (make envs)"
        if os.environ.get("CI"):
            pytest.fail(f"{why}: CI must test separate environments")
        pytest.skip(why)
    return {name: str(pythons[entry.distributions[0]]) for name, entry in TRAINERS.items()}


@pytest.mark.horovod
def test_each_framework_in_an_environment_of_its_own(
    write_study: WriteStudy, records: Records, environments: dict[str, str], tmp_path: Path
) -> None:
    trainers = ["torch-ddp", "horovod-torch", "tf-multiworker", "horovod-tf"]
    mapped = {name: environments[name] for name in trainers}
    run(write_study(trainers=trainers, models="cnn", world_sizes=[2], environments=mapped), tmp_path / "out")
    found = series(records(tmp_path / "out"))
    assert len(found) == 4
    for name, record in found.items():
        for report in record.reports:
            assert report.software is not None
            frameworks = report.software.versions.keys() & {"torch", "tensorflow", "horovod"}
            assert frameworks == set(TRAINERS[name.split()[0]].distributions)


def test_a_trainer_in_a_container_of_its_own_beside_one_without(
    write_study: WriteStudy, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Debian has no apptainer: what stands here notes the image, and runs the command outside.
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text(f'#!/bin/bash\necho "$4" >> {tmp_path}/images\nshift 4\nexec "$@"\n')
    apptainer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apptainer.parent}:{os.environ['PATH']}")
    image = {"image": "torch.sif", "runtime": "apptainer", "python": sys.executable}
    study = write_study(
        trainers=["torch-ddp", "tf-multiworker"], models="cnn", world_sizes=[2], environments={"torch-ddp": image}
    )
    run(study, tmp_path / "out")
    assert len(series(records(tmp_path / "out"))) == 2
    assert (tmp_path / "images").read_text() == "torch.sif\n" * 2


@pytest.mark.horovod
def test_the_doctor_looks_into_the_environments_of_a_study(
    write_study: WriteStudy, environments: dict[str, str]
) -> None:
    # One trainer in the other framework's environment: where it cannot run, the doctor must say so.
    wrong = environments | {"tf-mirrored": environments["torch-ddp"]}
    study = write_study(trainers="torch-ddp", models="cnn", world_sizes=[1], environments=wrong)
    told = subprocess.run(
        [SCALESTUDY, "doctor", study], capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"}, check=True
    ).stdout
    lines = {words[2]: line for line in told.splitlines() if "trainer " in line and len(words := line.split()) > 2}
    assert set(lines) == set(TRAINERS)
    for name, line in lines.items():
        assert wrong[name] in line
        if name == "tf-mirrored":
            assert line.startswith("no")
            assert "No module named" in line
            assert "pip install 'scalestudy[tensorflow]'" in line
        else:
            assert line.startswith("yes")
            assert "sees 0 of 0 GPUs" in line
            assert ("horovod 0.28.1" in line) == name.startswith("horovod")
