"""Who am I: one rank of a trial, read once from the environment that its launcher made."""

import json
import socket
from collections.abc import Mapping, Sequence

from scalestudy.cluster.frozen import Frozen
from scalestudy.cluster.network import parted


class Rank(Frozen):
    """One training process among `world_size`; ranks of one host share a `node_rank`.

    `devices` are the GPUs that it drives, as CUDA numbers them there: none on CPU, nor in records from before repeats
    took turns on a node's devices, where a rank has that of its local rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    host: str
    devices: tuple[int, ...] = ()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Rank":
        """Read torchrun's variables; raises ValueError naming the one that is missing or no number."""
        values = {
            field: integer(environ, variable)
            for field, variable in {
                "rank": "RANK",
                "world_size": "WORLD_SIZE",
                "local_rank": "LOCAL_RANK",
                "local_world_size": "LOCAL_WORLD_SIZE",
                "node_rank": "GROUP_RANK",
            }.items()
        }
        if not 0 <= values["rank"] < values["world_size"]:
            raise ValueError(f"RANK={values['rank']} is not in 0..WORLD_SIZE-1 (WORLD_SIZE={values['world_size']})")
        return cls(**values, host=environ.get("SCALESTUDY_HOST") or socket.gethostname())


def rank_environ(rank: Rank, addresses: Sequence[str]) -> dict[str, str]:
    """Return torchrun's variables and TF_CONFIG for one rank; `addresses` is one host:port a rank, in rank order."""
    if len(addresses) != rank.world_size:
        raise ValueError(f"{rank.world_size} ranks need as many addresses, got {len(addresses)}: {addresses}")
    host, port = parted(addresses[0])
    return {
        "RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_RANK": str(rank.local_rank),
        "LOCAL_WORLD_SIZE": str(rank.local_world_size),
        "GROUP_RANK": str(rank.node_rank),
        "SCALESTUDY_HOST": rank.host,
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TF_CONFIG": json.dumps(
            {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": rank.rank}}
        ),
    }


def rank_addresses(environ: Mapping[str, str]) -> list[str]:
    """Return host:port of every rank, as `rank_environ` wrote them."""
    found: list[str] = json.loads(environ["TF_CONFIG"])["cluster"]["worker"]
    return found


def integer(environ: Mapping[str, str], variable: str) -> int:
    """Return a variable that holds a number; raises ValueError where it does not."""
    try:
        return int(environ[variable])
    except KeyError:
        raise ValueError(f"{variable} is not set: a worker is started by a launcher, see `scalestudy run`") from None
    except ValueError:
        raise ValueError(f"{variable}={environ[variable]!r} is not a number") from None
