"""CPUs of a host that only one rank uses, agreed among processes that know nothing of each other."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from scalestudy.cluster.claims import Claim
from scalestudy.cluster.processors import Core, Processor, cores_of


def cpu_names(cpus: Iterable[int]) -> list[str]:
    """Return what CPUs are called in claims."""
    return [f"cpu-{cpu}" for cpu in cpus]


class CpuClaim:
    """`count` CPUs that no other claim on this host holds: those in `wanted` if they are free.

    If not, whole cores that nobody has a claim on, then what else is free. Where so many CPUs are not free, all of
    `usable`: more ranks than CPUs were asked for, and they must share. `holder` says to others who has them.
    """

    def __init__(
        self,
        usable: Sequence[Processor],
        count: int,
        wanted: Sequence[int] = (),
        folder: Path | None = None,
        holder: str = "",
    ) -> None:
        self._claim = Claim(holder, folder)
        held: list[int] = []
        if len(wanted) == count and self._lock(wanted):
            held += wanted
        else:
            for core in cores_of(usable):
                held += self._lock_core(core, count - len(held))
            for processor in usable:
                if len(held) < count and processor.cpu not in held and self._lock([processor.cpu]):
                    held.append(processor.cpu)
        if len(held) < count:
            held = []
            self.release()
        self.cpus = tuple(sorted(held or (processor.cpu for processor in usable)))

    def release(self) -> None:
        """Give the CPUs back."""
        self._claim.release()

    def _lock_core(self, core: Core, missing: int) -> list[int]:
        """Lock as many threads of a core as are missing, if nobody has any of them; return which."""
        cpus = [thread.cpu for thread in core]
        if missing <= 0 or not self._lock(cpus):
            return []
        self._claim.release(cpu_names(cpus[missing:]))
        return cpus[:missing]

    def _lock(self, cpus: Sequence[int]) -> bool:
        """Lock all of these CPUs, or none."""
        return self._claim.take(cpu_names(cpus)) is None
