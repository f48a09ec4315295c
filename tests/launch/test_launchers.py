"""Which program runs a trainer's ranks."""

import sys
from pathlib import Path
from typing import Any

import pytest

from scalestudy.launch.errors import InputError
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


def test_a_program_beside_the_study_is_not_taken_from_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sh` is on PATH; the study is named from its own folder, and from others."""
    own = tmp_path / "sh"
    own.symlink_to(sys.executable)
    (tmp_path / "below").mkdir()
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    (home / "bin/sh").symlink_to(sys.executable)
    monkeypatch.setenv("HOME", str(home))
    for folder, file in ((tmp_path, "s.yaml"), (tmp_path, "./s.yaml"), (tmp_path / "below", "../s.yaml")):
        monkeypatch.chdir(folder)
        for text in ("./sh", "below/../sh", str(own)):
            found = own_programs(study(torch_ddp=text), Path(file))["torch-ddp"]
            assert Path(str(found)).is_absolute()
            assert Path(str(found)).resolve() == own.resolve()
        assert own_programs(study(torch_ddp="~/bin/sh"), Path(file)) == {"torch-ddp": str(home / "bin/sh")}
        assert Path(str(own_programs(study(torch_ddp="sh"), Path(file))["torch-ddp"])).resolve() != own.resolve()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("./sh", "there is none at {here}/sh"),
        ("../x/bin/sh", "there is none at {here}/../x/bin/sh"),
        ("~/sh", "there is none at {here}/home/sh"),
        ("./data.txt", "{here}/data.txt may not be executed"),
        ("./home", "{here}/home is a folder"),
        ("~nobody-here/sh", "there is no such home"),
        ("no-such-python", "there is none of that name on PATH"),
    ],
)
def test_a_program_that_is_none_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    (tmp_path / "data.txt").write_text("no program")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        own_programs(study(torch_ddp=text), Path("s.yaml"))
    reason = why.format(here=tmp_path)
    assert str(error.value) == f"s.yaml: environments.torch-ddp: {text!r} is no program that can be run: {reason}"


def test_slurms_container_runs_whoever_has_no_program_of_its_own(tmp_path: Path) -> None:
    asked = study(torch_ddp="sh")
    assert all_programs(asked, tmp_path / "s.yaml").keys() == {"torch-ddp"}
    box = Container(image="x", runtime="pyxis")
    asked = asked.model_copy(update={"slurm": asked.slurm.model_copy(update={"container": box})})
    found = all_programs(asked, tmp_path / "s.yaml")
    assert Path(str(found.pop("torch-ddp"))).name == "sh"
    assert found == dict.fromkeys(TRAINERS.keys() - {"torch-ddp"}, box)
