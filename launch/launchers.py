"""The launchers there are."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from scalestudy.launch.errors import InputError
from scalestudy.launch.launcher import Launcher, Program
from scalestudy.launch.local import LocalLauncher
from scalestudy.launch.slurm import SlurmLauncher
from scalestudy.launch.study import Container, Study, known
from scalestudy.trainers.trainer import TRAINERS

LAUNCHERS: Mapping[str, Callable[[Study, Mapping[str, Program]], Launcher]] = {
    "local": lambda _, programs: LocalLauncher(programs),
    "slurm": lambda study, programs: SlurmLauncher(programs, study.slurm.container, os.environ, study.device),
    "ray": lambda study, programs: _ray(study, programs),
}


def _ray(study: Study, programs: Mapping[str, Program]) -> Launcher:
    # Ray's import takes a second, and it is an extra.
    try:
        from scalestudy.launch.ray import RayLauncher
    except ModuleNotFoundError:
        raise InputError("--launcher: ray: is not installed here: pip install 'scalestudy[ray]'") from None
    return RayLauncher(study, programs)


def make_launcher(name: str, study: Study, path: Path) -> Launcher:
    """Return the named launcher; raises InputError where it, or an interpreter the study names, does not exist."""
    try:
        known("launcher", name, LAUNCHERS)
    except ValueError as error:
        raise InputError(f"--launcher: {error}") from None
    programs = own_programs(study, path)
    for trainer, program in programs.items():
        if isinstance(program, Container) and program.runtime == "pyxis" and name != "slurm":
            raise InputError(
                f"{path}: environments.{trainer}.runtime: 'pyxis': is a plugin of Slurm's; "
                f"with launcher {name!r} use 'apptainer'"
            )
    return LAUNCHERS[name](study, programs)


def all_programs(study: Study, path: Path) -> dict[str, Program]:
    """Return what runs each trainer that does not use scalestudy's own interpreter, Slurm's container included."""
    usual = study.slurm.container
    return {**(dict.fromkeys(TRAINERS, usual) if usual else {}), **own_programs(study, path)}


def own_programs(study: Study, path: Path) -> dict[str, Program]:
    """Return each trainer's own interpreter as an absolute path, or its container.

    What has a slash is a path, relative to the study file; a bare name is looked up on PATH. Raises InputError where
    there is no such program.
    """
    found: dict[str, Program] = {}
    for trainer, own in study.environments.items():
        if isinstance(own, Container):
            found[trainer] = own
            continue
        try:
            found[trainer] = _program(own, path.parent)
        except ValueError as error:
            built = "; `make envs` builds it" if "/.venvs/" in own else ""
            raise InputError(
                f"{path}: environments.{trainer}: {own!r} is no program that can be run: {error}{built}"
            ) from None
    return found


def _program(own: str, folder: Path) -> str:
    """Return the absolute path of a program that a study in a folder names; raises ValueError with what is wrong."""
    if "/" not in own:
        if (on_path := shutil.which(own)) is None:
            raise ValueError("there is none of that name on PATH")
        return str(Path(on_path).absolute())
    try:
        # Not resolved: a virtual environment's python is a link, and where the link lies tells it so.
        program = folder.absolute() / Path(own).expanduser()
    except RuntimeError:
        raise ValueError("there is no such home") from None
    if not os.access(program, os.F_OK):
        raise ValueError(f"there is none at {program}")
    if program.is_dir():
        raise ValueError(f"{program} is a folder")
    if not os.access(program, os.X_OK):
        raise ValueError(f"{program} may not be executed")
    return str(program)
