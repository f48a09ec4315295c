"""The launchers there are."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from scalestudy.launch.errors import InputError
from scalestudy.launch.launcher import Launcher
from scalestudy.launch.local import LocalLauncher
from scalestudy.launch.study import Study, known
from scalestudy.trainers.trial import Device

LAUNCHERS: Mapping[str, Callable[[Device, Mapping[str, str]], Launcher]] = {"local": LocalLauncher}


def make_launcher(name: str, study: Study, path: Path, device: Device) -> Launcher:
    """Return the named launcher; raises InputError where it, or an interpreter the study names, does not exist."""
    try:
        known("launcher", name, LAUNCHERS)
    except ValueError as error:
        raise InputError(f"--launcher: {error}") from None
    interpreters = {trainer: str(Path(python).expanduser()) for trainer, python in study.environments.items()}
    for trainer, interpreter in interpreters.items():
        if shutil.which(interpreter) is None:
            raise InputError(f"{path}: environments.{trainer}: {interpreter!r} is no program that can be run")
    return LAUNCHERS[name](device, interpreters)
