"""Which program runs a trainer's ranks."""

import sys
from pathlib import Path
from typing import Any

from scalestudy.launch.launchers import all_programs, own_programs
from scalestudy.launch.study import Container, Study
from scalestudy.trainers.trainer import TRAINERS


def study(**environments: Any) -> Study:
    return Study.model_validate(
        {"name": "s", "trainers": "torch-ddp", "models": "cnn", "batch": 8, "world_sizes": 1}
        | {"environments": {name.replace("_", "-"): own for name, own in environments.items()}}
    )


def test_a_path_is_relative_to_the_study_and_a_name_is_looked_for(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "studies").mkdir()
    box = {"image": "x", "runtime": "apptainer"}
    asked = study(torch_ddp="../venv/bin/python", horovod_torch="sh", tf_mirrored=box)
    found = own_programs(asked, tmp_path / "studies" / "s.yaml")
    # The link itself: where it lies tells a virtual environment's Python which one it is.
    assert Path(str(found["torch-ddp"])).samefile(python)
    assert str(found["torch-ddp"]).endswith("venv/bin/python")
    assert Path(str(found["horovod-torch"])).name == "sh"
    assert found["tf-mirrored"] == Container(image="x", runtime="apptainer")
    assert "tf-multiworker" not in found


def test_slurms_container_runs_whoever_has_no_program_of_its_own(tmp_path: Path) -> None:
    asked = study(torch_ddp="sh")
    assert all_programs(asked, tmp_path / "s.yaml").keys() == {"torch-ddp"}
    box = Container(image="x", runtime="pyxis")
    asked = asked.model_copy(update={"slurm": asked.slurm.model_copy(update={"container": box})})
    found = all_programs(asked, tmp_path / "s.yaml")
    assert Path(str(found.pop("torch-ddp"))).name == "sh"
    assert found == dict.fromkeys(TRAINERS.keys() - {"torch-ddp"}, box)
