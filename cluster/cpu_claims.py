"""CPUs of a host that only one rank uses, agreed among processes that know nothing of each other by locked files."""

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from scalestudy.cluster.processors import Core, Processor, cores_of


class CpuClaim:
    """`count` CPUs that no other claim on this host holds: those in `wanted` if they are free.

    If not, whole cores that nobody has a claim on, then what else is free. Where so many CPUs are not free, all of
    `usable`: more ranks than CPUs were asked for, and they must share. The claim goes with the process, however that
    ends.
    """

    def __init__(
        self, usable: Sequence[Processor], count: int, wanted: Sequence[int] = (), folder: Path | None = None
    ) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / f"scalestudy-cpus-{os.getuid()}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._locks: dict[int, IO[str]] = {}
        if len(wanted) != count or not self._lock(wanted):
            cores = cores_of(usable)
            for core in cores:
                self._lock_core(core, count - len(self._locks))
            for processor in usable:
                if len(self._locks) < count:
                    self._lock([processor.cpu])
        if len(self._locks) < count:
            self.release()
        self.cpus = tuple(sorted(self._locks or (processor.cpu for processor in usable)))

    def release(self) -> None:
        """Give the CPUs back."""
        self._unlock(list(self._locks))

    def _lock_core(self, core: Core, missing: int) -> None:
        """Lock as many threads of a core as are missing, if nobody has any of them."""
        cpus = [thread.cpu for thread in core]
        if missing > 0 and self._lock(cpus):
            self._unlock(cpus[missing:])

    def _lock(self, cpus: Sequence[int]) -> bool:
        """Lock all of these CPUs, or none."""
        for place, cpu in enumerate(cpus):
            if cpu in self._locks:
                self._unlock(cpus[:place])
                return False
            lock = (self._folder / str(cpu)).open("w", encoding="utf-8")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                self._unlock(cpus[:place])
                return False
            self._locks[cpu] = lock
        return True

    def _unlock(self, cpus: Sequence[int]) -> None:
        for cpu in cpus:
            self._locks.pop(cpu).close()
