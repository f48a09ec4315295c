"""What tests of several floors need: a small trial, and a record as a rank would leave it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scalestudy.cluster.host import Host
from scalestudy.cluster.rank import Rank
from scalestudy.trainers.record import Environment, LossPoint, Memory, RankReport, Record, Window
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Measurement, Optimizer, Trial

HOST = Host(name="here", system="Linux", cpu_model="a CPU", cpu_count=2, memory_bytes=2**34)


# trainers/horovod.sh leaves it on a GPU host that cannot build Horovod, with what is missing. Without it a test that
# does not find Horovod fails.
NO_HOROVOD = Path(sys.prefix, ".horovod-missing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs Horovod where a GPU build of it is not possible."""
    if not NO_HOROVOD.exists():
        return
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if item.get_closest_marker("horovod") or any("horovod-" in str(value) for value in parameters):
            item.add_marker(pytest.mark.skip(reason=f"no Horovod here: see {NO_HOROVOD}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end what was not tested, in so many words."""
    if NO_HOROVOD.exists():
        terminalreporter.section("HOROVOD'S TRAINERS WERE NOT TESTED", sep="!", red=True, bold=True)
        terminalreporter.write(NO_HOROVOD.read_text())


@pytest.fixture(autouse=True)
def _no_leaked_environment() -> Iterator[None]:
    """A test that changes the environment for those after it fails."""
    before = dict(os.environ)
    yield
    # TensorFlow and Keras set their own when a test imports them, torch when one compiles or captures.
    own = ("PYTEST_", "KERAS_", "TF_", "TF2_", "KMP_", "TORCHINDUCTOR_", "TRITON_", "TORCH_NCCL_")
    changed = {name for name in before.keys() ^ os.environ.keys() if not name.startswith(own)}
    assert not changed, f"the test left {changed} in the environment"


@pytest.fixture(scope="session")
def nvml_standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for LD_LIBRARY_PATH with a libnvidia-ml.so.1 of eight scripted GPUs, see nvml_standin.c."""
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parent / "cluster/nvml_standin.c"
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return folder


@pytest.fixture
def make_trial() -> Callable[..., Trial]:
    """Return a maker of trials: `cnn` on synthetic images, measured as shortly as can be, changed as asked."""

    def make(**changes: Any) -> Trial:
        fields: dict[str, Any] = {
            "trainer": "torch-ddp",
            "model": "cnn",
            "data": Data(source="synthetic", channels=1, image_size=32, classes=10),
            "scaling": "weak",
            "world_size": 1,
            "devices_per_node": 8,
            "device": "cpu",
            "per_device_batch": 8,
            "optimizer": Optimizer(),
            "measurement": Measurement(window_s=0.02, windows=2, warm_up_max_s=0.1, deadline_s=120, cause_windows=0),
            "threads_per_device": 1,
            "seed": 1,
            "repeat": 0,
        }
        entry = TRAINERS[changes.get("trainer", fields["trainer"])]
        fields |= {"execution": entry.execution, "options": entry.options()}
        return Trial(**(fields | changes))

    return make


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """Return a maker of records whose ranks took `step_s` seconds for each of 10 steps, in two windows."""

    def make(trial: Trial, step_s: float | list[float] = 0.1, **changes: Any) -> Record:
        by_rank = [step_s] * trial.world_size if isinstance(step_s, float) else step_s
        reports = tuple(
            RankReport(
                rank=Rank(
                    rank=rank,
                    world_size=trial.world_size,
                    local_rank=rank,
                    local_world_size=trial.world_size,
                    node_rank=0,
                    host="here",
                ),
                phases={"import": 1.0 + rank, "rendezvous": 0.5, "build": 0.25, "first_step": 0.125, "warm_up": 2.0},
                warm_up_steady=True,
                windows=(Window(0.0, 5 * seconds, 5), Window(100.0, 100.0 + 5 * seconds, 5)),
                losses=(LossPoint(1, 2.0), LossPoint(11, 1.0 + rank)),
                memory=Memory(peak_resident_bytes=1000 + rank),
                parameter_count=61706,
                parameter_checksums=("abc",),
                host=HOST if rank == 0 else None,
            )
            for rank, seconds in enumerate(by_rank)
        )
        fields: dict[str, Any] = {"trial": trial, "outcome": "ok", "reports": reports}
        environment = Environment(
            started_at="2026-01-01T00:00:00+00:00",
            duration_s=10.0,
            launcher="local",
            host=HOST,
            scalestudy="0.1.0",
            git_commit=None,
            study_name="t",
            study="name: t",
        )
        return Record(**(fields | {"environment": environment} | changes))

    return make
