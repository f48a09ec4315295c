"""The kernel's counters, from a folder that looks like /sys: not every machine has RAPL or InfiniBand."""

import os
from pathlib import Path

import psutil
import pytest

from scalestudy.cluster.host_counters import HostCounters


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def zone(sys_path: Path, place: str, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    path = sys_path / "class/powercap" / place
    write(path / "name", f"{name}\n")
    write(path / "energy_uj", f"{energy_uj}\n")
    write(path / "max_energy_range_uj", f"{range_uj}\n")
    return path


def test_rapl_adds_packages_and_memory_over_a_wrap(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    memory = zone(tmp_path, "intel-rapl:0/intel-rapl:0:1", "dram", 100_000)
    # Both are in the package already, or hold it.
    zone(tmp_path, "intel-rapl:0/intel-rapl:0:0", "core", 0)
    zone(tmp_path, "intel-rapl:1", "psys", 0)
    counters = HostCounters(tmp_path)
    assert counters.missing == {}
    assert counters.sample(0.0)["energy_j"] == 0
    # 100,001 µJ up to the wrap at 1,000,001, and 200,000 after it.
    (package / "energy_uj").write_text("200000")
    (memory / "energy_uj").write_text("400000")
    assert counters.sample(1.0)["energy_j"] == pytest.approx(0.300001 + 0.3)
    (package / "energy_uj").write_text("300000")
    assert counters.sample(2.0)["energy_j"] == pytest.approx(0.400001 + 0.3)


def test_without_rapl_energy_is_null_with_the_reason(tmp_path: Path) -> None:
    counters = HostCounters(tmp_path)
    assert counters.sample(0.0)["energy_j"] is None
    assert counters.missing["host energy_j"] == f"{tmp_path}/class/powercap: no RAPL zone of a processor package there"


def test_rapl_that_cannot_be_read_is_null_with_the_reason(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    (package / "energy_uj").unlink()
    counters = HostCounters(tmp_path)
    assert counters.sample(0.0)["energy_j"] is None
    assert counters.missing["host energy_j"] == f"{package}/energy_uj: No such file or directory"


def test_infiniband_ports_stand_beside_the_network(tmp_path: Path) -> None:
    for port, received, sent in (("1", 10, 20), ("2", 30, 40)):
        counters = tmp_path / "class/infiniband/mlx5_0/ports" / port / "counters"
        write(counters / "port_rcv_data", f"{received}\n")
        write(counters / "port_xmit_data", f"{sent}\n")
    counted = HostCounters(tmp_path)
    assert counted.interfaces[-2:] == ("mlx5_0/1", "mlx5_0/2")
    row = counted.sample(0.0)
    # Words of four bytes.
    assert row["net_rx_bytes"][-2:] == [40, 120]
    assert row["net_tx_bytes"][-2:] == [80, 160]
    assert len(row["net_rx_bytes"]) == len(counted.interfaces)


# A line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice in hundredths.
def stat(proc_path: Path, busy_s: dict[int, int]) -> None:
    lines = [f"cpu{number} {100 * seconds} 0 0 7 7 0 0 {10 * seconds} 0 0" for number, seconds in busy_s.items()]
    write(proc_path / "stat", "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 1 2 3", "btime 5"]) + "\n")


def allowed(proc_path: Path, own: str, first: str | None = None, mounts: str = "") -> None:
    write(proc_path / "self/status", f"Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t{own}\n")
    write(proc_path / "1/status", f"Name:\tinit\nCpus_allowed_list:\t{first or own}\n")
    write(proc_path / "self/mountinfo", f"22 27 0:21 / /proc rw - proc proc rw\n{mounts}")


LXCFS = "99 22 0:50 /proc/stat /proc/stat rw - fuse.lxcfs lxcfs rw\n"


@pytest.mark.parametrize(
    ("numbers", "own", "first", "mounts", "found"),
    [
        # One is offline: the kernel leaves it out and keeps the others' numbers.
        ((0, 2, 3), "0,2-3", None, "", (0, 2, 3)),
        # A job has two of eight.
        (tuple(range(8)), "6-7", "0-7", "", tuple(range(8))),
        # A file that shows the container's CPUs by their own numbers.
        ((6, 7), "6-7", None, "", (6, 7)),
        # lxcfs counts what a container has from 0.
        ((0, 1), "6-7", None, LXCFS, (6, 7)),
        ((0, 1, 2, 3), "4-5", "4-7", LXCFS, (4, 5, 6, 7)),
        ((0, 1), "1", "1-2", LXCFS, (1, 2)),
        # The same where a shim other than lxcfs does it.
        ((0, 1), "6-7", None, "", (6, 7)),
        # As many as a quota allows, and nobody says which.
        ((0, 1), "0-7", None, LXCFS, ()),
    ],
)
def test_every_column_says_which_cpu_it_is(
    tmp_path: Path, numbers: tuple[int, ...], own: str, first: str | None, mounts: str, found: tuple[int, ...]
) -> None:
    stat(tmp_path, {number: 10 + number for number in numbers})
    allowed(tmp_path, own, first, mounts)
    counters = HostCounters(tmp_path, tmp_path)
    assert counters.cpus == found
    row = counters.sample(0.0)
    assert row["cpu_busy_s"] == [10 + number for number in numbers]
    assert row["cpu_steal_s"] == [pytest.approx(1 + number / 10) for number in numbers]
    assert ("host cpu numbers" in counters.missing) is (not found)


def test_a_cpu_that_goes_offline_is_null_and_the_others_keep_their_places(tmp_path: Path) -> None:
    stat(tmp_path, {0: 1, 1: 2, 2: 3})
    allowed(tmp_path, "0-2")
    counters = HostCounters(tmp_path, tmp_path)
    stat(tmp_path, {0: 1, 2: 5, 3: 7})
    assert counters.sample(0.0)["cpu_busy_s"] == [1, None, 5]


def test_this_hosts_cpus_are_those_it_has() -> None:
    counters = HostCounters()
    assert set(os.sched_getaffinity(0)) <= set(counters.cpus)
    assert all(seconds > 0 for seconds in counters.sample(0.0)["cpu_busy_s"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "stat: No such file or directory"),
        ("", "stat: lists no CPU"),
        ("cpu  1 2 3 4\n", "stat: lists no CPU"),
        ("cpu0 a b c d\n", "stat: 'cpu0 a b c d' is no line of a CPU"),
        ("cpu0 1 2\n", "stat: 'cpu0 1 2' is no line of a CPU"),
    ],
)
def test_cpus_that_are_not_counted_are_null_with_the_reason(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        write(tmp_path / "stat", text)
    allowed(tmp_path, "0")
    counters = HostCounters(tmp_path, tmp_path)
    row = counters.sample(0.0)
    assert row["cpu_busy_s"] is None
    assert row["cpu_steal_s"] is None
    assert row["memory_used_bytes"] > 0
    assert counters.missing["host cpu_busy_s"].endswith(reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "port_rcv_data: No such file or directory"),
        ("N/A (no PMA)\n", "port_rcv_data: 'N/A (no PMA)' is no count"),
        ("", "port_rcv_data: '' is no count"),
        # Four times that fills no 64 bits.
        ("18446744073709551615\n", "port_rcv_data: '18446744073709551615' is no count"),
    ],
)
def test_a_port_that_does_not_count_costs_itself(tmp_path: Path, text: str | None, reason: str) -> None:
    ports = tmp_path / "class/infiniband"
    for name in ("port_rcv_data", "port_xmit_data"):
        write(ports / "mlx5_1/ports/1/counters" / name, "5\n")
    (ports / "mlx5_0/ports/1").mkdir(parents=True)
    if text is not None:
        write(ports / "mlx5_0/ports/1/counters/port_rcv_data", text)
    counters = HostCounters(tmp_path)
    row = counters.sample(0.0)
    assert counters.interfaces[-2:] == ("mlx5_0/1", "mlx5_1/1")
    assert row["net_rx_bytes"][-2:] == [None, 20]
    assert row["net_tx_bytes"][-2:] == [None, 20]
    assert row["net_rx_bytes"][counters.interfaces.index("lo")] >= 0
    assert counters.missing["mlx5_0/1 net_rx_bytes"].endswith(reason)


