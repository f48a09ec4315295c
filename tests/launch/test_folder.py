import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.jobs import Submitted, damaged_jobs, note, submitted
from scalestudy.launch.pack import packed, unpack
from scalestudy.trainers.record import Record
from scalestudy.trainers.trial import Trial


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    made = StudyFolder(tmp_path / "out")
    made.create("t")
    return made


def test_a_record_reads_back_as_it_was_written(
    folder: StudyFolder, make_trial: Callable[..., Trial], make_record: Callable[..., Record]
) -> None:
    trial = make_trial()
    record = make_record(trial)
    assert folder.record(trial) is None
    folder.finish(folder.begin(trial), record)
    assert folder.record(trial) == record


def test_what_an_interrupted_attempt_left_is_kept(folder: StudyFolder, make_trial: Callable[..., Trial]) -> None:
    trial = make_trial()
    for attempt in range(3):
        (folder.begin(trial) / "rank-0.log").write_text(f"attempt {attempt}")
    kept = {path.read_text() for path in folder.trials_path.glob("*/rank-0.log")}
    assert kept == {"attempt 0", "attempt 1", "attempt 2"}


@pytest.mark.parametrize("damage", ["", "{", '{"schema": 1}', '{"schema": 99}'])
def test_a_damaged_record_counts_as_none_and_is_named(
    folder: StudyFolder, make_trial: Callable[..., Trial], make_record: Callable[..., Record], damage: str
) -> None:
    trial = make_trial()
    path = folder.begin(trial)
    folder.finish(path, make_record(trial))
    (path / "record.json").write_text(damage)
    assert folder.record(trial) is None
    assert [error.path for error in folder.damaged([trial])] == [path / "record.json"]


def test_no_other_studys_folder_is_written_to(folder: StudyFolder) -> None:
    with pytest.raises(InputError, match="holds the study 't', not 'other'"):
        folder.create("other")


def test_no_folder_of_something_else_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(InputError, match="is not empty and holds no study"):
        StudyFolder(tmp_path).create("t")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out: --out: cannot be written: Not a directory"):
        StudyFolder(tmp_path / "file" / "out").create("t")


def test_what_is_set_aside_never_meets_what_was_before(folder: StudyFolder, make_trial: Callable[..., Trial]) -> None:
    for _ in range(4):
        path = folder.begin(make_trial())
    # A user has tidied up.
    shutil.rmtree(path.with_name(f"{path.name}.unfinished-1"))
    folder.begin(make_trial())
    left = {found.name.rpartition("-")[2] for found in path.parent.glob("*.unfinished-*")}
    assert left == {"2", "3", "4"}


def test_two_runs_never_share_a_folder(folder: StudyFolder) -> None:
    other = StudyFolder(folder.path)
    with folder.locked(), pytest.raises(InputError, match="another run .* is writing there"), other.locked():
        pass
    with other.locked():
        pass


def test_runs_of_different_shares_go_side_by_side_and_a_whole_run_beside_none(folder: StudyFolder) -> None:
    other = StudyFolder(folder.path)
    with folder.locked("nodes-1"):
        with other.locked("nodes-2"):
            pass
        with pytest.raises(InputError, match=r"another run \(process .* on .*\) is writing there"), other.locked():
            pass
        with pytest.raises(InputError, match="another run"), other.locked("nodes-1"):
            pass
    with folder.locked(), pytest.raises(InputError, match="another run"), other.locked("nodes-1"):
        pass


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('{"schema": 2, "study": "t"}', "scalestudy.json: is of schema 2, which a newer scalestudy wrote; this one re"),
        (
            '{"schema": 1, "study": "t", "more": 1}',
            "scalestudy.json: has a field that this version does not know, more",
        ),
    ],
)
def test_a_folder_of_a_newer_version_is_neither_written_nor_read(
    folder: StudyFolder, marker: str, message: str
) -> None:
    (folder.path / "scalestudy.json").write_text(marker)
    with pytest.raises(InputError, match=message):
        folder.create("t")
    with pytest.raises(InputError, match=message):
        folder.check()


@pytest.mark.parametrize("marker", ["", "{", "[]", "1", "null", '{"schema": 1}', "\xff"])
def test_a_damaged_marker_is_named_and_what_lies_beside_it_is_read(folder: StudyFolder, marker: str) -> None:
    (folder.path / "scalestudy.json").write_bytes(marker.encode("latin-1"))
    with pytest.raises(InputError, match=r"scalestudy\.json: is (torn|damaged): .*; name another folder"):
        folder.create("t")
    assert "scalestudy.json: is " in (folder.check() or "")


def test_jobs_are_told_of_past_a_torn_line(folder: StudyFolder) -> None:
    made = [Submitted(id=str(number), launcher="slurm", study="s.yaml") for number in range(3)]
    note(made[:2], folder)
    log = folder.jobs_path / "jobs.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    note(made[2:], folder)
    assert [job.id for job in submitted(folder, "slurm")] == ["0", "2"]
    assert damaged_jobs(folder) == [f"{log}: line 2 is torn, or of a newer scalestudy: a job that is not told of"]


def test_results_that_are_torn_on_the_way_home_are_refused_and_replace_nothing(
    tmp_path: Path, make_trial: Callable[..., Trial], make_record: Callable[..., Record]
) -> None:
    away, home = StudyFolder(tmp_path / "away"), StudyFolder(tmp_path / "home")
    for folder in (away, home):
        folder.create("t")
        folder.finish(folder.begin(make_trial()), make_record(make_trial()))
    record = away.trial_path(make_trial()) / "record.json"
    record.write_bytes(record.read_bytes()[:50])
    log = packed(away.path)
    # A damaged record never takes the place of a whole one.
    assert unpack(log, home) == 0
    assert home.record(make_trial()) is not None
    for damage in (log.replace("\n", "\n!!!", 2)[:400] + log[-40:], log[:300] + log[600:], log[:40] + log[-40:]):
        with pytest.raises(ValueError, match="the results in the log are damaged|holds no results"):
            unpack(damage, home)
    assert home.damaged() == []


def refuse_flush(monkeypatch: pytest.MonkeyPatch, number: int, *, files: bool) -> None:
    """Let the system refuse to flush folders, or files as well."""
    flush = os.fsync

    def refusing(descriptor: int) -> None:
        if files or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_does_not_flush_is_used_and_noted(
    tmp_path: Path,
    make_trial: Callable[..., Trial],
    make_record: Callable[..., Record],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    files: bool,
) -> None:
    refuse_flush(monkeypatch, number, files=files)
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    trial = make_trial()
    folder.finish(folder.begin(trial), make_record(trial))
    assert folder.record(trial) is not None
    assert folder.unsafe() == (
        f"{tmp_path}/out: its file system does not flush to the disk ({os.strerror(number)}): "
        "a power cut may cost the last trials, and nothing else"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_to_flush_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse_flush(monkeypatch, number, files=False)
    with pytest.raises(InputError, match=f"cannot be written: {os.strerror(number)}"):
        StudyFolder(tmp_path / "out").create("t")


def test_a_folder_that_can_be_flushed_needs_no_note(folder: StudyFolder) -> None:
    assert folder.unsafe() is None
