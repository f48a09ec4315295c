"""How Horovod's ranks meet: its variables for each rank, and the store that rank 0 serves over HTTP."""

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from scalestudy.cluster.network import parted
from scalestudy.cluster.rank import Rank, rank_addresses
from scalestudy.trainers.options import HorovodOptions
from scalestudy.trainers.trial import Trial


def join(hvd: Any, trial: Trial, rank: Rank) -> HorovodOptions:
    """Meet the other ranks and return the trial's options; `hvd` is horovod.torch or horovod.tensorflow.

    Raises ValueError where this build of Horovod cannot do what the trial asks for, TimeoutError where rank 0 is not
    there in time.
    """
    assert isinstance(trial.options, HorovodOptions)
    check_build(trial, mpi=hvd.mpi_built(), nccl=hvd.nccl_built())
    _meet(rank, trial.options, trial.measurement.deadline_s)
    hvd.init()
    return trial.options


def _meet(rank: Rank, options: HorovodOptions, timeout_s: float) -> None:
    """Set what `hvd.init` reads, and see to it that the ranks find their store.

    It is what `horovodrun --gloo` does, without its SSH: our launchers have started the ranks already.
    """
    os.environ.update(variables(rank, options, os.environ))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    check_addresses([parted(address)[0] for address in rank_addresses(os.environ)])
    if rank.rank == 0:
        from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

        server = RendezvousHTTPServer((listens_at(host), port), RendezvousHandler, False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        _wait_for((host, port), timeout_s)
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(int(timeout_s))


def check_addresses(hosts: Sequence[str]) -> None:
    """Raise ValueError where Horovod's ranks would not find each other; `hosts` has that of every rank.

    The client in its library asks for IPv4 alone, and one of its Gloo devices (that of the global process set, in
    0.28.1) forgets the interface it was given, and listens at the address of the node's own name.
    """
    found = {host: _addresses(host, socket.AF_INET) for host in dict.fromkeys(hosts)}
    for host, addresses in found.items():
        if not addresses:
            raise ValueError(
                f"{host} has no IPv4 address, and Horovod's ranks meet over IPv4 alone; "
                "use torch-ddp or tf-multiworker, or give the nodes IPv4 addresses"
            )
    several = len(found) > 1 and not _loopback(chain.from_iterable(found.values()))
    name = socket.gethostname()
    own = _addresses(name, socket.AF_UNSPEC)
    if several and _loopback(own):
        raise ValueError(
            f"this node's own name, {name}, stands for {own[0] if own else 'no address'}, where Horovod would listen "
            "and no other node comes; have /etc/hosts name the node's address in the network, or use torch-ddp or "
            "tf-multiworker"
        )


def _addresses(host: str, family: socket.AddressFamily) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)]
    except socket.gaierror:
        return []


def _loopback(addresses: Iterable[str]) -> bool:
    """Return whether no address leads off this host."""
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def listens_at(host: str) -> str:
    """Return where rank 0 serves: at an address as it stands, but for a name on all interfaces.

    A node's own name may be its loopback's, where no other node comes.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return ""


def check_build(trial: Trial, *, mpi: bool, nccl: bool) -> None:
    """Raise ValueError where this build of Horovod cannot do what the trial asks for."""
    assert isinstance(trial.options, HorovodOptions)
    if trial.device == "gpu" and not nccl:
        raise ValueError(
            "this Horovod is built without NCCL, and gradients would go through the host; "
            "build it on a host with a GPU: make horovod"
        )
    if trial.options.hierarchical_allreduce and not mpi:
        raise ValueError(
            f"options.{trial.trainer}.hierarchical_allreduce: true, but this Horovod is built without MPI; use false"
        )


def variables(rank: Rank, options: HorovodOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Return Horovod's variables for one rank; a rank's cross rank is its node's among those with its local rank.

    What the study does not say is left out: Horovod's autotuning leaves alone what it was told, even a default.
    """
    per_node = (rank.rank - rank.local_rank) // rank.node_rank if rank.node_rank else rank.local_world_size
    full_nodes, left_over = divmod(rank.world_size, per_node)
    tuned: dict[str, str | None] = {
        "HOROVOD_FUSION_THRESHOLD": _bytes_of(options.fusion_threshold_mb),
        "HOROVOD_CYCLE_TIME": None if options.cycle_time_ms is None else str(options.cycle_time_ms),
        "HOROVOD_HIERARCHICAL_ALLREDUCE": "1" if options.hierarchical_allreduce else None,
        "HOROVOD_AUTOTUNE": "1" if options.autotune else None,
    }
    return {
        "HOROVOD_RANK": str(rank.rank),
        "HOROVOD_SIZE": str(rank.world_size),
        "HOROVOD_LOCAL_RANK": str(rank.local_rank),
        "HOROVOD_LOCAL_SIZE": str(rank.local_world_size),
        "HOROVOD_CROSS_RANK": str(rank.node_rank),
        "HOROVOD_CROSS_SIZE": str(full_nodes + (rank.local_rank < left_over)),
        # Ranks of one name meet as one node's, and several nodes may have one host's name.
        "HOROVOD_HOSTNAME": f"{rank.host}-{rank.node_rank}",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": environ["MASTER_ADDR"],
        "HOROVOD_GLOO_RENDEZVOUS_PORT": environ["MASTER_PORT"],
        # torch takes a list, Horovod one.
        "HOROVOD_GLOO_IFACE": environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0],
        **{name: value for name, value in tuned.items() if value is not None},
    }


def _bytes_of(megabytes: float | None) -> str | None:
    return None if megabytes is None else str(round(megabytes * 2**20))


def _wait_for(address: tuple[str, int], timeout_s: float) -> None:
    """Wait until rank 0 listens: Horovod itself gives up after a second and a half."""
    ends_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError:
            if time.monotonic() > ends_s:
                raise TimeoutError(
                    f"rank 0 did not listen at {address[0]}:{address[1]} within {timeout_s:g} s"
                ) from None
            time.sleep(0.05)
