"""A study as a job of a Ray cluster: submitted to its dashboard, followed, and its results brought home."""

import asyncio
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.jobs import Row, Submitted, note, submitted
from scalestudy.launch.pack import unpack
from scalestudy.launch.study import Study

_LOCAL = "http://127.0.0.1:8265"
# Results and environments are large, and of this machine.
_EXCLUDED = [".git", ".venv*", "venv", "results", "build", "dist", "__pycache__"]
# A job has the PATH of the shell that the cluster was started from, often without activating its environment. The job's
# parent is a process of Ray's: where its library lies, so does its Python.
_RAYS_PYTHON = (
    r"python=$(sed -nE '\%^[^/]*(/.*)/lib(64)?/python3[^/]*/[^/]*-packages/ray/_raylet[.]so$%{s%%\1/bin/python3%p;q}' "
    r'/proc/$PPID/maps 2> /dev/null); [ -x "$python" ] || python=python3; exec "$python" '
)
_POLL_S = 1.0
_START_S = 60.0


class RayError(OSError):
    """A question to Ray's dashboard failed, with Ray's own words."""


class _Dashboard:
    """Ray's own client, of which every failure is a RayError: a proxy in between may answer with anything."""

    def __init__(self, client: JobSubmissionClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self._client, name)

        def answer(*values: Any, **named: Any) -> Any:
            try:
                return asked(*values, **named)
            except Exception as error:
                raise RayError(f"{self._client.get_address()}: {name}: Ray says: {_words(error, 500)}") from None

        return answer


def client(address: str | None) -> Any:
    """Return a client of a cluster's dashboard; raises InputError where none answers."""
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or _LOCAL
    # Ray would prefer these to what it is told.
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(variable, None)
    try:
        return _Dashboard(JobSubmissionClient(url))
    # Whatever else listens there answers whatever it likes.
    except Exception as error:
        raise InputError(
            f"--address: {url!r}: no Ray dashboard answers ({_words(error, 150)}); "
            "give that of the head node, or forward its port 8265"
        ) from None


def job(study: Study, study_file: Path, folder: StudyFolder) -> dict[str, Any]:
    """Return what the dashboard is asked for: the command, and the folder that travels with it."""
    base = study_file.resolve().parent
    out = folder.path.resolve()
    inside = [out.relative_to(base).as_posix()] if out.is_relative_to(base) and out != base else []
    argv = ["-m", "scalestudy.launch", "run", study_file.name, "--launcher", "ray", "--out", results(study)]
    return {
        "entrypoint": _RAYS_PYTHON + shlex.join(argv),
        "runtime_env": {"working_dir": str(base), "excludes": [*_EXCLUDED, *inside]},
        "metadata": {"study": study.name},
    }


def results(study: Study) -> str:
    """Return where the cluster keeps a study's records, so that the next job goes on with them."""
    return f"{study.ray.results}/{study.name}"


def submit(study: Study, study_file: Path, folder: StudyFolder, address: str | None) -> tuple[Submitted, bool]:
    """Submit a study; return its job, and whether it is new: one that is still there is not submitted twice."""
    dashboard = client(address)
    for earlier in submitted(folder, "ray"):
        if not _status(dashboard, earlier.id).is_terminal():
            return earlier, False
    try:
        number = _submitted(dashboard, **job(study, study_file, folder))
    except RayError as error:
        raise InputError(f"{study_file}: {error}") from None
    made = Submitted(
        id=number,
        launcher="ray",
        study=study_file.name,
        address=dashboard.get_address(),
        results=results(study),
    )
    note([made], folder)
    return made, True


def follow(made: Submitted, tell: Callable[[str], None]) -> bool:
    """Hand on a job's log until it has ended; return whether it ended well."""
    dashboard = client(made.address)

    async def tail() -> None:
        async for text in dashboard.tail_job_logs(made.id):
            tell(text)

    try:
        asyncio.run(tail())
    # The job goes on without being listened to.
    except Exception as error:
        tell(f"the log broke off: {_words(error, 150)}\n")
    return _ended(dashboard, made.id) == JobStatus.SUCCEEDED


def fetch(made: Submitted, folder: StudyFolder) -> int:
    """Bring the results of a job home and return how many trials are new; raises InputError."""
    dashboard = client(made.address)
    argv = ["-m", "scalestudy.launch.pack", str(made.results)]
    packing = _submitted(dashboard, entrypoint=_RAYS_PYTHON + shlex.join(argv), metadata={"study": "fetch"})
    _ended(dashboard, packing)
    try:
        return unpack(dashboard.get_job_logs(packing) or "", folder)
    except ValueError as error:
        raise InputError(f"{made.results} on {made.address}: {error}") from None


def status(folder: StudyFolder) -> list[Row]:
    """Return a row for every job, with the last line of its log."""
    rows = []
    for made in submitted(folder, "ray"):
        dashboard = client(made.address)
        told = (dashboard.get_job_logs(made.id) or "").strip().splitlines() if _known(dashboard, made.id) else []
        state = _status(dashboard, made.id).lower()
        rows.append(Row(made.id, made.study, state, "", told[-1] if told else ""))
    return rows


def _submitted(dashboard: Any, **asked: Any) -> str:
    """Submit a job, also to a cluster that has only just started; raises RayError."""
    ends_s = time.monotonic() + _START_S
    while True:
        try:
            return str(dashboard.submit_job(**asked))
        except RayError as error:
            # The part of the head that takes jobs comes up last.
            if "No available agent" not in str(error) or time.monotonic() > ends_s:
                raise
        time.sleep(_POLL_S)


def _known(dashboard: Any, number: str) -> bool:
    return any(details.submission_id == number for details in dashboard.list_jobs())


def _status(dashboard: Any, number: str) -> JobStatus:
    # A cluster that was started anew has forgotten its jobs.
    return dashboard.get_job_status(number) if _known(dashboard, number) else JobStatus.STOPPED


def _ended(dashboard: Any, number: str) -> JobStatus:
    while not (now := _status(dashboard, number)).is_terminal():
        time.sleep(_POLL_S)
    return now


def _words(error: Exception, most: int) -> str:
    """Return an error's words in one line: Ray's come with banners and tracebacks."""
    return " ".join(str(error).split())[:most] or type(error).__name__
