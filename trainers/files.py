"""Files that are there whole or not at all, and the record among them."""

import errno
import json
import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from scalestudy.trainers.record import Record

RECORD_NAME = "record.json"
# The folder of a study's sweeps, beside that of its trials.
COLLECTIVES = "collectives"
# What an attempt without a record left is renamed so, with a number behind; its files are no part of the results.
UNFINISHED = ".unfinished-"
# What file systems over a network or in user space answer that flush no folders, or nothing at all; not EIO or ENOSPC.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
# Where folders cannot even be opened, though files in them can be made.
_NO_FOLDER_TO_FLUSH = (*_NO_FLUSH, errno.EACCES, errno.EPERM, errno.EISDIR)
Model = TypeVar("Model", bound=BaseModel)


class DamagedError(ValueError):
    """A file of ours that is there and cannot be used; `reason` says whether it is torn or of a newer version."""

    def __init__(self, path: Path, reason: str, *, newer: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.newer = newer


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name, flush to the disk and rename; a file system that flushes nothing is taken as it is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        _flush(file.fileno())
    temporary.replace(path)
    _flush_folder(path.parent)


def refused_flush(path: Path) -> str | None:
    """Return why a file that is there, or its folder, cannot be flushed to the disk, None where both can."""
    with path.open("rb") as file:
        return _flush(file.fileno()) or _flush_folder(path.parent)


def _flush_folder(folder: Path) -> str | None:
    try:
        directory = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_TO_FLUSH:
            raise
        return error.strerror
    try:
        return _flush(directory)
    finally:
        os.close(directory)


def _flush(descriptor: int) -> str | None:
    """Flush to the disk; return what the file system says where it has no such thing. A disk's errors are raised."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
        return error.strerror
    return None


def record_paths(trials_path: Path) -> list[Path]:
    """Return the records of a study's `trials` folder, in the order of the trials' names."""
    return sorted(path for path in trials_path.glob(f"*/{RECORD_NAME}") if UNFINISHED not in path.parent.name)


def read_record(trial_path: Path) -> Record:
    """Return a trial's record; raises FileNotFoundError, or DamagedError."""
    return read_ours(trial_path / RECORD_NAME, Record)


def read_ours(path: Path, kind: type[Model]) -> Model:
    """Return what a file of ours holds; raises FileNotFoundError, or DamagedError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(path, f"cannot be read: {error.strerror}") from None
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _damaged(path, content, kind, error) from None


def _damaged(path: Path, content: bytes, kind: type[BaseModel], error: ValidationError) -> DamagedError:
    first, *more = error.errors(include_url=False, include_input=False)
    if first["type"] == "json_invalid":
        return DamagedError(path, f"is torn: {len(content)} bytes, {first['msg'].removeprefix('Invalid JSON: ')}")
    schema = _schema(content)
    known = kind.model_fields["schema_version"].default if "schema_version" in kind.model_fields else None
    if schema is not None and known is not None and schema > known:
        reason = f"is of schema {schema}, which a newer scalestudy wrote; this one reads schema {known}"
        return DamagedError(path, reason, newer=True)
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        reason = f"has a field that this version does not know, {where}: a newer scalestudy wrote it"
        return DamagedError(path, reason, newer=True)
    message = first["msg"].removeprefix("Value error, ")
    rest = f", and {len(more)} mistakes more" if more else ""
    return DamagedError(path, f"is damaged: {f'{where}: ' if where else ''}{message}{rest}")


def _schema(content: bytes) -> int | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    schema = found.get("schema") if isinstance(found, dict) else None
    return schema if isinstance(schema, int) else None
