"""Two folders against each other: what was planted is found, and noise is not."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from scalestudy.analysis.compare import (
    ALIKE,
    FASTER,
    HELD,
    MATCH,
    REGRESSED,
    SLOWER,
    UNCLEAR,
    changes,
    compare,
    html,
    interleaved,
    markdown,
    summary,
)
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
    """Return a writer of result folders: a step time by trainer and world size, None for trials that failed, and
    of each point `failing` more. `starts` has when each repeat started.
    """

    def write(
        name: str,
        step_s: dict[tuple[str, int], float | None],
        *,
        repeats: int = 6,
        failing: int = 0,
        starts: Sequence[str] = (),
        outcome: str = "failed",
        **changes: object,
    ) -> Path:
        out = StudyFolder(tmp_path / name)
        out.create("t")
        # Every folder on a day of its own.
        day = len(list(tmp_path.glob("*/scalestudy.json")))
        starts = starts or [f"2026-03-{day:02}T00:0{repeat}:00+00:00" for repeat in range(repeats)]
        for (trainer, world_size), seconds in step_s.items():
            for repeat, spread in enumerate(SPREAD[:repeats]):
                trial = make_trial(trainer=trainer, world_size=world_size, repeat=repeat)
                if seconds is None or repeat < failing:
                    record = make_record(trial, outcome=outcome, reason="x", reports=())
                else:
                    record = make_record(trial, float(seconds * (1 + spread)))
                environment: Environment = record.environment.model_copy(
                    update={"started_at": starts[repeat]} | changes
                )
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
    [regression] = found.points[found.points.gate == REGRESSED].itertuples()
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


def sample(log_throughputs: NDArray[np.float64]) -> pd.DataFrame:
    """Return trials of as many points as there are rows, each with as many repeats as columns."""
    points, repeats = log_throughputs.shape
    rows = pd.DataFrame(
        {"throughput_images_per_s": np.exp(log_throughputs).ravel(), "repeat": np.tile(np.arange(repeats), points)}
    )
    return rows.assign(**dict.fromkeys(MATCH, "x")).assign(world_size=np.repeat(np.arange(points), repeats))


def sides(rng: np.random.Generator, spread: float, points: int, new: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a base and a new one that is `new` times as fast: six repeats of so many points."""
    return sample(rng.normal(0, spread, (points, 6))), sample(rng.normal(np.log(new), spread, (points, 6)))


def test_one_repeat_shows_nothing() -> None:
    [row] = changes(sample(np.log([[100.0]])), sample(np.log([[50.0]])), 0.03).itertuples()
    assert (row.verdict, row.gate, row.ratio) == (ALIKE, UNCLEAR, pytest.approx(0.5))


def test_forty_points_of_the_same_are_rarely_called_worse() -> None:
    rng = np.random.default_rng(0)
    tries = 40
    pages = [changes(*sides(rng, 0.015, 40), 0.0) for _ in range(tries)]
    # Of 40 tries with 5 % false ones, more than 7 are called worse in one of a thousand.
    assert sum((page.gate == REGRESSED).any() for page in pages) <= 7
    assert sum((page.verdict != ALIKE).any() for page in pages) <= 7


def test_a_loss_within_the_tolerance_rarely_fails() -> None:
    rng = np.random.default_rng(0)
    page = changes(*sides(rng, 0.01, 300, new=0.971), 0.03)
    # Each point as if it were the only one: 2.5 % are expected, 18 of 300 and more come once in a thousand tries.
    assert ((page.p_past <= 0.05) & (page.ratio < 0.97)).sum() < 18
    # Nor does it pass: a loss of nearly 3 % is not shown to be less.
    assert (page.gate == HELD).sum() < 18


def test_a_clear_loss_is_a_regression_and_none_passes() -> None:
    rng = np.random.default_rng(0)
    page = changes(*sides(rng, 0.005, 10, new=0.94), 0.03)
    assert set(page.gate) == {REGRESSED}
    assert set(page.verdict) == {SLOWER}
    page = changes(*sides(rng, 0.003, 10), 0.03)
    assert set(page.gate) == {HELD}


def test_what_slowed_a_repeat_of_both_cancels_where_they_were_measured_in_turns() -> None:
    rng = np.random.default_rng(0)
    slow = rng.normal(0, 0.05, 6)
    base, new = (sample(slow + rng.normal(np.log(speed), 0.003, (5, 6))) for speed in (1, 0.95))
    assert set(changes(base, new, 0.03, paired=True).gate) == {REGRESSED}
    assert set(changes(base, new, 0.03).gate) == {UNCLEAR}


