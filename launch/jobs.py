"""Jobs that were submitted for a study: kept in its folder, told by `scalestudy status`."""

from datetime import UTC, datetime
from typing import Literal, NamedTuple

from pydantic import Field

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
    with (folder.jobs_path / _LOG).open("a") as log:
        log.writelines(job.model_dump_json() + "\n" for job in jobs)


def submitted(folder: StudyFolder, launcher: str) -> list[Submitted]:
    """Return all jobs that were ever submitted for a study's folder by one launcher, oldest first."""
    log = folder.jobs_path / _LOG
    lines = log.read_text().splitlines() if log.exists() else []
    return [job for job in map(Submitted.model_validate_json, lines) if job.launcher == launcher]
