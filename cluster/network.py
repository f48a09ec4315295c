"""How ranks reach each other: addresses of both families, the interface that leads to a peer, and no proxy between."""

import ipaddress
import socket
from collections.abc import MutableMapping, Sequence

import psutil

# Any will do: to connect a UDP socket sends nothing, it only asks the kernel for the route.
_ANY_PORT = 9


def joined(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 address."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def parted(address: str) -> tuple[str, int]:
    """Return host and port of host:port, the host without brackets; raises ValueError where there is no port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{address!r} is not host:port, such as 10.0.0.1:20001 or [fd00::1]:20001")
    return host.strip("[]"), int(port)


def loopback() -> str:
    """Return this host's loopback address: IPv6's where there is no IPv4."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError:
            return "::1"
    return "127.0.0.1"


def address_towards(peer: str) -> str | None:
    """Return the address of this host that packets to a peer carry, or None where no route leads there.

    A node's own name tells less: on Debian it stands for 127.0.1.1. Raises OSError where the peer's name is unknown.
    """
    try:
        found = socket.getaddrinfo(peer, _ANY_PORT, type=socket.SOCK_DGRAM)
    except socket.gaierror as error:
        raise OSError(
            f"{peer}: {error.strerror}; on every node the name of every other must be known, or the scheduler must "
            "name nodes by their addresses (NodeAddr in slurm.conf)"
        ) from None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError:
                continue
            return _said(probe.getsockname())
    return None


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address, or None where none of this host has it."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 4 and wanted.is_loopback:
        # All of 127.0.0.0/8 is the loopback's; only 127.0.0.1 is listed.
        wanted = ipaddress.ip_address("127.0.0.1")
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and ipaddress.ip_address(entry.address) == wanted:
                return name
    return None


def interface_towards_peers(addresses: Sequence[str], rank: int) -> str | None:
    """Return the interface over which a rank reaches those of other hosts; `addresses` is one host:port a rank.

    Without others it is the one that has the rank's own address. None where none is known.
    """
    hosts = [parted(address)[0] for address in addresses]
    elsewhere = [host for host in hosts if host != hosts[rank]]
    own = address_towards((elsewhere or hosts[rank:])[0])
    return own and interface_of(own)


def reach_directly(environ: MutableMapping[str, str], addresses: Sequence[str], rank: int) -> None:
    """Have a rank's frameworks reach the others by the interface that leads to them, and through no proxy."""
    for name in list(environ):
        # The exceptions too (no_proxy): nothing is left to be excepted from. The last is gRPC's own.
        if name.lower().endswith("_proxy") or name.startswith("GRPC_ADDRESS_HTTP_PROXY"):
            del environ[name]
    # Gloo would take the interface of the host's name. Who has named one knows better.
    if not environ.get("GLOO_SOCKET_IFNAME") and (interface := interface_towards_peers(addresses, rank)):
        environ["GLOO_SOCKET_IFNAME"] = interface


def _said(name: tuple[object, ...]) -> str:
    """Return a socket's address as psutil lists it: one that is good on one link alone with the link's name."""
    host = str(name[0])
    scope = int(str(name[3])) if len(name) == 4 else 0
    return f"{host.split('%')[0]}%{socket.if_indextoname(scope)}" if scope else host
