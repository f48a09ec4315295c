"""A study's folder as text, so that it can come home in a job's log: `python -m scalestudy.launch.pack OUT`."""

import base64
import binascii
import io
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

from scalestudy.launch.folder import StudyFolder
from scalestudy.trainers.files import RECORD_NAME, DamagedError, read_record

_BEGIN, _END = "-----BEGIN SCALESTUDY RESULTS-----", "-----END SCALESTUDY RESULTS-----"


def packed(out: Path) -> str:
    """Return a folder's trials, figures and tables as lines of base64; raises ValueError where nothing is there."""
    if not (out / "trials").is_dir():
        raise ValueError(f"{out}: no study there")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(out.iterdir()):
            # Locks and jobs are of the machine that they are on.
            if path.name != "jobs" and not path.name.startswith("."):
                archive.add(path, arcname=path.name)
    return f"{_BEGIN}\n{base64.encodebytes(buffer.getvalue()).decode()}{_END}\n"


def unpack(text: str, folder: StudyFolder) -> int:
    """Add what a log holds to a study's folder and return how many trials were new or changed.

    A trial that is there with another record is set aside, not overwritten. Raises ValueError where the log holds none.
    """
    _, begun, rest = text.partition(_BEGIN)
    content, ended, _ = rest.partition(_END)
    if not begun or not ended:
        raise ValueError(f"the log holds no results; it ends: {text.strip()[-300:]!r}")
    new = 0
    with tempfile.TemporaryDirectory(dir=folder.path, prefix=".fetched-") as name:
        fetched = Path(name)
        try:
            with tarfile.open(fileobj=io.BytesIO(base64.b64decode(content))) as archive:
                archive.extractall(fetched, filter="data")
            trials = sorted((fetched / "trials").iterdir())
        except (tarfile.TarError, binascii.Error, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"the results in the log are damaged: {error}") from None
        folder.trials_path.mkdir(exist_ok=True)
        for path in trials:
            here = folder.trials_path / path.name
            if here.exists() and (_record(here) == _record(path) or (_readable(here) and not _readable(path))):
                continue
            folder.set_aside(here)
            path.rename(here)
            new += 1
        for path in fetched.iterdir():
            # What a report is made of; the folder's own marker stays.
            if path.is_file() and path.name != "scalestudy.json":
                path.replace(folder.path / path.name)
            elif path.name == "figures":
                (folder.path / "figures").mkdir(exist_ok=True)
                for figure in path.iterdir():
                    figure.replace(folder.path / "figures" / figure.name)
    return new


def _record(trial: Path) -> bytes | None:
    record = trial / RECORD_NAME
    return record.read_bytes() if record.exists() else None


def _readable(trial: Path) -> bool:
    try:
        read_record(trial)
    except (FileNotFoundError, DamagedError):
        return False
    return True


if __name__ == "__main__":
    sys.stdout.write(packed(Path(sys.argv[1]).expanduser()))
