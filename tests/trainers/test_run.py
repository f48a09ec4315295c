"""What a rank does around its training, in order: the real `run` drives a trainer without a framework."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.trainers import worker
from scalestudy.trainers.devices import settled
from scalestudy.trainers.record import CUT_SHORT, RankReport
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Measurement, Sweep, Trial
from scalestudy.trainers.worker import run

RANK = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")
DIGITS = Data(source="digits", channels=1, image_size=32, classes=10)
QUICK: dict[str, Any] = {"window_s": 0.002, "windows": 2, "warm_up_max_s": 0.002, "telemetry_hz": 0}
Run = Callable[..., RankReport]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put the fake in the place of every trainer."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name, entry in TRAINERS.items():
        monkeypatch.setitem(TRAINERS, name, replace(entry, module="fake_trainer", class_name="FakeTrainer"))
    import fake_trainer  # type: ignore[import-not-found]

    fake_trainer.LOG.clear()
    module: ModuleType = fake_trainer
    return module


@pytest.fixture
def run_rank(
    fake: ModuleType, make_trial: Callable[..., Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Return a runner of the only rank of a trial, with failures by the trainer's methods."""

    def run_rank(failures: dict[str, str] | None = None, cause_windows: int = 1, **changes: Any) -> RankReport:
        monkeypatch.setenv("FAKE_FAILURES", json.dumps({"0": failures or {}}))
        # A rank names an interface where none is.
        for name, value in (rank_environ(RANK, ["127.0.0.1:1"]) | {"GLOO_SOCKET_IFNAME": "lo"}).items():
            monkeypatch.setenv(name, value)
        trial = make_trial(measurement=Measurement(**QUICK, cause_windows=cause_windows), **changes)
        own = os.sched_getaffinity(0)
        try:
            told = run(trial, RANK, tmp_path)
        finally:
            # A rank pins its process.
            os.sched_setaffinity(0, own)
        assert told == left(tmp_path)
        return told

    return run_rank


def left(folder: Path) -> RankReport:
    return RankReport.model_validate_json((folder / "rank-0.json").read_bytes())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_ranks_connect_while_they_meet(run_rank: Run, fake: ModuleType, trainer: str) -> None:
    """A small message and a large one, before anything is built: libraries connect when they are first used."""
    report = run_rank(trainer=trainer)
    assert fake.LOG[:5] == ["construct", "all_reduce of 1", "all_reduce of 4194304", "synchronize", "build"]
    assert list(report.phases)[:3] == ["import", "rendezvous", "build"]


def test_a_rank_that_cannot_connect_fails_in_rendezvous(run_rank: Run, fake: ModuleType) -> None:
    report = run_rank({"all_reduce of 1": "raise"})
    assert report.error is not None
    assert list(report.phases) == ["import", "rendezvous"]
    assert "close" not in fake.LOG


@pytest.mark.parametrize(
    "changes", [{}, {"sweep": Sweep(smallest_bytes=4, largest_bytes=4, window_s=1e-4)}], ids=["training", "sweep"]
)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_report_is_whole_before_the_trainer_is_closed(
    run_rank: Run, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, changes: Any
) -> None:
    before: list[RankReport] = []
    monkeypatch.setattr(fake.FakeTrainer, "close", lambda _: before.append(left(tmp_path)))
    after = run_rank(trainer=trainer, **changes)
    [whole] = before
    assert after.phases.keys() - whole.phases.keys() == {"close"}
    kept = {"phases", "phase_starts_s"}
    assert whole.model_dump(exclude=kept) == after.model_dump(exclude=kept)


