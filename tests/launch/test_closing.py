"""Real ranks that go wrong after their timed windows: the trial is measured all the same, and soon over."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalestudy.cluster.host import this_host
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.local import LocalLauncher
from scalestudy.launch.runner import Origin, run_trial
from scalestudy.trainers.record import Costs, Record
from scalestudy.trainers.trial import Measurement, Trial

pytestmark = pytest.mark.slow

FAKE = Path(__file__).parents[1] / "trainers" / "fake_trainer.py"
QUICK: dict[str, Any] = {"window_s": 0.002, "windows": 2, "warm_up_max_s": 0.002, "telemetry_hz": 0}
RunRanks = Callable[..., tuple[Record, list[str]]]


class Silent:
    def started(self, trial: Trial, folder: Path) -> None: ...
    def tick(self) -> None: ...
    def finished(self, record: Record) -> None: ...


@pytest.fixture
def run_ranks(tmp_path: Path, make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> RunRanks:
    """Return a runner of two ranks, failures by rank and method of their trainer: the record, and the ranks' logs."""
    interpreter = tmp_path / "interpreter"
    # Where the launcher says `-m scalestudy.trainers.worker`.
    interpreter.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {FAKE} "$@"\n')
    interpreter.chmod(0o755)
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    origin = Origin(
        study_name="t", study_text="name: t", costs=Costs(), host=this_host(), scalestudy="0", git_commit=None
    )

    def run_ranks(failures: dict[int, dict[str, str]], deadline_s: float = 60) -> tuple[Record, list[str]]:
        monkeypatch.setenv("FAKE_FAILURES", json.dumps(failures))
        plan = Measurement(**QUICK, cause_windows=1, deadline_s=deadline_s)
        trial = make_trial(world_size=2, measurement=plan)
        record = run_trial(trial, folder, LocalLauncher({"torch-ddp": str(interpreter)}), origin, Silent())
        return record, [(folder.trial_path(trial) / f"rank-{rank}.log").read_text() for rank in range(2)]

    return run_ranks


@pytest.mark.parametrize(
    ("how", "logged"),
    [
        ("crash", "Fatal Python error: Aborted"),
        ("raise", "RuntimeError: it broke"),
        ("hang", "Timeout (0:00:01)!"),
        ("kill", ""),
    ],
)
def test_a_rank_that_goes_wrong_in_closing_costs_nothing(run_ranks: RunRanks, how: str, logged: str) -> None:
    """Neither the trial nor the other rank, whose report is there by then."""
    began_s = time.monotonic()
    record, logs = run_ranks({1: {"close": how}})
    assert (record.outcome, record.reason) == ("ok", None)
    assert record.missing == {}
    assert all(len(report.local_windows) >= 2 for report in record.reports)
    assert ["close" in report.phases for report in record.reports] == [True, how == "raise"]
    assert logged in logs[1]
    assert time.monotonic() - began_s < 30


def test_memory_that_runs_out_in_one_ranks_parts_costs_those_alone(run_ranks: RunRanks) -> None:
    """The other waits for it in a collective: it is not left there until the deadline."""
    began_s = time.monotonic()
    record, _ = run_ranks({1: {"local_step": "out of memory"}})
    assert (record.outcome, record.reason) == ("ok", None)
    assert record.missing == {"causes": "rank 1: RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB."}
    assert record.out_of_memory is not None
    assert record.throughput_images_per_s > 0
    assert time.monotonic() - began_s < 30


@pytest.mark.parametrize(
    ("method", "how", "phase"), [("construct", "hang", "rendezvous"), ("step", "hang in C", "first_step")]
)
def test_a_hang_is_told_by_where_every_rank_stands(run_ranks: RunRanks, method: str, how: str, phase: str) -> None:
    """Also where the rank that hangs holds the interpreter's lock; the others wait for it, and are named first."""
    record, logs = run_ranks({1: {method: how}}, deadline_s=6)
    assert record.outcome == "timeout"
    told = (
        r"not done within deadline_s = 6: rank 0 is in warm_up \(fake_trainer\.py:\d+ max_over_ranks\); "
        rf"rank 1 never came there: in {phase} \(fake_trainer\.py:\d+ _go\)"
    )
    assert re.fullmatch(told, record.reason or ""), record.reason
    for log in logs:
        assert "most recent call first" in log
        assert "trainers/worker.py" in log


def test_a_deadline_in_the_parts_of_a_step_costs_those_alone(run_ranks: RunRanks) -> None:
    record, _ = run_ranks({0: {"resident_step": "hang"}}, deadline_s=4)
    assert (record.outcome, record.reason) == ("ok", None)
    assert "causes" in record.missing
    assert record.out_of_memory is None
