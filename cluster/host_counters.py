"""What the host counts: processors, memory, disks, network, InfiniBand and, where it may be read, RAPL energy.

All are sums since the host started, as the kernel has them; rates are a matter of the analysis. What a host does not
tell is null, and `missing` says why, once: a source that fails costs itself.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from scalestudy.cluster.processors import listed_numbers

# What is in many lines or files, and would double the cost of a sample.
_SLOW_S = 1.0
_RAPL = "class/powercap"
_INFINIBAND = "class/infiniband"
# Linux counts InfiniBand's data in words of four bytes (Documentation/ABI/stable/sysfs-class-infiniband).
_IB_WORD_BYTES = 4
# Where in a CPU's line of proc(5)'s stat: user, nice, system, irq and softirq. iowait is idle; the guests' time is in
# user's already.
_BUSY, _STEAL = (1, 2, 3, 6, 7), 8
_MOST = 2**63 - 1


class HostCounters:
    """Samples of this host.

    `cpus` are the numbers of the CPUs that cpu_busy_s and cpu_steal_s list, in their order, empty where nobody says
    which they are; `interfaces` names what net_rx_bytes and net_tx_bytes list.
    """

    def __init__(self, sys_path: Path = Path("/sys"), proc_path: Path = Path("/proc")) -> None:
        self.missing: dict[str, str] = {}
        self._proc_path = proc_path
        self._asked_slow_s = -_SLOW_S
        self._listed = tuple(self._ask(_CPU_COLUMNS, lambda: _cpu_times(proc_path / "stat")) or ())
        self.cpus = self._numbers()
        self._nics = sorted(self._ask(_NET_COLUMNS, _nic_counters) or ())
        self._ports = {
            f"{port.parent.parent.name}/{port.name}": port / "counters"
            for port in sorted((sys_path / _INFINIBAND).glob("*/ports/*"))
        }
        self.interfaces = (*self._nics, *self._ports)
        self._rapl = self._ask(["host energy_j"], lambda: [*map(_RaplZone, _zones(sys_path / _RAPL))]) or []

    def sample(self, at_s: float) -> dict[str, Any]:
        """Return a row: seconds, bytes and joules."""
        times = self._ask(_CPU_COLUMNS, lambda: _cpu_times(self._proc_path / "stat"))
        # One that has gone offline keeps its place.
        by_cpu = [times.get(cpu, (None, None)) for cpu in self._listed] if times else []
        row: dict[str, Any] = {
            "time_s": at_s,
            "device": "host",
            "cpu_busy_s": [busy_s for busy_s, _ in by_cpu] or None,
            "cpu_steal_s": [steal_s for _, steal_s in by_cpu] or None,
            "energy_j": self._energy_j() if self._rapl else None,
        }
        if at_s - self._asked_slow_s >= _SLOW_S:
            self._asked_slow_s = at_s
            row |= self._slow()
        return row

    def _ask(self, columns: list[str], question: Callable[[], Any]) -> Any:
        """Return the answer, or None and note why."""
        try:
            return question()
        # psutil raises what it comes upon, and a kernel's files may say anything.
        except Exception as error:
            for column in columns:
                self.missing.setdefault(column, _reason(error))
            return None

    def _numbers(self) -> tuple[int, ...]:
        """Return which CPUs the lines of /proc/stat are."""
        found: tuple[int, ...] | None = self._ask(
            ["host cpu numbers"], lambda: _numbered(self._listed, self._proc_path)
        )
        return found or ()

    def _energy_j(self) -> float | None:
        energy_j: float | None = self._ask(["host energy_j"], lambda: sum(zone.joules() for zone in self._rapl))
        if energy_j is None:
            # What it takes until it is back would be missing from the sum.
            self._rapl = []
        return energy_j

    def _slow(self) -> dict[str, Any]:
        network = self._ask(_NET_COLUMNS, _nic_counters) or {}
        return {
            "memory_used_bytes": self._ask(["host memory_used_bytes"], lambda: psutil.virtual_memory().used),
            **(self._ask(_DISK_COLUMNS, _disk_bytes) or {"disk_read_bytes": None, "disk_write_bytes": None}),
            "net_rx_bytes": [*_of_nics(network, self._nics, "bytes_recv"), *self._of_ports("rx", "port_rcv_data")],
            "net_tx_bytes": [*_of_nics(network, self._nics, "bytes_sent"), *self._of_ports("tx", "port_xmit_data")],
        }

    def _of_ports(self, way: str, counter: str) -> list[int | None]:
        return [
            self._ask([f"{name} net_{way}_bytes"], partial(_count, port / counter, _IB_WORD_BYTES))
            for name, port in self._ports.items()
        ]


def busy_by_cpu(proc_path: Path = Path("/proc")) -> dict[int, float]:
    """Return how long each CPU has been busy since the host started, by its number; raises OSError, ValueError."""
    times = _cpu_times(proc_path / "stat")
    cpus = _numbered(tuple(times), proc_path)
    return dict(zip(cpus, (busy_s for busy_s, _ in times.values()), strict=True))


class _RaplZone:
    """The energy of one processor package or its memory; the kernel's counter wraps after some minutes."""

    def __init__(self, path: Path) -> None:
        self._path = path / "energy_uj"
        self._range_uj = _count(path / "max_energy_range_uj")
        self._last_uj = self._read_uj()
        self._sum_uj = 0

    def joules(self) -> float:
        """Return the energy since the first reading."""
        now_uj = self._read_uj()
        self._sum_uj += (now_uj - self._last_uj) % (self._range_uj + 1)
        self._last_uj = now_uj
        return self._sum_uj / 1e6

    def _read_uj(self) -> int:
        return _count(self._path)


