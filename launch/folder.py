"""A study's output folder: who may write to it, where everything lies, and which trials are done."""

import errno
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import ValidationError

from scalestudy.launch.errors import InputError
from scalestudy.trainers.files import (
    COLLECTIVES,
    RECORD_NAME,
    UNFINISHED,
    read_record,
    record_paths,
    refused_flush,
    write_atomically,
)
from scalestudy.trainers.record import RankReport, Record
from scalestudy.trainers.trial import Trial

_MARKER = "scalestudy.json"


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
                write_atomically(marker, json.dumps({"schema": 1, "study": study_name}))
            if not marker.is_file():
                raise InputError(f"{self.path}: --out: is not empty and holds no study; name another folder")
            owner = json.loads(marker.read_text()).get("study")
            if owner != study_name:
                raise InputError(
                    f"{self.path}: --out: holds the study {owner!r}, not {study_name!r}; name another folder"
                )
            self.trials_path.mkdir(exist_ok=True)
            if not os.access(self.trials_path, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise InputError(f"{self.path}: --out: cannot be written: {error.strerror}; name another folder") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{marker}: is damaged ({error}); name another folder with --out") from None

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
        with (self.path / name).open("a+") as lock:
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
        try:
            return read_record(self.trial_path(trial))
        except (FileNotFoundError, ValidationError):
            return None

    def outcomes(self) -> Counter[str]:
        """Return how many of the folder's trials ended how."""
        return Counter(read_record(path.parent).outcome for path in record_paths(self.trials_path))

    def damaged(self, trials: Sequence[Trial]) -> list[Path]:
        """Return the records of these trials that are there and cannot be read."""
        files = [self.trial_path(trial) / RECORD_NAME for trial in trials]
        return [file for file, trial in zip(files, trials, strict=True) if file.exists() and self.record(trial) is None]

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
            attempts = len(list(self.trials_path.glob(f"{path.name}{UNFINISHED}*")))
            path.rename(path.with_name(f"{path.name}{UNFINISHED}{attempts + 1}"))

    def reports(self, path: Path, processes: int) -> tuple[RankReport, ...]:
        """Return what the ranks of a trial reported, as far as they did."""
        files = [path / f"rank-{rank}.json" for rank in range(processes)]
        return tuple(RankReport.model_validate_json(file.read_bytes()) for file in files if file.exists())

    def finish(self, path: Path, record: Record) -> None:
        """Write the record: from now on the trial is done."""
        write_atomically(path / RECORD_NAME, record.model_dump_json(by_alias=True))
