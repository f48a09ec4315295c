"""Free TCP ports for a rendezvous; `python -m scalestudy.cluster.ports COUNT` prints them for another host to read."""

import random
import socket
import sys

# Below 32768, where Linux hands out ports for outgoing connections: a port found free here is not
# taken by some client in the seconds before the rank that it is meant for binds it.
FIRST, LAST = 20_000, 32_000


def free_ports(count: int, host: str | None = "127.0.0.1") -> list[int]:
    """Return `count` distinct ports that are free on `host`, or on all interfaces; raises OSError if there are none."""
    held = [hold_port(host) for _ in range(count)]
    try:
        return [int(probe.getsockname()[1]) for probe in held]
    finally:
        for probe in held:
            probe.close()


def hold_port(host: str | None) -> socket.socket:
    """Return a socket bound to a free port: until it is closed nobody else finds it free. Raises OSError.

    Without a host it is free on all interfaces, in both families of addresses where there are two.
    """
    why = OSError()
    for port in random.sample(range(FIRST, LAST), k=1000):
        try:
            return _bound(host, port)
        except OSError as error:
            why = error
    raise OSError(f"{host or 'all interfaces'}: no free port among 1,000 between {FIRST} and {LAST}: {why.strerror}")


def _bound(host: str | None, port: int) -> socket.socket:
    everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host or everywhere, port, type=socket.SOCK_STREAM)
    probe = socket.socket(family, kind, protocol)
    try:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.bind(address)
    except OSError:
        probe.close()
        raise
    return probe


if __name__ == "__main__":
    # All interfaces: whoever listens later may choose any.
    print(*free_ports(int(sys.argv[1]), None))
