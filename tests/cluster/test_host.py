import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from scalestudy.cluster.host import NodeOffer, Topology, local_topology, peak_resident_bytes, this_host, usable_cpus
from scalestudy.cluster.nvml_library import NvmlError, driver_fault
from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.processors import cores_of, processors


def test_this_host_says_what_psutil_says() -> None:
    host = this_host()
    assert host.cpu_count == psutil.cpu_count()
    assert host.memory_bytes == psutil.virtual_memory().total
    assert host.cpu_model


def test_on_cpu_a_device_is_a_usable_core() -> None:
    topology = local_topology()
    cores = len(cores_of(processors(usable_cpus())))
    assert (topology.nodes, topology.cpus_per_node) == (1, len(usable_cpus()))
    assert topology.devices_per_node("cpu") == topology.cores_per_node == cores


def test_peak_memory_is_at_least_what_is_resident_now() -> None:
    resident = psutil.Process().memory_info().rss
    assert resident <= peak_resident_bytes() * 1.05


def test_free_ports_are_distinct_and_can_be_bound() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_a_taken_port_is_never_handed_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert taken.getsockname()[1] not in free_ports(500)


def test_a_node_is_counted_if_it_holds_as_many_devices_as_are_asked_for() -> None:
    nodes = [NodeOffer(64, 8)] * 4 + [NodeOffer(64, 4)] * 2 + [NodeOffer(8, 0)]
    assert Topology.of(nodes, "auto", 1) == Topology(nodes=6, cpus_per_node=64, gpus_per_node=4)
    assert Topology.of(nodes, "gpu", 8) == Topology(nodes=4, cpus_per_node=64, gpus_per_node=8)
    assert Topology.of(nodes, "cpu", 1).nodes == 7
    # What nothing can hold is for `resolve` to say.
    assert Topology.of(nodes, "auto", 128).nodes == 7
    assert Topology.of([], "auto", 1).nodes == 0


def test_a_node_with_hyper_threads_has_as_many_cpu_devices_as_cores() -> None:
    nodes = [NodeOffer(cpus=64, gpus=0, cores=32), NodeOffer(cpus=48, gpus=0, cores=48)]
    there = Topology.of(nodes, "cpu", 1)
    assert (there.devices_per_node("cpu"), there.cpus_per_node) == (32, 48)
    # A study that asks for a device on every thread finds the nodes that have so many.
    assert Topology.of(nodes, "cpu", 64) == Topology(nodes=1, cpus_per_node=64, cores_per_node=32)
    # Where one node's cores are not known its CPUs are all there is to count.
    assert Topology.of([*nodes, NodeOffer(32, 0)], "cpu", 1).devices_per_node("cpu") == 32


def test_a_host_has_all_its_cpus_whatever_share_a_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += (
        "from scalestudy.cluster.host import this_host, usable_cpus; print(this_host().cpu_count, len(usable_cpus()))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.split() == [str(psutil.cpu_count()), "1"]


def found_on(nvml: Path | None, **variables: str) -> dict[str, Any]:
    """Return what a process finds of its host with a folder's NVML."""
    code = (
        "import json; from scalestudy.cluster.host import local_topology, this_host;"
        "topology, host = local_topology(), this_host();"
        "print(json.dumps([topology.model_dump(), len(host.gpus), host.nvidia_driver]))"
    )
    own = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environ = own | ({"LD_LIBRARY_PATH": str(nvml)} if nvml else {}) | variables
    told = subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True).stdout
    topology, models, driver = json.loads(told)
    return {**topology, "models": models, "driver": driver}


@pytest.mark.parametrize(
    ("variables", "gpus", "models"),
    [
        ({"NVML_STANDIN_MIG": "0"}, 8, 8),
        ({"CUDA_VISIBLE_DEVICES": "3,4"}, 2, 8),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, 8),
        ({"CUDA_VISIBLE_DEVICES": "MIG-0000"}, 1, 8),
        # gpu5 is in MIG mode, and no whole GPU.
        ({}, 7, 8),
        ({"NVML_STANDIN_FAILING": "0:4,6:15"}, 5, 6),
        ({"NVML_STANDIN_LOST_S": "-1"}, 6, 7),
    ],
)
def test_gpus_on_offer_are_those_that_ranks_will_see(
    nvml_standin: Path, variables: dict[str, str], gpus: int, models: int
) -> None:
    found = found_on(nvml_standin, **variables)
    assert (found["gpus_per_node"], found["models"], found["gpu_fault"]) == (gpus, models, None)
    assert found["driver"] == "575.00-standin"


