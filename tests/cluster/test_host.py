import socket
import subprocess
import sys

import psutil

from scalestudy.cluster.host import NodeOffer, Topology, local_topology, peak_resident_bytes, this_host, usable_cpus
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
