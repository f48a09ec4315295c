"""What the host counts: processors, memory, disks, network, InfiniBand and, where it may be read, RAPL energy.

All are sums since the host started, as the kernel has them; rates are a matter of the analysis.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

# What is in many lines or files, and would double the cost of a sample.
_SLOW_S = 1.0
_RAPL = "class/powercap"
_INFINIBAND = "class/infiniband"
# Linux counts InfiniBand's data in words of four bytes (Documentation/ABI/stable/sysfs-class-infiniband).
_IB_WORD_BYTES = 4


class HostCounters:
    """Samples of this host; `interfaces` names what net_rx_bytes and net_tx_bytes list, in their order."""

    def __init__(self, sys_path: Path = Path("/sys")) -> None:
        self.missing: dict[str, str] = {}
        self._asked_slow_s = -_SLOW_S
        self._nics = sorted(psutil.net_io_counters(pernic=True))
        self._ports = {
            f"{port.parent.parent.name}/{port.name}": port / "counters"
            for port in sorted((sys_path / _INFINIBAND).glob("*/ports/*"))
        }
        self.interfaces = (*self._nics, *self._ports)
        self._rapl = [_RaplZone(path) for path in _readable_zones(sys_path / _RAPL, self.missing)]

    def sample(self, at_s: float) -> dict[str, Any]:
        """Return a row: seconds, bytes and joules; CPU seconds are listed by logical CPU."""
        cpus = psutil.cpu_times(percpu=True)
        row: dict[str, Any] = {
            "time_s": at_s,
            "device": "host",
            # iowait is idle; the guests' time is in user's already (proc(5)).
            "cpu_busy_s": [cpu.user + cpu.nice + cpu.system + cpu.irq + cpu.softirq for cpu in cpus],
            "cpu_steal_s": [cpu.steal for cpu in cpus],
            "energy_j": sum(zone.joules() for zone in self._rapl) if self._rapl else None,
        }
        if at_s - self._asked_slow_s >= _SLOW_S:
            self._asked_slow_s = at_s
            row |= self._slow()
        return row

    def _slow(self) -> dict[str, Any]:
        disk = psutil.disk_io_counters()
        network = psutil.net_io_counters(pernic=True)
        return {
            "memory_used_bytes": psutil.virtual_memory().used,
            "disk_read_bytes": disk and disk.read_bytes,
            "disk_write_bytes": disk and disk.write_bytes,
            "net_rx_bytes": [*_of_nics(network, self._nics, "bytes_recv"), *self._of_ports("port_rcv_data")],
            "net_tx_bytes": [*_of_nics(network, self._nics, "bytes_sent"), *self._of_ports("port_xmit_data")],
        }

    def _of_ports(self, counter: str) -> list[int]:
        return [_IB_WORD_BYTES * int((port / counter).read_text(encoding="utf-8")) for port in self._ports.values()]


class _RaplZone:
    """The energy of one processor package or its memory; the kernel's counter wraps after some minutes."""

    def __init__(self, path: Path) -> None:
        self._path = path / "energy_uj"
        self._range_uj = int((path / "max_energy_range_uj").read_text(encoding="utf-8"))
        self._last_uj = self._read_uj()
        self._sum_uj = 0

    def joules(self) -> float:
        """Return the energy since the first reading."""
        now_uj = self._read_uj()
        self._sum_uj += (now_uj - self._last_uj) % (self._range_uj + 1)
        self._last_uj = now_uj
        return self._sum_uj / 1e6

    def _read_uj(self) -> int:
        return int(self._path.read_text(encoding="utf-8"))


def _readable_zones(powercap: Path, missing: dict[str, str]) -> list[Path]:
    """Return the zones that add up to what the processors and their memory take, none twice."""
    packages = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
    found = [
        zone
        for package in packages
        # psys is the whole platform, packages included; a package holds its cores, but not its dram.
        if _name(package).startswith("package")
        for zone in [package, *(part for part in sorted(package.glob("intel-rapl:*")) if _name(part) == "dram")]
    ]
    if not found:
        missing["host energy_j"] = f"{powercap}: no RAPL zone of a processor package there"
    try:
        for zone in found:
            (zone / "energy_uj").read_text(encoding="utf-8")
    except OSError as error:
        missing["host energy_j"] = f"{error.filename}: {error.strerror}"
        return []
    return found


def _name(zone: Path) -> str:
    return (zone / "name").read_text(encoding="utf-8").strip()


def _of_nics(network: Mapping[str, Any], nics: list[str], counter: str) -> list[int | None]:
    # One may go, as virtual ones do.
    return [getattr(network[nic], counter) if nic in network else None for nic in nics]
