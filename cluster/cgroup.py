"""What a container or a job may have of its host: CPU time and memory, from Linux's control groups of both versions.

A limit may be set on a process' own group or on any that holds it. What cannot be read limits nothing.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
# What version 1 writes where nothing is limited is the largest number of whole pages; no host has half of that.
_UNLIMITED_BYTES = 2**62


class Throttling(NamedTuple):
    """In how many periods a group's processes had used up their quota before the end, and were held up until then."""

    periods: int
    throttled_periods: int
    throttled_s: float


def cpu_quota(proc: Path = _PROC) -> float | None:
    """Return how many CPUs' time this process may use, None where it is not limited."""
    return min((quota for quota, _ in _quotas(proc)), default=None)


def throttling(proc: Path = _PROC) -> Throttling | None:
    """Return what quotas have cost since their groups were made, in the group that was held up longest; None without.

    That need not be the tightest: one around it holds for others, too.
    """
    told = [found for _, folder in _quotas(proc) if (found := _throttled(folder))]
    return max(told, key=lambda found: found.throttled_s, default=None)


def _throttled(folder: Path) -> Throttling | None:
    counts: dict[str, int] = {}
    with suppress(OSError, ValueError):
        lines = (folder / "cpu.stat").read_text(encoding="utf-8").splitlines()
        counts = {name: int(count) for name, count in map(str.split, lines)}
    if "nr_periods" not in counts:
        return None
    # The second version counts in microseconds, the first in nanoseconds.
    throttled_s = counts["throttled_usec"] / 1e6 if "throttled_usec" in counts else counts["throttled_time"] / 1e9
    return Throttling(counts["nr_periods"], counts["nr_throttled"], throttled_s)


def memory_limit_bytes(proc: Path = _PROC) -> int | None:
    """Return how much memory this process and those beside it may have, None where it is not limited."""
    limits = [_number(folder / name) for name, folder in _places(proc, "memory", "memory.max", "memory.limit_in_bytes")]
    return min((int(limit) for limit in limits if limit is not None and limit < _UNLIMITED_BYTES), default=None)


def _quotas(proc: Path) -> Iterator[tuple[float, Path]]:
    """Yield every quota that holds here, in CPUs, and the folder of its group."""
    for name, folder in _places(proc, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        with suppress(OSError, ValueError):
            quota_us, *more = (folder / name).read_text(encoding="utf-8").split()
            period_us = more[0] if more else (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
            if quota_us != "max" and int(quota_us) > 0:
                yield int(quota_us) / int(period_us), folder


def _places(proc: Path, controller: str, second: str, first: str) -> Iterator[tuple[str, Path]]:
    """Yield the folder of every group that holds this process, and what the file is called there that limits it."""
    with suppress(OSError, ValueError):
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
        groups = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
        for line in (proc / "self/mountinfo").read_text(encoding="utf-8").splitlines():
            mount, _, system = line.partition(" - ")
            root, place = mount.split()[3:5]
            kind, _, options = system.split(" ", 2)
            name, group = second, groups.get("")
            if kind == "cgroup":
                name = first
                owned = (path for names, path in groups.items() if controller in names.split(","))
                group = next(owned, None) if controller in options.split(",") else None
            if kind in ("cgroup", "cgroup2") and group is not None:
                yield from ((name, folder) for folder in _upwards(Path(place), root, group))


def _upwards(mount: Path, root: str, group: str) -> Iterator[Path]:
    """Yield the group's folder and those around it, as far as they are mounted."""
    # A container sees its own group as the root of what is mounted, whatever the host calls it.
    inside = Path(group).relative_to(root) if Path(group).is_relative_to(root) else Path()
    folder = mount / inside
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _number(path: Path) -> float | None:
    with suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8").strip()
        return math.inf if text == "max" else int(text)
    return None
