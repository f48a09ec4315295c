"""Jobs that were submitted for a study: kept in its folder, told by `scalestudy status`."""

from datetime import UTC, datetime
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from scalestudy.cluster.frozen import Frozen
from scalestudy.launch.folder import StudyFolder

_LOG = "jobs.jsonl"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Submitted(Frozen):
    """A job: in Slurm the trials of one node count, or the report where there is none; in Ray the whole study."""

    id: str
    launcher: Literal["slurm", "ray"]
    nodes: int | None = None
    study: str
    # Of Ray: the dashboard that took the job, and where the cluster keeps the records.
    address: str | None = None
    results: str | None = None
    submitted_at: str = Field(default_factory=_now)


class Row(NamedTuple):
    """A line of `scalestudy status`."""

    job: str
    what: str
    state: str
    elapsed: str
    done: str


def note(jobs: list[Submitted], folder: StudyFolder) -> None:
    """Keep jobs in the study's folder."""
    folder.jobs_path.mkdir(exist_ok=True)
    log = folder.jobs_path / _LOG
    # What a power cut tore is no part of the line that follows.
    begun = log.read_bytes() if log.exists() else b""
    with log.open("a", encoding="utf-8") as file:
        file.write("\n" if begun and not begun.endswith(b"\n") else "")
        file.writelines(job.model_dump_json() + "\n" for job in jobs)


def submitted(folder: StudyFolder, launcher: str) -> list[Submitted]:
    """Return all jobs that were ever submitted for a study's folder by one launcher, oldest first."""
    return [job for job in _read(folder)[0] if job.launcher == launcher]


def damaged_jobs(folder: StudyFolder) -> list[str]:
    """Return which jobs cannot be told of, a line each."""
    return _read(folder)[1]


def _read(folder: StudyFolder) -> tuple[list[Submitted], list[str]]:
    log = folder.jobs_path / _LOG
    found: list[Submitted] = []
    damaged: list[str] = []
    for number, line in enumerate(log.read_bytes().splitlines() if log.exists() else [], start=1):
        try:
            if line.strip():
                found.append(Submitted.model_validate_json(line))
        except ValidationError:
            damaged.append(f"{log}: line {number} is torn, or of a newer scalestudy: a job that is not told of")
    return found, damaged
