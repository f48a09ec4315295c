"""Files that are there whole or not at all, and the record among them."""

import os
import tempfile
from pathlib import Path

from scalestudy.trainers.record import Record

RECORD_NAME = "record.json"
# The folder of a study's sweeps, beside that of its trials.
COLLECTIVES = "collectives"
# What an attempt without a record left is renamed so, with a number behind; its files are no part of the results.
UNFINISHED = ".unfinished-"
_scratch: "list[tempfile.TemporaryDirectory[str]]" = []


def scratch_folder(prefix: str) -> str:
    """Make a temporary folder of this process, which goes with `remove_scratch`, whichever way the process ends."""
    # Others may still write there, or clean up themselves, when this process is done with it.
    _scratch.append(tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True))
    return _scratch[-1].name


def remove_scratch() -> None:
    """Remove all that `scratch_folder` has made."""
    while _scratch:
        _scratch.pop().cleanup()


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name, flush to the disk and rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def record_paths(trials_path: Path) -> list[Path]:
    """Return the records of a study's `trials` folder, in the order of the trials' names."""
    return sorted(path for path in trials_path.glob(f"*/{RECORD_NAME}") if UNFINISHED not in path.parent.name)


def read_record(trial_path: Path) -> Record:
    """Return a trial's record; raises FileNotFoundError, or pydantic's ValidationError where it is damaged."""
    return Record.model_validate_json((trial_path / RECORD_NAME).read_bytes())
