"""Folders that commands are given: with `~`, of a newer version, with torn files in them, of odd names."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from scalestudy.launch.cli import app
from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.jobs import Submitted, note
from scalestudy.trainers.record import Record
from scalestudy.trainers.trial import Data, Trial

SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
STUDY = {"name": "s", "trainers": "torch-ddp", "models": "cnn", "batch": 8, "world_sizes": [1], "device": "cpu"}


def told(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def home(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_trial: Callable[..., Trial],
    make_record: Callable[..., Record],
) -> Path:
    """Return a home with s.yaml, the results `out` of three trials of it, and `other` ones to compare them with.

    The working folder is another.
    """
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, step_s in (("out", 0.1), ("other", 0.1001)):
        folder = StudyFolder(home / name)
        folder.create("s")
        for repeat in range(3):
            trial = make_trial(repeat=repeat)
            folder.finish(folder.begin(trial), make_record(trial, step_s))
    (home / "s.yaml").write_text(yaml.safe_dump(STUDY))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.chdir(elsewhere)
    return home


def records(home: Path) -> list[Path]:
    return sorted(home.glob("out/trials/*/record.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "~/s.yaml", "--dry-run", "--out=~/out"],
        ["report", "~/out"],
        ["status", "~/out"],
        ["fetch", "~/out"],
        ["compare", "~/out", "~/other", "--html=~/page.html"],
        ["submit", "~/s.yaml", "--out=~/out"],
        ["collectives", "~/s.yaml", "--out=~/out"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_expands_the_home(home: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = told(*arguments)
    said = str(result.exception or "")
    # Found, read, and refused for another reason if at all: no cluster, one device that exchanges nothing.
    assert "No such file" not in said
    assert "no records there" not in said
    assert "~" not in said
    assert [*(tmp_path / "elsewhere").iterdir()] == []
    if arguments[0] in ("run", "report", "status", "compare"):
        # Of three repeats nothing can be told.
        assert result.exit_code == (3 if arguments[0] == "compare" else 0), said


def test_the_home_of_nobody_is_one_line(home: Path) -> None:
    result = told("report", "~no-such-user/out")
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == "~no-such-user/out: there is no such user's home"
    # Before it looks at this machine doctor reads the study.
    assert f"{home}/gone.yaml: cannot be read" in str(told("doctor", "~/gone.yaml").exception)


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_measured(home: Path) -> None:
    for arguments in (["report", "o\udcff"], ["run", "~/s.yaml", "--out=o\udcff"], ["run", "o\udcff"]):
        assert "o\udcff: is a name that is not UTF-8" in str(told(*arguments).exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "~/s.yaml", "--out=~/out"],
        ["report", "~/out"],
        ["status", "~/out"],
        ["fetch", "~/out"],
        ["compare", "~/other", "~/out"],
        ["submit", "~/s.yaml", "--out=~/out"],
        ["submit", "~/s.yaml", "--out=~/out", "--dry-run"],
    ],
    ids=lambda arguments: arguments[0] + arguments[-1][:9],
)
def test_a_folder_of_another_version_is_refused_by_every_command(home: Path, arguments: list[str]) -> None:
    (home / "out" / "scalestudy.json").write_text('{"schema": 2, "study": "s"}')
    result = told(*arguments)
    assert isinstance(result.exception, InputError)
    assert "scalestudy.json: is of schema 2, which a newer scalestudy wrote; this one reads schema 1" in str(
        result.exception
    )


def test_damaged_files_cost_themselves(home: Path) -> None:
    torn, newer, whole = records(home)
    torn.write_bytes(torn.read_bytes()[:50])
    newer.write_text('{"schema": 2}')
    note([Submitted(id="raysubmit_1", launcher="slurm", study="gone.yaml")], StudyFolder(home / "out"))
    log = home / "out" / "jobs" / "jobs.jsonl"
    log.write_bytes(log.read_bytes()[:30])

    status = told("status", "~/out")
    assert status.exit_code == 0
    assert f"records in {home / 'out'}: 1 ok, 2 that cannot be read" in status.stdout
    assert f"{torn}: is torn: 50 bytes" in status.stdout
    assert f"{newer}: is of schema 2, which a newer scalestudy wrote" in status.stdout
    assert f"{log}: line 1 is torn" in status.stdout

    report = told("report", "~/out")
    assert report.exit_code == 0
    assert f"{torn}: is torn: 50 bytes" in report.stdout
    page = (home / "out" / "report.html").read_text(encoding="utf-8")
    assert "2 records that cannot be read left out" in page
    assert "which a newer scalestudy wrote" in page

    compared = told("compare", "~/out", "~/other")
    assert compared.exit_code == 3
    assert "A record cannot be read and is left out" in compared.stdout

    whole.write_text("")
    refused = told("report", "~/out")
    assert isinstance(refused.exception, InputError)
    assert "no record there can be read" in str(refused.exception)
    assert told("status", "~/out").exit_code == 0


def test_a_damaged_marker_is_said_and_the_records_are_read(home: Path) -> None:
    (home / "out" / "scalestudy.json").write_text("")
    result = told("status", "~/out")
    assert "scalestudy.json: is torn" in result.stdout
    assert "3 ok" in result.stdout


def test_no_plot_is_named_that_is_not_there(home: Path) -> None:
    interpreter = home / "python"
    interpreter.write_text("#!/bin/sh\nexit 3\n")
    interpreter.chmod(0o755)
    fields = STUDY | {"world_sizes": [2], "threads_per_device": 1, "environments": {"torch-ddp": str(interpreter)}}
    (home / "s.yaml").write_text(yaml.safe_dump(fields | {"repeats": 1}))
    result = told("collectives", "~/s.yaml", "--out=~/swept", "--largest=2KB")
    assert result.exit_code == 1
    assert "plot:" not in result.stdout
    assert "no sweep ended ok: there is nothing to plot" in result.stdout
    # A torn sweep is named, and measured again.
    [record] = (home / "swept").glob("collectives/*/record.json")
    record.write_text("{")
    again = told("collectives", "~/s.yaml", "--out=~/swept", "--largest=2KB")
    assert f"{record}: is torn" in again.stdout


def test_names_of_users_are_no_markup(
    home: Path, make_trial: Callable[..., Trial], make_record: Callable[..., Record]
) -> None:
    odd = StudyFolder(home / "[bold]x[/] :warning: a|b $y$ <i>")
    odd.create("s")
    data = Data(source="images", folder="/data/[red]a|b $_$1 <b> *c*", channels=3, image_size=32, classes=2)
    trial = make_trial(data=data)
    odd.finish(odd.begin(trial), make_record(trial))
    other = StudyFolder(home / "<b>*other*")
    other.create("s")
    other.finish(other.begin(trial), make_record(trial, 0.1001))
    assert f"report: {odd.path}/report.html" in told("report", str(odd.path)).stdout
    assert f"records in {odd.path}: 1 ok" in told("status", str(odd.path)).stdout
    page = (odd.path / "report.html").read_text(encoding="utf-8")
    assert "images:[red]a|b $_$1 &lt;b&gt; *c* 3×32×32" in page
    compared = told("compare", str(odd.path), str(other.path), f"--html={odd.path}/page.html").stdout
    assert r"images:\[red\]a\|b \$\_\$1 \<b\> \*c\* 3×32×32" in compared
    [row] = [line for line in compared.splitlines() if line.startswith("| no difference shown")]
    assert row.replace(r"\|", "").count("|") == 10
    assert "images:[red]a|b $_$1 &lt;b&gt; *c*" in (odd.path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "environment",
    [
        # Neither coerced nor in UTF-8 mode: what is left of a locale that was never set.
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii", "latin-1"],
)
def test_in_any_locale_a_study_is_read_a_report_written_and_a_console_served(
    home: Path, environment: dict[str, str]
) -> None:
    study = home / "s.yaml"
    study.write_text("# größe – 大\n" + study.read_text(), encoding="utf-8")
    for code, command in (
        (0, ["run", str(study), "--dry-run"]),
        (3, ["compare", str(home / "out"), str(home / "other")]),
    ):
        done = subprocess.run(
            [sys.executable, SCALESTUDY, *command], env={**os.environ, **environment}, capture_output=True, timeout=120
        )
        assert done.returncode == code, done.stderr
        assert done.stderr == b""
    # What the console has not is shown by its code.
    if environment.get("PYTHONIOENCODING"):
        assert b"cnn, synthetic 1\xd732\xd732" in done.stdout
        assert rb"\u2192" in done.stdout
    else:
        assert rb"cnn, synthetic 1\xd732\xd732" in done.stdout
