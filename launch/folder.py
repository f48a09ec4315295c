"""A study's output folder: who may write to it, where everything lies, and which trials are done."""

import errno
import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field

from scalestudy.cluster.frozen import Frozen
from scalestudy.launch.errors import InputError
from scalestudy.trainers.files import (
    COLLECTIVES,
    RECORD_NAME,
    UNFINISHED,
    DamagedError,
    read_ours,
    read_record,
    record_paths,
    refused_flush,
    write_atomically,
)
from scalestudy.trainers.record import RankReport, Record
from scalestudy.trainers.trial import Trial

_MARKER = "scalestudy.json"


class Marker(Frozen):
    """Whose folder it is, and of which version."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    study: str


class StudyFolder:
    """`trials/` holds a folder a trial, `jobs/` what was submitted; a run adds and never deletes or overwrites.

    `tries` is the same folder with what `batch: auto` has tried in the place of its trials, `collectives` with sweeps.
    """

    def __init__(self, path: Path, trials: str = "trials") -> None:
        self.path = path
        self.trials_path = path / trials
        self.jobs_path = path / "jobs"

    def create(self, study_name: str) -> None:
        """Make the folder, or make sure that it is this study's; raises InputError where it is not."""
        marker = self.path / _MARKER
        try:
            if not self.path.exists() or not any(self.path.iterdir()):
                self.trials_path.mkdir(parents=True, exist_ok=True)
                write_atomically(marker, Marker(study=study_name).model_dump_json(by_alias=True))
            if not marker.is_file():
                raise InputError(f"{self.path}: --out: is not empty and holds no study; name another folder")
            owner = read_ours(marker, Marker).study
            if owner != study_name:
                raise InputError(
                    f"{self.path}: --out: holds the study {owner!r}, not {study_name!r}; name another folder"
                )
            self.trials_path.mkdir(exist_ok=True)
            if not os.access(self.trials_path, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise InputError(f"{self.path}: --out: cannot be written: {error.strerror}; name another folder") from None
        except DamagedError as error:
            raise InputError(
                f"{error}{': upgrade scalestudy, or' if error.newer else ';'} name another folder with --out"
            ) from None

    def check(self) -> str | None:
        """Make sure that there is a folder of this version to read; raises InputError where there is none.

        Returns what is wrong with its marker where the rest can be read without.
        """
        if not self.path.is_dir():
            raise InputError(
                f"{self.path}: no records there, nor such a folder; give the --out folder of a `scalestudy run`"
            )
        try:
            read_ours(self.path / _MARKER, Marker)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            if error.newer:
                raise InputError(f"{error}: upgrade scalestudy") from None
            return str(error)
        return None

    def unsafe(self) -> str | None:
        """Return what a power cut may cost in a folder whose file system flushes nothing to the disk, or None."""
        refused = refused_flush(self.path / _MARKER)
        return refused and (
            f"{self.path}: its file system does not flush to the disk ({refused}): "
            "a power cut may cost the last trials, and nothing else"
        )

    @contextmanager
    def locked(self, share: str | None = None) -> Iterator[None]:
        """Hold the folder for one run, or a share of its trials beside runs of other shares.

        The lock goes with the process. Raises InputError where another run holds it.
        """
        with ExitStack() as held:
            held.enter_context(self._lock(".lock", fcntl.LOCK_SH if share else fcntl.LOCK_EX))
            if share:
                held.enter_context(self._lock(f".lock-{share}", fcntl.LOCK_EX))
            yield

    @contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[None]:
        with (self.path / name).open("a+", encoding="utf-8", errors="replace") as lock:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise InputError(
                    f"{self.path}: --out: another run ({holder}) is writing there; wait for it, or name another"
                ) from None
            except OSError as error:
                # Lustre mounted without locks: two runs are then the user's to keep apart.
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {os.uname().nodename}")
            lock.flush()
            yield

    def tries(self) -> "StudyFolder":
        """Return where the tries of `batch: auto` lie."""
        return self._beside("tries")

    def collectives(self) -> "StudyFolder":
        """Return where the sweeps of all-reduces lie."""
        return self._beside(COLLECTIVES)

    def _beside(self, name: str) -> "StudyFolder":
        found = StudyFolder(self.path, name)
        found.trials_path.mkdir(exist_ok=True)
        return found

    def trial_path(self, trial: Trial) -> Path:
        """Return where a trial's files lie."""
        return self.trials_path / trial.folder_name

    def record(self, trial: Trial) -> Record | None:
        """Return the trial's record if it is done; a damaged record counts as none."""
        found = _found(self.trial_path(trial))
        return found if isinstance(found, Record) else None

    def outcomes(self) -> Counter[str]:
        """Return how many of the folder's trials ended how; of damaged records nothing is known."""
        paths = [path.parent for path in record_paths(self.trials_path)]
        return Counter(found.outcome for found in map(_found, paths) if isinstance(found, Record))

    def damaged(self, trials: Sequence[Trial] | None = None) -> list[DamagedError]:
        """Return which records cannot be read, and why: those of these trials, or all that are there."""
        if trials is None:
            paths = [path.parent for path in record_paths(self.trials_path)]
        else:
            paths = [self.trial_path(trial) for trial in trials]
        return [found for found in map(_found, paths) if isinstance(found, DamagedError)]

    def begin(self, trial: Trial) -> Path:
        """Return a new folder with the trial's spec; what an earlier attempt left is kept beside it."""
        path = self.trial_path(trial)
        self.set_aside(path)
        path.mkdir()
        write_atomically(path / "trial.json", trial.model_dump_json(by_alias=True))
        return path

    def set_aside(self, path: Path) -> None:
        """Rename what an earlier attempt left of a trial, if there is anything."""
        if path.exists():
            before = self.trials_path.glob(f"{path.name}{UNFINISHED}*")
            numbers = [int(number) for left in before if (number := left.name.rpartition("-")[2]).isdecimal()]
            path.rename(path.with_name(f"{path.name}{UNFINISHED}{max(numbers, default=0) + 1}"))

    def reports(self, path: Path, processes: int) -> tuple[tuple[RankReport, ...], list[str]]:
        """Return what the ranks of a trial reported, as far as they did, and which reports cannot be read, and why."""
        found, damaged = [], []
        for rank in range(processes):
            file = path / f"rank-{rank}.json"
            try:
                report = read_ours(file, RankReport)
                if report.rank.rank != rank:
                    raise DamagedError(file, f"is the report of rank {report.rank.rank}")
                found.append(report)
            except FileNotFoundError:
                continue
            except DamagedError as error:
                damaged.append(f"{file.name} {error.reason}")
        return tuple(found), damaged

    def finish(self, path: Path, record: Record) -> None:
        """Write the record: from now on the trial is done."""
        write_atomically(path / RECORD_NAME, record.model_dump_json(by_alias=True))


def _found(trial_path: Path) -> Record | DamagedError | None:
    """Return a trial's record, or why it cannot be read, or None where there is none."""
    try:
        return read_record(trial_path)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        return error