@pytest.mark.parametrize(
    ("variables", "said", "advice"),
    [
        ({"NVML_STANDIN_INIT": "18"}, "version mismatch", "reboot, or unload its kernel modules"),
        ({"NVML_STANDIN_INIT": "4"}, "Insufficient Permissions", "/dev/nvidia*"),
        ({"NVML_STANDIN_INIT": "999"}, "Unknown Error", "nvidia-smi"),
        ({"NVML_STANDIN_COUNT": "999"}, "Unknown Error", "nvidia-smi"),
    ],
)
def test_a_broken_driver_is_not_taken_for_none(
    nvml_standin: Path, variables: dict[str, str], said: str, advice: str
) -> None:
    found = found_on(nvml_standin, **variables)
    assert (found["gpus_per_node"], found["models"], found["driver"]) == (0, 0, None)
    assert said in found["gpu_fault"]
    assert advice in found["gpu_fault"]


def test_a_package_that_cannot_be_imported_ends_no_program(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("raise RuntimeError('no')\n")
    found = found_on(None, PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    assert (found["gpus_per_node"], found["driver"]) == (0, None)


DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, VERSION_MISMATCH = 9, 12, 18


@pytest.mark.parametrize(
    ("sign", "content"),
    [
        ("proc/driver/nvidia/version", "NVRM version"),
        ("dev/nvidia0", ""),
        ("sys/bus/pci/devices/0000:07:00.0/class", "0x030200\n"),
    ],
)
def test_a_driver_that_is_not_loaded_matters_where_there_is_a_gpu(tmp_path: Path, sign: str, content: str) -> None:
    not_loaded = NvmlError(DRIVER_NOT_LOADED, "Driver Not Loaded")
    # The library came with a package, as in many a container: no GPU is meant.
    assert driver_fault(not_loaded, tmp_path) is None
    assert driver_fault(NvmlError(None, "pynvml cannot be imported"), tmp_path) is None
    assert driver_fault(NvmlError(VERSION_MISMATCH, "mismatch"), tmp_path) is not None
    path = tmp_path / sign
    path.parent.mkdir(parents=True)
    path.write_text(content)
    (path.parent / "vendor").write_text("0x10de\n")
    fault = driver_fault(not_loaded, tmp_path)
    assert fault is not None
    assert "Driver Not Loaded; load it (`modprobe nvidia`)" in fault
    assert "pynvml cannot be imported" in (driver_fault(NvmlError(None, "pynvml cannot be imported"), tmp_path) or "")


def test_a_library_that_cannot_be_loaded_is_no_missing_library(tmp_path: Path) -> None:
    """NVML's Python says the same of both; an image made with GPUs leaves an empty file behind."""
    root = tmp_path / "root"
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "libnvidia-ml.so.1").touch()
    code = (
        "import sys; from pathlib import Path; from scalestudy.cluster.nvml_library import NvmlError, driver_fault;"
        f"print(driver_fault(NvmlError({LIBRARY_NOT_FOUND}, ''), Path(sys.argv[1])))"
    )
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", code, str(root)], env=environ, check=True, capture_output=True, text=True
    )
    assert "libnvidia-ml.so.1: file too short; install the driver again" in said.stdout


def test_a_driver_without_its_library_is_a_container_without_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker without --gpus on a GPU host: the kernel's driver shows in /proc, and nothing else of it is there."""
    monkeypatch.setattr("scalestudy.cluster.nvml_library._LIBRARY", "libnvidia-ml.so.none")
    not_found = NvmlError(LIBRARY_NOT_FOUND, "NVML Shared Library Not Found")
    assert driver_fault(not_found, tmp_path) is None
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module  580.159.04\n")
    fault = driver_fault(not_found, tmp_path)
    assert fault is not None
    assert "the kernel has it loaded, and its library libnvidia-ml.so.none is not here" in fault
    assert "docker's --gpus all, apptainer's --nv" in fault