def test_days_of_the_base_put_what_a_day_changes_into_the_intervals() -> None:
    rng = np.random.default_rng(0)
    # 200 points, each with days of its own.
    base, new, *again = (sample(rng.normal(0, 0.015, (200, 1)) + rng.normal(0, 0.005, (200, 6))) for _ in range(4))
    found = changes(base, new, 0.03)
    assert (found.p_value <= 0.05).mean() > 0.5
    for days in (again[:1], again):
        # Of 200 with 5 % false ones, more than 20 are called different in one of a thousand.
        assert (changes(base, new, 0.03, again=days).p_value <= 0.05).sum() <= 20


def test_the_smallest_loss_that_was_to_be_found_and_the_repeats_that_would_find_the_tolerance() -> None:
    rng = np.random.default_rng(0)
    points = pd.concat([changes(*sides(rng, 0.02, 1), 0.03) for _ in range(200)])
    # t of ten degrees: (2.228 + 0.879) × 2 % × sqrt(2 / 6) = 3.6 %.
    assert points.detectable.median() == pytest.approx(0.0352, abs=0.002)
    # (2.12 + 0.865) × 2 % × sqrt(2 / 8.0) = 2.99 %: of 3.05 % in logs.
    assert points.repeats_needed.median() in (8, 9)


@pytest.mark.parametrize(
    ("changed", "options", "code", "said"),
    [
        ({("torch-ddp", 1): 0.1}, {}, 0, "No point lost more than the tolerance of 3.0%"),
        ({("torch-ddp", 1): 0.2}, {}, 1, "1 point is slower by more than the tolerance of 3.0%"),
        ({("torch-ddp", 1): 0.2}, {"repeats": 1}, 3, "A point has 1 repeat: measure it 6 times"),
        ({("torch-ddp", 1): 0.1}, {"repeats": 3}, 3, "A point has 3 repeats: measure it 6 times"),
        ({("torch-ddp", 1): 0.1}, {"failing": 5}, 1, "5 of 6 trials failed, in the base 0 of 6"),
        ({("torch-ddp", 1): 0.1}, {"failing": 1}, 3, "1 of 6 trials failed, in the base 0 of 6"),
        ({("torch-ddp", 1): None}, {}, 1, "1 point that the base measured failed in every trial"),
        ({("torch-ddp", 4): 0.1}, {}, 3, "no point in common"),
    ],
)
def test_the_gate_passes_only_what_is_shown_to_hold(
    folder: Callable[..., Path],
    changed: dict[tuple[str, int], float | None],
    options: dict[str, int],
    code: int,
    said: str,
) -> None:
    base, new = folder("base", {("torch-ddp", 1): 0.1}), folder("new", changed, **options)
    told = CliRunner().invoke(app, ["compare", str(base), str(new)])
    assert told.exit_code == code, told.stdout
    assert said in told.stdout


def test_one_of_two_points_missing_fails(folder: Callable[..., Path]) -> None:
    base, new = folder("base", {("torch-ddp", 1): 0.1, ("torch-ddp", 2): 0.1}), folder("new", {("torch-ddp", 1): 0.1})
    told = CliRunner().invoke(app, ["compare", str(base), str(new)])
    assert told.exit_code == 1
    assert "1 point of the base is missing in the new one." in told.stdout


def test_a_study_measured_in_turns_is_paired_and_says_nothing_of_days(folder: Callable[..., Path]) -> None:
    starts = [[f"2026-01-01T00:0{repeat}:{side}0+00:00" for repeat in range(6)] for side in range(3)]
    base, new = (folder(name, USUAL, starts=starts[side]) for side, name in enumerate(("base", "new")))
    found = compare(base, new, 0.03)
    assert found.interleaved
    assert found.points.ratio_high.to_numpy() == pytest.approx(1)
    assert "in turns" not in " ".join(summary(found))
    later = folder("later", USUAL, starts=[f"2026-01-02T00:0{repeat}:00+00:00" for repeat in range(6)])
    found = compare(base, later, 0.03)
    assert not found.interleaved
    assert "what another day or host changes is not in the intervals" in " ".join(summary(found))
    earlier = folder("earlier", USUAL, starts=[f"2025-12-31T00:0{repeat}:00+00:00" for repeat in range(6)])
    found = compare(base, later, 0.03, [earlier])
    assert "The base was measured on 2 days" in " ".join(summary(found))
    with pytest.raises(ValueError, match=re.escape(f"{new}: --base-again: was measured on 2026-01-01, as was {base}")):
        compare(base, later, 0.03, [earlier, new])


