"""Two folders against each other: what was planted is found, and noise is not."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from scalestudy.analysis import intervals
from scalestudy.analysis.compare import ALIKE, FASTER, MATCH, SLOWER, changes, compare, html, markdown, summary
from scalestudy.launch.cli import app
from scalestudy.launch.folder import StudyFolder
from scalestudy.trainers.record import Environment, Record
from scalestudy.trainers.software import capture
from scalestudy.trainers.trainer import Trainer
from scalestudy.trainers.trial import Trial

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]
# By trainer and world size, the step times of six repeats, a third of a percent apart.
SPREAD = np.array([0.0, 0.2, 0.4, -0.2, -0.4, 0.1]) / 100
USUAL = {("torch-ddp", 1): 0.1, ("torch-ddp", 2): 0.12, ("tf-multiworker", 1): 0.2}


class Described:
    """As much of a trainer as is asked for its software."""

    def versions(self) -> dict[str, str]:
        return {}

    def settings(self) -> dict[str, str | int]:
        return {}


@pytest.fixture
def folder(tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord) -> Callable[..., Path]:
    """Return a writer of result folders: a step time by trainer and world size, None for trials that failed."""

    def write(name: str, step_s: dict[tuple[str, int], float | None], **changes: object) -> Path:
        out = StudyFolder(tmp_path / name)
        out.create("t")
        for (trainer, world_size), seconds in step_s.items():
            for repeat, spread in enumerate(SPREAD):
                trial = make_trial(trainer=trainer, world_size=world_size, repeat=repeat)
                if seconds is None:
                    record = make_record(trial, outcome="failed", reason="x", reports=())
                else:
                    record = make_record(trial, float(seconds * (1 + spread)))
                environment: Environment = record.environment.model_copy(update=changes)
                out.finish(out.begin(trial), record.model_copy(update={"environment": environment}))
        return out.path

    return write


def verdicts(points: pd.DataFrame) -> dict[tuple[str, int], str]:
    return {(row.trainer, row.world_size): row.verdict for row in points.itertuples()}


def test_a_planted_regression_of_two_percent_is_found_and_nothing_else(folder: Callable[..., Path]) -> None:
    base = folder("base", USUAL)
    new = folder("new", USUAL | {("torch-ddp", 2): 0.12 * 1.02})
    found = compare(base, new, tolerance=0.01)
    assert verdicts(found.points) == {
        ("torch-ddp", 1): ALIKE,
        ("torch-ddp", 2): SLOWER,
        ("tf-multiworker", 1): ALIKE,
    }
    [regression] = found.regressions.itertuples()
    assert regression.ratio == pytest.approx(1 / 1.02)
    assert regression.ratio_low < 1 / 1.02 < regression.ratio_high < 0.99
    assert found.regressed
    assert not compare(base, new, tolerance=0.03).regressed
    assert "1 of 3 points is slower; torch-ddp on 2 devices lost most: 2.0% of its throughput" in summary(found)[0]


def test_what_got_faster_is_no_regression(folder: Callable[..., Path]) -> None:
    found = compare(folder("base", USUAL), folder("new", USUAL | {("torch-ddp", 1): 0.08}), tolerance=0.0)
    assert verdicts(found.points)["torch-ddp", 1] == FASTER
    assert not found.regressed


def test_points_that_failed_or_are_missing_are_listed(folder: Callable[..., Path]) -> None:
    base = folder("base", USUAL | {("tf-mirrored", 1): 0.1})
    new = folder("new", {("torch-ddp", 1): 0.1, ("torch-ddp", 2): None, ("horovod-tf", 1): 0.1})
    found = compare(base, new, tolerance=0.05)
    assert verdicts(found.points) == {("torch-ddp", 1): ALIKE}
    assert found.lost[["trainer", "world_size"]].to_numpy().tolist() == [["torch-ddp", 2]]
    assert sorted(found.base_only.trainer) == ["tf-mirrored", "tf-multiworker"]
    assert found.new_only.trainer.tolist() == ["horovod-tf"]
    # What no longer runs is worse than slow.
    assert found.regressed
    assert "1 point that the base measured failed in every trial of the new one." in summary(found)


def test_differences_of_the_environment_come_first(folder: Callable[..., Path]) -> None:
    base = folder("base", USUAL, started_at="2026-01-01T00:00:00+00:00", scheduler={"partition": "a"})
    new = folder("new", USUAL, started_at="2026-02-01T00:00:00+00:00", scheduler={"partition": "b"}, launcher="slurm")
    found = compare(base, new, tolerance=0.0)
    assert dict(found.environment) == {
        "measured": (
            "2026-01-01T00:00:00+00:00 to 2026-01-01T00:00:00+00:00",
            "2026-02-01T00:00:00+00:00 to 2026-02-01T00:00:00+00:00",
        ),
        "launcher": ("local", "slurm"),
        "partition": ("a", "b"),
    }
    assert len(found.points) == 3
    text = markdown(found)
    assert text.index("partition: a → b") < text.index("| workload |")
    page = html(found)
    assert page.index("<td>partition</td>") < page.index("data:image/svg+xml")
    assert page.count("no difference shown</td>") == 3


def test_a_variable_that_made_the_new_one_slower_is_named(
    make_trial: MakeTrial, make_record: MakeRecord, tmp_path: Path
) -> None:
    def write(name: str, step_s: float, environ: dict[str, str]) -> Path:
        out = StudyFolder(tmp_path / name)
        out.create("t")
        software = capture(cast(Trainer, Described()), environ)
        record = make_record(make_trial(), step_s)
        reports = tuple(report.model_copy(update={"software": software}) for report in record.reports)
        out.finish(out.begin(record.trial), record.model_copy(update={"reports": reports}))
        return out.path

    usual = {"HOME": "/root", "OMP_NUM_THREADS": "1"}
    slow = {**usual, "ATEN_CPU_CAPABILITY": "default", "LD_PRELOAD": "/lib/libslow.so"}
    found = compare(write("base", 0.1, usual), write("new", 0.2, slow), tolerance=0.0)
    assert found.environment["environment variable"] == (
        "OMP_NUM_THREADS=1",
        "ATEN_CPU_CAPABILITY=default, LD_PRELOAD=/lib/libslow.so",
    )
    assert "environment variable: OMP_NUM_THREADS=1 → ATEN_CPU_CAPABILITY=default" in markdown(found)


def test_one_repeat_shows_nothing() -> None:
    assert changes(sample([100.0]), sample([50.0])).verdict.tolist() == [ALIKE]


def test_noise_is_rarely_called_a_difference() -> None:
    """Intervals of 95 % that do not overlap: by chance far less often than once in twenty."""
    rng = np.random.default_rng(1)
    flagged = sum(
        changes(sample(rng.normal(100, 2, 6)), sample(rng.normal(100, 2, 6))).verdict.item() != ALIKE
        for _ in range(200)
    )
    assert flagged <= 10


def sample(throughputs: object) -> pd.DataFrame:
    values = dict.fromkeys(MATCH, "x")
    return pd.DataFrame({"throughput_images_per_s": throughputs}).assign(**values)


def test_few_repeats_are_said(make_trial: MakeTrial, folder: Callable[..., Path]) -> None:
    found = compare(folder("base", USUAL), folder("new", USUAL), tolerance=0.0)
    assert not any("repeats, whose interval" in sentence for sentence in summary(found))
    few = found.points.assign(new_repeats=3)
    assert f"holds the true median {intervals.coverage(3):.0%} of the time" in " ".join(
        summary(type(found)(**(vars(found) | {"points": few})))
    )


@pytest.mark.parametrize(
    ("tolerance", "code"), [("0%", 1), ("1.5%", 1), ("3%", 0), ("3", 2), ("-1%", 2), ("100%", 2), ("x%", 2)]
)
def test_the_exit_code_is_for_ci(folder: Callable[..., Path], tmp_path: Path, tolerance: str, code: int) -> None:
    base, new = folder("base", USUAL), folder("new", USUAL | {("torch-ddp", 2): 0.12 * 1.02})
    page = tmp_path / "page.html"
    told = CliRunner().invoke(app, ["compare", str(base), str(new), f"--tolerance={tolerance}", "--html", str(page)])
    if code == 2:
        assert "--tolerance" in str(told.exception)
    else:
        assert told.exit_code == code
        assert told.stdout.startswith(f"# {new} against {base}")
        assert "svg" in page.read_text()


def test_a_folder_without_records_is_named(folder: Callable[..., Path], tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["compare", str(folder("base", USUAL)), str(tmp_path / "gone")])
    assert "gone: no records there" in str(told.exception)
