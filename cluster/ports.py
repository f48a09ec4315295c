"""Free TCP ports for a rendezvous; `python -m scalestudy.cluster.ports COUNT` prints them for another host to read."""

import random
import socket
import sys

# Below 32768, where Linux hands out ports for outgoing connections: a port found free here is not
# taken by some client in the seconds before the rank that it is meant for binds it.
_FIRST, _LAST = 20_000, 32_000


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return `count` distinct ports that are free on `host`; raises OSError where none can be had."""
    found: list[int] = []
    for port in random.sample(range(_FIRST, _LAST), k=1000):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"{host}: fewer than {count} free ports between {_FIRST} and {_LAST}")


if __name__ == "__main__":
    # All interfaces: whoever listens later may choose any.
    print(*free_ports(int(sys.argv[1]), "0.0.0.0"))