def test_a_point_that_lacks_the_other_days_is_not_said_to_know_them(folder: Callable[..., Path]) -> None:
    base, new, day = folder("base", USUAL), folder("new", USUAL), folder("day", {("torch-ddp", 1): 0.1})
    found = compare(base, new, 0.03, [day])
    assert dict(zip(found.points.series + found.points.world_size.astype(str), found.points.days, strict=True)) == {
        "torch-ddp1": 2,
        "torch-ddp2": 1,
        "tf-multiworker1": 1,
    }
    assert "on 2 days: what a day changes is in the intervals, but for 2 of 3 points on fewer." in " ".join(
        summary(found)
    )
    other = folder("other", {("torch-ddp", 4): 0.1})
    with pytest.raises(ValueError, match="--base-again: holds no point that"):
        compare(base, new, 0.03, [other])


def test_a_point_that_was_skipped_in_the_new_one_is_missing(folder: Callable[..., Path]) -> None:
    base, new = folder("base", USUAL), folder("new", USUAL | {("torch-ddp", 2): None}, outcome="skipped")
    found = compare(base, new, 0.03)
    assert found.base_only.world_size.tolist() == [2]
    assert found.regressed


def test_failures_are_counted_point_by_point(folder: Callable[..., Path]) -> None:
    """One point fails always, on both sides; the other never, and the base has more repeats of it: nothing changed."""
    points = pd.DataFrame({"base_failed": [6, 0], "base_tried": [6, 30], "new_failed": [6, 0], "new_tried": [6, 6]})
    same = replace(compare(folder("base", USUAL), folder("new", USUAL), 0.03), tried=points)
    assert not same.fails_more
    # Of 792 ways to have five of twelve fail, 6 have all of them in the new one.
    one = points.iloc[1:].assign(base_tried=6, new_failed=5)
    assert replace(same, tried=one).fails_more
    # Of 66 ways to have two fail, 15.
    assert replace(same, tried=one.assign(new_failed=2)).fails_more is False


def test_points_of_two_launchers_in_one_folder_are_refused(folder: Callable[..., Path]) -> None:
    base, new = folder("base", USUAL), folder("new", USUAL)
    for path in sorted(base.glob("trials/*/record.json"))[:2]:
        path.write_text(path.read_text().replace('"launcher":"local"', '"launcher":"slurm"'))
    with pytest.raises(ValueError, match="by the launchers local and slurm: compare folders of one launcher each"):
        compare(base, new, 0.03)


def test_a_folder_is_not_compared_with_its_own_records(folder: Callable[..., Path], tmp_path: Path) -> None:
    base, new = folder("base", USUAL), folder("new", USUAL)
    shutil.copytree(base, copied := tmp_path / "copied")
    same = "holds 18 records that {} also holds: what was measured once tells nothing"
    for other, days, first in ((base, [], base), (copied, [], base), (new, [copied], base)):
        with pytest.raises(ValueError, match=re.escape(same.format(first))):
            compare(base, other, 0.03, days)
    told = CliRunner().invoke(app, ["compare", str(base), str(base)])
    assert f"{base}: is given twice" in str(told.exception)
    # A copy beside its trial is left out, and said.
    trial = next((base / "trials").iterdir())
    shutil.copytree(trial, trial.with_name(f"{trial.name}.bak"))
    assert len(compare(base, new, 0.03).points) == 3


def test_repeats_that_start_while_another_is_under_way_are_not_in_turns() -> None:
    base = pd.DataFrame({"repeat": [0, 1], "started_at": ["2026-01-01T00:00:00", "2026-01-01T00:00:20"]})
    assert interleaved(base, base.assign(started_at=["2026-01-01T00:00:10", "2026-01-01T00:00:30"]))
    assert not interleaved(base, base.assign(started_at=["2026-01-01T00:00:20", "2026-01-01T00:00:30"]))


@pytest.mark.parametrize(("tolerance", "code"), [("0%", 1), ("1.5%", 1), ("3%", 0), ("3", 2), ("-1%", 2), ("100%", 2)])
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