@pytest.mark.parametrize("how", ["raise", "exit"])
def test_an_error_of_closing_is_logged_and_costs_nothing(
    run_rank: Run, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    report = run_rank({"close": how})
    assert (report.error, report.missing) == (None, {})
    assert len(report.windows) == 2
    assert "close" in report.phases
    assert {"raise": "RuntimeError: it broke", "exit": "SystemExit: 5"}[how] in capfd.readouterr().err


def test_peaks_of_memory_are_those_of_the_warm_up_and_of_the_timed_windows(run_rank: Run, fake: ModuleType) -> None:
    """The parts of a step, which hold 7,000 bytes, are in neither."""
    report = run_rank()
    assert report.warm_up_memory is not None
    assert report.memory is not None
    assert (report.warm_up_memory.peak_allocated_bytes, report.memory.peak_allocated_bytes) == (9_000, 1_000)
    steps = [place for place, method in enumerate(fake.LOG) if method == "step"]
    timed = sum(window.steps for window in report.windows)
    assert fake.LOG.count("reset_peaks") == 1
    assert steps[-timed - 1] < fake.LOG.index("reset_peaks") < steps[-timed]


@pytest.mark.parametrize("method", ["kept", "local_step", "resident_step"])
@pytest.mark.parametrize(("how", "kind"), [("out of memory", "oom"), ("raise", "failed")])
def test_an_error_in_the_parts_of_a_step_costs_those_alone(
    run_rank: Run, fake: ModuleType, method: str, how: str, kind: str
) -> None:
    report = run_rank({method: how}, data=DIGITS)
    assert report.error is None
    assert len(report.windows) == 2
    assert report.parameter_checksums
    assert report.local_windows == ()
    assert report.missing.keys() == {"causes"}
    assert report.test_accuracy == 0.5
    assert report.missing["causes"].kind == kind
    assert report.missing["causes"].allocator == ("what is held" if kind == "oom" else None)
    # Nobody may be left waiting for this rank: the launcher ends them when it leaves, and leave it must.
    assert "close" not in report.phases
    assert ("put_back" in fake.LOG) == (method != "kept")


def test_an_error_in_the_test_costs_the_parts_too_and_says_so(run_rank: Run) -> None:
    """Other ranks may be testing still: whoever fails leaves, and nothing is timed without it."""
    report = run_rank({"test_accuracy": "out of memory"}, data=DIGITS)
    assert report.error is None
    assert len(report.windows) == 2
    assert report.missing.keys() == {"test", "causes"}
    assert {error.message for error in report.missing.values()} == {
        "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB."
    }


@pytest.mark.parametrize(
    ("refused", "free", "kind"),
    [("while it failed", 0.5, "oom"), ("before", 0.5, "failed"), ("never", 0.5, "failed"), ("never", 0.01, "oom")],
)
def test_doubtful_words_are_memory_where_the_allocator_refused_or_the_device_is_full(
    run_rank: Run, fake: ModuleType, monkeypatch: pytest.MonkeyPatch, refused: str, free: float, kind: str
) -> None:
    """A workspace of 30 % does not fit into 20 %: only the allocator knows that it was asked for it.

    In the first step it may refuse what cuDNN's search for algorithms asks for, and nothing is amiss.
    """
    fake.REFUSED.clear()
    steps = iter(range(100))

    def step(_: object) -> None:
        first = next(steps) == 0
        if refused == ("before" if first else "while it failed"):
            fake.REFUSED.append("a workspace")
        if not first:
            raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(fake.FakeTrainer, "step", step)
    monkeypatch.setattr(worker, "least_free_share", lambda _: free)
    report = run_rank(device="gpu")
    assert report.error is not None
    assert report.error.kind == kind


def test_the_memory_that_is_looked_at_is_that_of_the_gpu_that_the_rank_drives(
    run_rank: Run, fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []

    def step(_: object) -> None:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(worker, "placed", lambda trial, rank, _: settled(trial, rank, gpus=8))
    monkeypatch.setattr(fake.FakeTrainer, "step", step)
    monkeypatch.setattr(worker, "least_free_share", looked_at.extend)
    report = run_rank(device="gpu", repeat=5)
    assert looked_at == [5]
    assert report.rank.devices == (5,)


def test_a_rank_that_does_all_misses_nothing(run_rank: Run) -> None:
    report = run_rank()
    assert report.missing == {}
    assert report.local_windows
    assert report.test_accuracy == 0.5


def test_while_the_parts_are_timed_the_report_says_that_they_are_missing(
    run_rank: Run, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the process be killed there, what it left is whole and says what it lacks."""
    before: list[RankReport] = []

    def kept(_: object) -> Callable[[], None]:
        before.append(left(tmp_path))
        return lambda: None

    monkeypatch.setattr(fake.FakeTrainer, "kept", kept)
    run_rank()
    assert before[0].missing == {"causes": CUT_SHORT}
    assert before[0].test_accuracy == 0.5
    assert before[0].parameter_checksums
    assert len(before[0].windows) == 2


@pytest.mark.parametrize("method", ["construct", "build", "step", "replicas"])
def test_an_error_before_that_costs_the_trial(run_rank: Run, method: str) -> None:
    report = run_rank({method: "out of memory"})
    assert report.error is not None
    assert report.error.kind == "oom"
    assert report.error.message == "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert report.missing == {}


def test_a_framework_that_is_broken_when_memory_runs_out_costs_no_report(
    run_rank: Run, fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def summary() -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fake.FakeTrainer, "allocator_summary", staticmethod(summary))
    report = run_rank({"step": "out of memory"})
    assert report.error is not None
    assert (report.error.kind, report.error.allocator) == ("oom", None)


# What TensorFlow says of a file cut short, and of others.
DECODING = (
    "{{function_node __wrapped__IteratorGetNext}} Invalid PNG data, size 60\n\t [[{{node decode_image/DecodeImage}}]]"
)


class InvalidArgumentError(Exception):
    """Named as TensorFlow's."""


class ResourceExhaustedError(Exception):
    """Named as TensorFlow's."""


@pytest.mark.parametrize(
    ("error", "looked"),
    [
        (InvalidArgumentError(DECODING), True),
        (InvalidArgumentError("Incompatible shapes: [8,10] vs. [4,10] [Op:AddV2]"), False),
        (ResourceExhaustedError(f"OOM when allocating tensor with shape[8,3] {DECODING}"), False),
        (RuntimeError("NCCL error: unhandled system error"), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), False),
        (ValueError("/data/cats/5.png: not a readable image"), False),
    ],
)
def test_a_broken_image_is_looked_for_only_after_an_error_of_decoding(
    run_rank: Run, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, looked: bool
) -> None:
    (tmp_path / "images/cats").mkdir(parents=True)
    (tmp_path / "images/cats/5.png").write_bytes(b"no image")

    def step(_: object) -> None:
        raise error

    monkeypatch.setattr(fake.FakeTrainer, "step", step)
    data = Data(source="images", folder=str(tmp_path / "images"), channels=3, image_size=32, classes=1)
    report = run_rank(data=data)
    assert report.error is not None
    found = report.error.message == f"{tmp_path / 'images/cats/5.png'}: not a readable image"
    assert found is looked, report.error.message


def test_a_folder_of_images_that_is_gone_costs_no_report(
    run_rank: Run, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_: object) -> None:
        raise InvalidArgumentError(DECODING)

    monkeypatch.setattr(fake.FakeTrainer, "step", step)
    report = run_rank(data=Data(source="images", folder=str(tmp_path / "gone"), channels=3, image_size=32, classes=1))
    assert report.error is not None
    assert report.error.message.startswith("InvalidArgumentError: ")
