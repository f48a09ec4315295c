import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
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
    assert folder.damaged([trial]) == [path / "record.json"]


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
