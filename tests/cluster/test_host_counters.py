"""The kernel's counters, from a folder that looks like /sys: not every machine has RAPL or InfiniBand."""

from pathlib import Path

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
