"""What of a host only one trial uses at a time, agreed by locked files among processes that know nothing of each other.

A claim goes with the process that holds it, however that ends.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# The same for every user, run and launcher, whatever TMPDIR says.
_FOLDER = Path("/tmp/scalestudy-claims")
_MOST_SAID = 4096


def claims_folder() -> Path | None:
    """Return the folder of this host's claims; one of this user's alone, or None, where that cannot be written."""
    with suppress(OSError):
        return _made(_FOLDER, 0o1777) or _made(Path(tempfile.gettempdir()) / f"scalestudy-claims-{os.getuid()}", 0o700)
    return None


class Claim:
    """Some of a host's CPUs and GPUs, by name; `holder` says to others who has them.

    It is a courtesy: where the host has no place for claims, or something else in that place, everything is free.
    """

    def __init__(self, holder: str, folder: Path | None = None) -> None:
        self._holder = holder
        self._folder = folder or claims_folder()
        # None for what is held without a lock.
        self._locks: dict[str, int | None] = {}

    @property
    def names(self) -> frozenset[str]:
        """What is held."""
        return frozenset(self._locks)

    def take(self, names: Iterable[str]) -> str | None:
        """Take all of these, or none; returns None, or who has the first that is not free."""
        taken: list[str] = []
        for name in dict.fromkeys(names):
            if (other := "this process" if name in self._locks else self._lock(name)) is not None:
                self.release(taken)
                return other
            taken.append(name)
        return None

    def release(self, names: Iterable[str] | None = None) -> None:
        """Give these back, or all."""
        for name in list(self._locks if names is None else names):
            if (file := self._locks.pop(name)) is not None:
                os.close(file)

    def _lock(self, name: str) -> str | None:
        self._locks[name] = None
        if self._folder is None:
            return None
        try:
            file = _opened(self._folder / name)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = os.pread(file, _MOST_SAID, 0).decode(errors="backslashreplace")
            os.close(file)
            if not isinstance(error, BlockingIOError):
                # A file system without locks.
                return None
            del self._locks[name]
            return said or "somebody"
        # Another user's file can be locked and not be written.
        with suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, self._holder.encode(errors="backslashreplace")[:_MOST_SAID], 0)
        self._locks[name] = file
        return None


def _made(folder: Path, mode: int) -> Path | None:
    """Return the folder, made if it is not there, or None where it cannot be written."""
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):
            # Whatever the umask is; another user's is as it should be already.
            folder.chmod(mode)
        if folder.is_dir() and not folder.is_symlink() and os.access(folder, os.W_OK):
            return folder
    return None


def _opened(path: Path) -> int:
    # Linux lets nobody create a file over another user's in a folder that all may write (fs.protected_regular).
    for flags in (os.O_RDWR, os.O_RDONLY):
        with suppress(FileNotFoundError, PermissionError):
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with suppress(OSError):
        os.fchmod(file, 0o666)
    return file
