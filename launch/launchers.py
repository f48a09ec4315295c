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

    A path is relative to the study file, a bare name is looked for on PATH; raises InputError where it is no program.
    """
    found: dict[str, Program] = {}
    for trainer, own in study.environments.items():
        if isinstance(own, Container):
            found[trainer] = own
            continue
        try:
            program = shutil.which(path.parent / Path(own).expanduser() if "/" in own else own)
        except RuntimeError:
            # The home of a user that there is not.
            program = None
        if program is None:
            built = "; `make envs` builds it" if "/.venvs/" in own else ""
            raise InputError(f"{path}: environments.{trainer}: {own!r} is no program that can be run{built}")
        # Not resolved: a virtual environment's python is a link, and where the link lies tells it so.
        found[trainer] = str(Path(program).absolute())
    return found
