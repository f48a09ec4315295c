"""The controller on nodes that come and go: a launcher of its own stands for the cluster."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.cluster.host import Topology, this_host
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.launcher import Exit
from scalestudy.launch.runner import Origin, Side, pending, run_in_turns, run_trials
from scalestudy.trainers.record import Costs, Record
from scalestudy.trainers.trial import Trial

ORIGIN = Origin(study_name="t", study_text="name: t", costs=Costs(), host=this_host(), scalestudy="0", git_commit=None)
MakeTrial = Callable[..., Trial]


class Nodes:
    """Four nodes; `script` says what each run comes to: how many nodes it loses, None for a plain failure."""

    name = "slurm"
    elastic = False

    def __init__(self, *script: int | None) -> None:
        self.nodes = 4
        self._script = list(script)
        self.ran: list[int] = []

    def capacity(self) -> Topology:
        return Topology(nodes=self.nodes, cpus_per_node=2)

    def scheduler(self) -> dict[str, str]:
        return {"Slurm job": "12"}

    def resume(self, *, advanced: bool) -> str | None:
        return None

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        self.ran.append(trial.world_size)
        lost = self._script.pop(0) if self._script else None
        if lost is None:
            return Exit(codes=(1,) * trial.world_size, timed_out=False, first_failed=0)
        self.nodes -= lost
        return Exit((), False, None, tuple(f"node{self.nodes + i + 1}" for i in range(max(lost, 1))))


class Silent:
    def started(self, trial: Trial, folder: Path) -> None: ...
    def tick(self) -> None: ...
    def finished(self, record: Record) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    made = StudyFolder(tmp_path / "out")
    made.create("t")
    return made


@pytest.fixture
def trials(make_trial: MakeTrial) -> list[Trial]:
    return [make_trial(world_size=size, devices_per_node=1) for size in (4, 2, 1)]


def test_a_lost_node_costs_its_trial_and_the_rest_goes_on(folder: StudyFolder, trials: list[Trial]) -> None:
    cluster = Nodes(1)
    waiting = run_trials(trials, folder, cluster, ORIGIN, Silent())
    assert cluster.ran == [4, 2, 1]
    assert waiting == pending(trials, folder) == trials[:1]
    record = folder.record(trials[0])
    assert record is not None
    assert (record.outcome, record.reason, record.retry) == ("failed", "node node4 failed under the trial", True)
    assert record.environment.scheduler == {"Slurm job": "12"}


def test_a_trial_that_lost_a_node_runs_again_when_enough_are_left(folder: StudyFolder, trials: list[Trial]) -> None:
    cluster = Nodes(None, 1)
    assert run_trials(trials, folder, cluster, ORIGIN, Silent()) == []
    assert cluster.ran == [4, 2, 1, 2]
    assert pending(trials, folder) == []
    # What the node's loss left is kept beside the new record.
    [kept] = folder.trials_path.glob("*-w2-*.unfinished-1/record.json")
    assert "node node4 failed" in kept.read_text()


def test_a_trial_that_loses_a_node_every_time_is_tried_three_times(folder: StudyFolder, trials: list[Trial]) -> None:
    cluster = Nodes(0, 0, 0, 0)
    assert run_trials(trials[2:], folder, cluster, ORIGIN, Silent()) == []
    assert cluster.ran == [1, 1, 1]
    assert pending(trials[2:], folder) == trials[2:]


def test_what_no_launcher_can_run_is_skipped_with_the_reason(folder: StudyFolder, make_trial: MakeTrial) -> None:
    trial = make_trial(trainer="tf-mirrored", world_size=4, devices_per_node=2)
    cluster = Nodes()
    cluster.nodes = 1
    assert run_trials([trial], folder, cluster, ORIGIN, Silent()) == []
    assert cluster.ran == []
    record = folder.record(trial)
    assert record is not None
    assert record.outcome == "skipped"


def test_what_finds_too_few_nodes_is_noted_and_tried_again_by_the_next_run(
    folder: StudyFolder, trials: list[Trial]
) -> None:
    cluster = Nodes()
    cluster.nodes = 2
    assert run_trials(trials, folder, cluster, ORIGIN, Silent()) == trials[:1]
    record = folder.record(trials[0])
    assert record is not None
    assert (record.outcome, record.reason) == ("skipped", "needs 4 nodes with 1 cpu devices, 2 are there")
    assert pending(trials, folder) == trials[:1]


class Torn:
    """One node, whose ranks leave what they are told to as their reports."""

    name = "local"
    elastic = False

    def __init__(self, *reports: str | bytes | None) -> None:
        self._reports = reports

    def capacity(self) -> Topology:
        return Topology(nodes=1, cpus_per_node=8)

    def scheduler(self) -> dict[str, str]:
        return {}

    def resume(self, *, advanced: bool) -> str | None:
        return None

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        for rank, report in enumerate(self._reports[: trial.world_size]):
            if report is not None:
                (folder / f"rank-{rank}.json").write_bytes(report if isinstance(report, bytes) else report.encode())
        return Exit(codes=(0,) * trial.world_size, timed_out=False, first_failed=None)


def test_a_rank_report_that_cannot_be_read_costs_its_trial_and_says_why(
    folder: StudyFolder, make_trial: MakeTrial, make_record: Callable[..., Record]
) -> None:
    trials = [make_trial(world_size=2, repeat=repeat) for repeat in range(4)]
    zero, one = (report.model_dump_json() for report in make_record(trials[0]).reports)
    endings: list[tuple[str | bytes, str, str]] = [
        (one[:40], "failed", "rank-1.json is torn: 40 bytes, EOF while parsing"),
        (b"\xff", "failed", "rank-1.json is torn: 1 bytes"),
        (zero, "failed", "rank-1.json is the report of rank 0"),
        (one, "ok", ""),
    ]
    for trial, (report, _, _) in zip(trials, endings, strict=True):
        assert run_trials([trial], folder, Torn(zero, report), ORIGIN, Silent()) == []
    for trial, (_, outcome, reason) in zip(trials, endings, strict=True):
        record = folder.record(trial)
        assert record is not None
        assert (record.outcome, (record.reason or "")[: len(reason)]) == (outcome, reason)
    # The reports that can be read are kept.
    first = folder.record(trials[0])
    assert first is not None
    assert [report.rank.rank for report in first.reports] == [0]


def test_ranks_that_timed_nothing_they_agree_on_have_measured_nothing(
    folder: StudyFolder, make_trial: MakeTrial, make_record: Callable[..., Record]
) -> None:
    trial = make_trial(world_size=2)
    zero, one = make_record(trial).reports
    halved = one.model_copy(update={"windows": one.windows[:1]}).model_dump_json()
    run_trials([trial], folder, Torn(zero.model_dump_json(), halved), ORIGIN, Silent())
    record = folder.record(trial)
    assert record is not None
    assert (record.outcome, record.reason) == ("failed", "the ranks timed different windows")


def test_a_reason_that_is_not_utf_8_is_written_all_the_same(folder: StudyFolder, make_trial: MakeTrial) -> None:
    class Lost(Torn):
        def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
            raise FileNotFoundError(2, "No such file", os.fsdecode(b"/data/\xff"))

    run_trials([trial := make_trial()], folder, Lost(), ORIGIN, Silent())
    record = folder.record(trial)
    assert record is not None
    assert record.reason is not None
    assert "/data/" in record.reason
    assert record.reason.isprintable()


def test_two_studies_run_in_turns_repeat_by_repeat(tmp_path: Path, make_trial: MakeTrial) -> None:
    ran: list[tuple[str, int]] = []

    class Noting(Nodes):
        def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
            ran.append((folder.parents[1].name, trial.repeat))
            return super().run(trial, folder, deadline_s, tick)

    trials = [make_trial(world_size=size, repeat=repeat) for repeat in range(6) for size in (1, 2)]
    sides = []
    for name in ("base", "new"):
        folder = StudyFolder(tmp_path / name)
        folder.create("t")
        sides.append(Side(trials=trials, folder=folder, launcher=Noting(), origin=ORIGIN))
    run_in_turns(sides, Silent())
    assert [repeat for _, repeat in ran] == sorted(repeat for _, repeat in ran)
    blocks = [[name for name, of in ran if of == repeat] for repeat in range(6)]
    assert {tuple(sorted(block)) for block in blocks} == {("base", "base", "new", "new")}
    # Neither side comes first in all of them, nor second.
    assert len({tuple(block) for block in blocks}) > 2
    # What has a record is not run again.
    run_in_turns(sides, Silent())
    assert len(ran) == 24