@pytest.mark.parametrize("text", [None, "", "N/A\n"])
def test_rapl_that_vanishes_is_null_from_then_on(tmp_path: Path, text: str | None) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    counters = HostCounters(tmp_path)
    assert counters.sample(0.0)["energy_j"] == 0
    (package / "energy_uj").unlink() if text is None else (package / "energy_uj").write_text(text)
    assert counters.sample(1.0)["energy_j"] is None
    assert "energy_uj" in counters.missing["host energy_j"]
    # What it has taken meanwhile is not known: its sum would be wrong.
    (package / "energy_uj").write_text("950000")
    assert counters.sample(2.0)["energy_j"] is None


@pytest.mark.parametrize("name", ["name", "max_energy_range_uj"])
def test_rapl_without_one_of_its_files_is_null_with_the_reason(tmp_path: Path, name: str) -> None:
    (zone(tmp_path, "intel-rapl:0", "package-0", 900_000) / name).unlink()
    counters = HostCounters(tmp_path)
    assert counters.sample(0.0)["energy_j"] is None
    assert counters.missing["host energy_j"].endswith(f"{name}: No such file or directory")


@pytest.mark.parametrize(
    ("question", "error", "column", "reason"),
    [
        ("disk_io_counters", RuntimeError("no disks"), "disk_read_bytes", "RuntimeError: no disks"),
        ("disk_io_counters", NotImplementedError("x"), "disk_write_bytes", "NotImplementedError: x"),
        ("net_io_counters", PermissionError(13, "Permission denied", "/proc/net/dev"), "net_rx_bytes", "/proc/net/dev"),
        ("virtual_memory", psutil.AccessDenied(), "memory_used_bytes", "AccessDenied"),
    ],
)
def test_what_psutil_cannot_read_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str, error: Exception, column: str, reason: str
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(psutil, question, fail)
    for name in ("port_rcv_data", "port_xmit_data"):
        write(tmp_path / "class/infiniband/mlx5_0/ports/1/counters" / name, "5\n")
    counters = HostCounters(tmp_path)
    row = counters.sample(0.0)
    assert row.get(column) in (None, [20])
    assert counters.missing[f"host {column}"].startswith(reason)
    others = {"memory_used_bytes", "disk_read_bytes", "net_rx_bytes"} - {column, column.replace("write", "read")}
    assert all(row[other] for other in others)
    assert row["cpu_busy_s"]


def test_a_container_that_shows_no_disk_is_null_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    counters = HostCounters(tmp_path)
    assert counters.sample(0.0)["disk_read_bytes"] is None
    assert counters.missing["host disk_read_bytes"] == "no disk is shown here"