def _zones(powercap: Path) -> list[Path]:
    """Return the zones that add up to what the processors and their memory take, none twice; raises OSError."""
    packages = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
    found = [
        zone
        for package in packages
        # psys is the whole platform, packages included; a package holds its cores, but not its dram.
        if _name(package).startswith("package")
        for zone in [package, *(part for part in sorted(package.glob("intel-rapl:*")) if _name(part) == "dram")]
    ]
    if not found:
        raise FileNotFoundError(2, "no RAPL zone of a processor package there", str(powercap))
    return found


def _name(zone: Path) -> str:
    return (zone / "name").read_text(encoding="utf-8").strip()


def _of_nics(network: Mapping[str, Any], nics: list[str], counter: str) -> list[int | None]:
    # One may go, as virtual ones do.
    return [getattr(network[nic], counter) if nic in network else None for nic in nics]


def _nic_counters() -> Mapping[str, Any]:
    found: Mapping[str, Any] = psutil.net_io_counters(pernic=True)
    return found


def _disk_bytes() -> dict[str, int]:
    disk = psutil.disk_io_counters()
    if disk is None:
        raise LookupError("no disk is shown here")
    return {"disk_read_bytes": disk.read_bytes, "disk_write_bytes": disk.write_bytes}


def _count(path: Path, unit: int = 1) -> int:
    """Return what a file of the kernel's counts, in units; raises ValueError where it says something else."""
    text = path.read_text(encoding="utf-8").strip()
    if not (text.isascii() and text.isdigit() and unit * int(text) <= _MOST):
        raise ValueError(f"{path}: {text!r} is no count")
    return unit * int(text)


def _cpu_times(path: Path) -> dict[int, tuple[float, float]]:
    """Return busy and stolen seconds of every CPU that /proc/stat lists, by the number that stands there."""
    # Not psutil's, which leaves out the numbers: of CPUs 0 and 2 the second would pass for CPU 1.
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    found: dict[int, tuple[float, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, *counts = line.split() or [""]
        if not (name.startswith("cpu") and name[3:].isdigit()):
            continue
        if len(counts) < max(_BUSY) or not all(count.isdigit() for count in counts):
            raise ValueError(f"{path}: {line[:80]!r} is no line of a CPU")
        ticks = [0, *map(int, counts), 0]
        found[int(name[3:])] = sum(ticks[place] for place in _BUSY) * tick_s, ticks[_STEAL] * tick_s
    if not found:
        raise ValueError(f"{path}: lists no CPU")
    return found


def _numbered(listed: tuple[int, ...], proc_path: Path) -> tuple[int, ...]:
    """Return the kernel's numbers of the CPUs that /proc/stat lists; raises ValueError where they cannot be known.

    lxcfs counts what a container has from 0 on, and puts its own file in the place of the kernel's.
    """
    own, first = (_allowed(proc_path / process / "status") for process in ("self", "1"))
    mounts = (proc_path / "self/mountinfo").read_text(encoding="utf-8").splitlines()
    replaced = any(line.split()[4:5] == ["/proc/stat"] for line in mounts)
    if set(own) <= set(listed) and (not replaced or listed != tuple(range(len(listed)))):
        return listed
    for known in (first, own):
        if len(known) == len(listed):
            return known
    raise ValueError(
        f"{proc_path / 'stat'}: lists {len(listed)} CPUs, and this process may run on {', '.join(map(str, own))}"
    )


def _allowed(status: Path) -> tuple[int, ...]:
    """Return the CPUs that a process may run on, such as 0, 1, 2 and 8 of `0-2,8`; none where it is not told."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    except OSError:
        return ()
    allowed = lines.get("Cpus_allowed_list", "").strip()
    return tuple(listed_numbers(allowed)) if allowed else ()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) if type(error) in (ValueError, LookupError) else f"{type(error).__name__}: {error}"


_CPU_COLUMNS = ["host cpu_busy_s", "host cpu_steal_s"]
_DISK_COLUMNS = ["host disk_read_bytes", "host disk_write_bytes"]
_NET_COLUMNS = ["host net_rx_bytes", "host net_tx_bytes"]
