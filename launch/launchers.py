"""The launchers there are."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from scalestudy.launch.errors import InputError
from scalestudy.launch.launcher import Launcher
from scalestudy.launch.local import LocalLauncher
from scalestudy.launch.slurm import SlurmLauncher
from scalestudy.launch.study import Study, known

LAUNCHERS: Mapping[str, Callable[[Study, Mapping[str, str]], Launcher]] = {
    "local": lambda _, interpreters: LocalLauncher(interpreters),
    "slurm": lambda study, interpreters: SlurmLauncher(interpreters, study.slurm.container, os.environ),
    "ray": lambda study, interpreters: _ray(study, interpreters),
}


def _ray(study: Study, interpreters: Mapping[str, str]) -> Launcher:
    # Ray's import takes a second, and it is an extra.
    try:
        from scalestudy.launch.ray import RayLauncher
    except ModuleNotFoundError:
        raise InputError("--launcher: ray: is not installed here: pip install 'scalestudy[ray]'") from None
    return RayLauncher(study, interpreters)


def make_launcher(name: str, study: Study, path: Path) -> Launcher:
    """Return the named launcher; raises InputError where it, or an interpreter the study names, does not exist."""
    try:
        known("launcher", name, LAUNCHERS)
    except ValueError as error:
        raise InputError(f"--launcher: {error}") from None
    return LAUNCHERS[name](study, interpreters(study, path))


def interpreters(study: Study, path: Path) -> dict[str, str]:
    """Return each trainer's own interpreter as an absolute path; raises InputError where it is no program."""
    found: dict[str, str] = {}
    for trainer, python in study.environments.items():
        program = shutil.which(Path(python).expanduser())
        if program is None:
            raise InputError(f"{path}: environments.{trainer}: {python!r} is no program that can be run")
        # Not resolved: a virtual environment's python is a link, and where the link lies tells it so.
        found[trainer] = str(Path(program).absolute())
    return found
