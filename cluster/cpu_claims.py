"""CPUs of a host that only one rank uses, agreed among processes that know nothing of each other by locked files."""

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from scalestudy.cluster.host import usable_cpus


class CpuClaim:
    """`count` CPUs that no other claim on this host holds, from the `place`-th share on if it is free.

    Where so many are not free, all usable ones: more ranks than CPUs were asked for, and they must share. The claim
    goes with the process, however that ends.
    """

    def __init__(self, count: int, place: int, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir()) / f"scalestudy-cpus-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        usable = usable_cpus()
        first = place * count % len(usable)
        self._locks: list[IO[str]] = []
        cpus: list[int] = []
        for cpu in usable[first:] + usable[:first]:
            if len(cpus) == count:
                break
            lock = (folder / str(cpu)).open("w", encoding="utf-8")
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._locks.append(lock)
                cpus.append(cpu)
                continue
            lock.close()
        if len(cpus) < count:
            self.release()
        self.cpus = tuple(sorted(cpus)) if len(cpus) == count else tuple(usable)

    def release(self) -> None:
        """Give the CPUs back."""
        while self._locks:
            self._locks.pop().close()
