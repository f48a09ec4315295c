"""Free TCP ports for a rendezvous; `python -m scalestudy.cluster.ports COUNT` prints them for another host to read."""

import random
import socket
import sys

# Below 32768, where Linux hands out ports for outgoing connections: a port found free here is not
# taken by some client in the seconds before the rank that it is meant for binds it.
_FIRST, _LAST = 20_000, 32_000


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return `count` distinct ports that are free on `host`; raises OSError where none can be had."""
    held = [hold_port(host) for _ in range(count)]
    try:
        return [int(probe.getsockname()[1]) for probe in held]
    finally:
        for probe in held:
            probe.close()


def hold_port(host: str) -> socket.socket:
    """Return a socket bound to a free port: until it is closed nobody else finds it free. Raises OSError."""
    for port in random.sample(range(_FIRST, _LAST), k=1000):
        probe = socket.socket()
        try:
            probe.bind((host, port))
        except OSError:
            probe.close()
            continue
        return probe
    raise OSError(f"{host}: no free port among 1,000 between {_FIRST} and {_LAST}")


if __name__ == "__main__":
    # All interfaces: whoever listens later may choose any.
    print(*free_ports(int(sys.argv[1]), "0.0.0.0"))
