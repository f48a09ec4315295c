"""What a process' CPUs did over a span of time, and what held it up, from what the kernel counts."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from scalestudy.cluster.cgroup import Throttling, cpu_quota, throttling
from scalestudy.cluster.frozen import Frozen
from scalestudy.cluster.host_counters import busy_by_cpu

_PROC = Path("/proc")
_PRESSURES = ("cpu", "memory", "io")
Answer = TypeVar("Answer")


class CpuUse(Frozen):
    """A span of a rank's life; null is what the kernel does not tell.

    own_s is the CPU time of the rank and of the processes that it started, busy_s that of everybody on the CPUs that
    the rank is pinned to. run_delay_s is the time that its threads were ready to run and waited for a CPU. Of a quota:
    how many CPUs it gives, and in how many of its periods and how long the group was held up. stalled_s is, by
    resource, how long any task of the host waited for it (pressure stall information).
    """

    elapsed_s: float
    own_s: float
    busy_s: float | None = None
    run_delay_s: float | None = None
    quota_cpus: float | None = None
    periods: int | None = None
    throttled_periods: int | None = None
    throttled_s: float | None = None
    stalled_s: Mapping[str, float] = {}


class CpuMeter:
    """Counts from its making on; every `lap` tells of the span since the one before."""

    def __init__(self, cpus: Sequence[int]) -> None:
        self._cpus = cpus
        self._last = self._read()

    def lap(self) -> CpuUse:
        """Return what was counted since the last lap."""
        last, now = self._last, self._read()
        self._last = now
        threads = last.delays_s.keys() & now.delays_s.keys()
        found: dict[str, Any] = {
            "elapsed_s": now.at_s - last.at_s,
            "own_s": max(0.0, now.own_s - last.own_s),
            "stalled_s": {name: sum_s - last.stalled_s.get(name, sum_s) for name, sum_s in now.stalled_s.items()},
        }
        if now.busy_s is not None and last.busy_s is not None:
            found["busy_s"] = max(0.0, now.busy_s - last.busy_s)
        if threads:
            found["run_delay_s"] = sum(now.delays_s[thread] - last.delays_s[thread] for thread in threads)
        if now.throttling and last.throttling:
            gained = {name: count - getattr(last.throttling, name) for name, count in now.throttling._asdict().items()}
            found |= {"quota_cpus": cpu_quota(), **gained}
        return CpuUse(**found)

    def _read(self) -> "_Counts":
        stalled = {resource: _told(stalled_s, resource) for resource in _PRESSURES}
        return _Counts(
            at_s=time.perf_counter(),
            own_s=_own_s(),
            busy_s=_told(busy_s, self._cpus),
            delays_s=_told(run_delays_s) or {},
            throttling=_told(throttling),
            stalled_s={resource: seconds for resource, seconds in stalled.items() if seconds is not None},
        )


class _Counts(NamedTuple):
    at_s: float
    own_s: float
    busy_s: float | None
    delays_s: Mapping[int, float]
    throttling: Throttling | None
    stalled_s: Mapping[str, float]


def busy_s(cpus: Sequence[int], proc: Path = _PROC) -> float:
    """Return how long CPUs have been busy since the host started, in sum; raises ValueError where one is not known."""
    found = busy_by_cpu(proc)
    if unknown := set(cpus) - found.keys():
        raise ValueError(f"{proc / 'stat'} does not list CPU {min(unknown)}")
    return sum(found[cpu] for cpu in cpus)


def run_delays_s(proc: Path = _PROC) -> dict[int, float]:
    """Return how long each thread of this process has waited for a CPU (schedstat's second number, in ns)."""
    found = {}
    for task in (proc / "self/task").iterdir():
        with suppress(OSError, IndexError):
            found[int(task.name)] = int((task / "schedstat").read_text(encoding="utf-8").split()[1]) / 1e9
    return found


def stalled_s(resource: str, proc: Path = _PROC) -> float:
    """Return how long any task of the host has waited for a resource: cpu, memory or io."""
    some = (proc / "pressure" / resource).read_text(encoding="utf-8").splitlines()[0]
    return int(some.rpartition("total=")[2]) / 1e6


def _own_s() -> float:
    """Return the CPU time of this process, of those that it has waited for and of those that still run."""
    times = os.times()
    own_s = times.user + times.system + times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            used = child.cpu_times()
            own_s += used.user + used.system + used.children_user + used.children_system
    return own_s


def _told(question: Callable[..., Answer], *about: Any) -> Answer | None:
    """Return the answer, None where this kernel has none."""
    with suppress(OSError, ValueError, IndexError):
        return question(*about)
    return None
