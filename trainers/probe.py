"""What a trainer finds in this interpreter: `python -m scalestudy.trainers.probe TRAINER` prints it as JSON."""

import importlib.metadata
import platform
import sys

from scalestudy.cluster.frozen import Frozen
from scalestudy.trainers.trainer import TRAINERS


class Probe(Frozen):
    """Versions by distribution, and how many GPUs the framework sees."""

    python: str
    versions: dict[str, str]
    gpus: int


def probe(name: str) -> Probe:
    """Import a trainer's framework and ask it; raises ImportError where it is not there."""
    entry = TRAINERS[name]
    gpus = entry.load().visible_gpus()
    versions = dict(map(_installed, entry.distributions))
    return Probe(python=platform.python_version(), versions=versions, gpus=gpus)


def _installed(distribution: str) -> tuple[str, str]:
    # The smaller TensorFlow for hosts without a GPU is a distribution of its own.
    for candidate in (f"{distribution}-cpu", distribution):
        try:
            return candidate, importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return distribution, "unknown version"


if __name__ == "__main__":
    # By itself on the last line, whatever a framework prints when it is imported.
    sys.stdout.flush()
    sys.stdout.buffer.write(f"\n{probe(sys.argv[1]).model_dump_json()}\n".encode())
