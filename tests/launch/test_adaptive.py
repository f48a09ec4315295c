"""Adaptive repeats: added where the interval is still wide and nowhere else; a launcher plants what is measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalestudy.cluster.host import Topology, this_host
from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.launcher import Exit
from scalestudy.launch.runner import Origin, pending, run_trials
from scalestudy.launch.study import Layout, Repeats, load_study, study_trials
from scalestudy.trainers.files import write_atomically
from scalestudy.trainers.record import Costs, Record
from scalestudy.trainers.trial import Trial

CPUS = Layout(device="cpu", devices_per_node=(4,), threads_per_device=1)
ORIGIN = Origin(study_name="t", study_text="name: t", costs=Costs(), host=this_host(), scalestudy="0", git_commit=None)
ASKED = Repeats.model_validate({"max": 12, "until": "2%"})
MakeRecord = Callable[..., Record]
# Seconds a step by world size and repeat: one point steady, one that settles, one that never does, one that fails.
STEADY = [0.1, 0.1005, 0.0995] * 2
SETTLES = [0.1, 0.12, *[0.11, 0.1101, 0.1102, 0.1099, 0.11] * 2]
WILD = [0.1, 0.2, 0.15] * 4


class Planted:
    name = "local"
    elastic = False

    def __init__(self, make_record: MakeRecord, step_s: dict[int, list[float] | None]) -> None:
        self._make_record = make_record
        self._step_s = step_s
        self.ran: list[tuple[int, int]] = []

    def capacity(self) -> Topology:
        return Topology(nodes=1, cpus_per_node=4)

    def scheduler(self) -> dict[str, str]:
        return {}

    def resume(self, *, advanced: bool) -> None:
        return None

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        self.ran.append((trial.world_size, trial.repeat))
        planted = self._step_s[trial.world_size]
        if planted is None:
            return Exit(codes=(1,) * trial.world_size, timed_out=False, first_failed=0)
        for report in self._make_record(trial, planted[trial.repeat]).reports:
            write_atomically(folder / f"rank-{report.rank.rank}.json", report.model_dump_json())
        return Exit(codes=(0,) * trial.world_size, timed_out=False, first_failed=None)


class Silent:
    def started(self, trial: Trial, folder: Path) -> None: ...
    def tick(self) -> None: ...
    def finished(self, record: Record) -> None: ...


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        usual = {"schema": 1, "name": "t", "trainers": ["torch-ddp"], "models": ["cnn"], "batch": 8}
        usual |= {"world_sizes": [1, 2, 3, 4], "repeats": {"max": 12, "until": "2%"}}
        path.write_text(yaml.safe_dump(usual | changes))
        return path

    return write


def test_repeats_are_added_where_the_interval_is_wide_and_nowhere_else(
    study: Callable[..., Path], make_record: MakeRecord, tmp_path: Path
) -> None:
    path = study()
    trials = study_trials(load_study(path), path, CPUS)
    assert len(trials) == 4 * 12
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    launcher = Planted(make_record, {1: STEADY, 2: SETTLES, 3: WILD, 4: None})
    rounds = []
    while todo := pending(trials, folder, ASKED):
        rounds.append(sorted({trial.repeat for trial in todo}))
        run_trials(todo, folder, launcher, ORIGIN, Silent())
    repeats = {size: sorted(repeat for ran, repeat in launcher.ran if ran == size) for size in (1, 2, 3, 4)}
    assert repeats[1] == list(range(6))
    assert 6 < len(repeats[2]) < 12
    assert repeats[3] == list(range(12))
    # What fails is not measured better by failing more often.
    assert repeats[4] == list(range(6))
    # All have the least before any gets more, and each gets one more at a time.
    assert rounds[0] == list(range(6))
    assert rounds[1:] == [[repeat] for repeat in range(6, 12)]


def test_a_stopped_run_goes_on_where_it_was(
    study: Callable[..., Path], make_record: MakeRecord, tmp_path: Path
) -> None:
    path = study(world_sizes=[2])
    trials = study_trials(load_study(path), path, CPUS)
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    launcher = Planted(make_record, {2: SETTLES})
    run_trials(pending(trials, folder, ASKED)[:2], folder, launcher, ORIGIN, Silent())
    assert [trial.repeat for trial in pending(trials, folder, ASKED)] == [2, 3, 4, 5]
    run_trials(pending(trials, folder, ASKED), folder, launcher, ORIGIN, Silent())
    assert [trial.repeat for trial in pending(trials, folder, ASKED)] == [6]


@pytest.mark.parametrize(
    ("repeats", "said"),
    [
        (
            {"min": 5, "until": "2%"},
            "repeats: min 5: an interval of 95 % takes six repeats; use 6 or more, or a fixed number of repeats",
        ),
        ({"min": 7, "max": 6, "until": "2%"}, "repeats: max 6 is less than min 7"),
        ({"max": 4, "until": "2%"}, "repeats: max 4 is less than min 6"),
        ({"min": 6}, "until"),
        ({"until": 2}, "is no percentage such as 2%"),
        ({"until": "2%", "mim": 6}, "repeats.mim: no field 'mim'; did you mean 'min'?"),
        ({"until": "0%"}, "until"),
        (0, "repeats"),
    ],
)
def test_what_makes_no_sense_is_named(study: Callable[..., Path], repeats: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        load_study(study(repeats=repeats))
    assert said in str(error.value)
    assert json.dumps(str(error.value)).count("\\n") == 0


def test_a_study_has_as_many_repeats_as_an_interval_of_95_percent_takes(study: Callable[..., Path]) -> None:
    path = study()
    fields = yaml.safe_load(path.read_text())
    del fields["repeats"]
    path.write_text(yaml.safe_dump(fields))
    assert load_study(path).repeats == 6
    adaptive = load_study(study(repeats={"until": "2%"})).adaptive
    assert adaptive is not None
    assert (adaptive.min, adaptive.max) == (6, 10)


def test_a_fixed_number_stays_what_it_was(study: Callable[..., Path]) -> None:
    path = study(repeats=2)
    loaded = load_study(path)
    assert loaded.adaptive is None
    assert {trial.repeat for trial in study_trials(loaded, path, CPUS)} == {0, 1}
