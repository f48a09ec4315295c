"""What every launcher starts: the worker's command line."""

import shlex
from collections.abc import Callable
from pathlib import Path

from scalestudy.launch.launcher import worker_command
from scalestudy.launch.study import Container
from scalestudy.trainers.trial import Data, Trial

MakeTrial = Callable[..., Trial]
FOLDER = Path("/out/trials/t")


def test_an_interpreter_runs_the_worker(make_trial: MakeTrial) -> None:
    assert shlex.join(worker_command("/opt/python", make_trial(), FOLDER)) == (
        "/opt/python -m scalestudy.trainers.worker /out/trials/t"
    )


def test_a_container_wraps_the_worker_and_sees_the_trials_folders(make_trial: MakeTrial) -> None:
    data = Data(source="images", folder="/data", channels=3, image_size=32, classes=2)
    worker = ["python3", "-m", "scalestudy.trainers.worker", "/out/trials/t"]
    pyxis = Container(image="/i.sqsh", runtime="pyxis", mounts=("/cache:/c",))
    assert worker_command(pyxis, make_trial(data=data), FOLDER) == [
        "--container-image=/i.sqsh",
        "--container-mounts=/out/trials/t:/out/trials/t,/data:/data,/cache:/c",
        *worker,
    ]
    apptainer = Container(image="i.sif", runtime="apptainer")
    assert worker_command(apptainer, make_trial(device="gpu"), FOLDER) == [
        *("apptainer", "exec", "--nv", "--bind", "/out/trials/t", "i.sif"),
        *worker,
    ]
