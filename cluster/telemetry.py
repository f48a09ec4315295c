"""What a node's devices did during a trial: who samples it, and what is known of the samples."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from scalestudy.cluster.clock import EPOCH_S
from scalestudy.cluster.frozen import Frozen

_STOP_S = 20.0


class Gpu(Frozen):
    """One NVIDIA GPU, or one MIG instance of it (`mig`); `name` is that of its samples: gpu0, gpu5/mig0.

    A GPU in MIG mode (`mig_mode`) computes through its instances alone. `power` says what its samples' power is: the
    driver's reading of the moment, or its usual one, which is the mean of the last second from Ampere on (but GA100).
    """

    name: str
    uuid: str
    model: str
    memory_bytes: int | None = None
    power_limit_w: float | None = None
    mig: bool = False
    mig_mode: bool = False
    gpu_instance: int | None = None
    compute_instance: int | None = None
    power: Literal["instant", "usual"] | None = None
    pci_address: str | None = None


class Link(Frozen):
    """How two GPUs of a node reach each other: the path over PCIe, and how many NVLinks end at both."""

    a: str
    b: str
    path: str | None
    nvlinks: int


class Telemetry(Frozen):
    """One node's samples: `file` in the trial's folder holds them, `error` says why they end early or are not there.

    `visible` names the GPUs that CUDA shows to the node's ranks, as CUDA numbers them. `missing` says by device and
    column why something is null, once. `late` counts the samples that were left out because the sampler was held up.
    `cpus` are the numbers of the CPUs that the host's samples list: none where they are not known, null in records from
    before they were kept, which list them from 0 on.
    """

    host: str
    file: str
    rate_hz: float
    samples: int = 0
    late: int = 0
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()
    visible: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    cpus: tuple[int, ...] | None = None
    missing: Mapping[str, str] = {}
    error: str | None = None


class Sampling:
    """The sampler of this node, a process of its own: started at once, and ended by `stop`."""

    def __init__(self, folder: Path, node_rank: int, host: str, rate_hz: float) -> None:
        # By number too: two nodes of one name are two nodes.
        name = re.sub(r"[^A-Za-z0-9._-]", "_", host)
        self._none = Telemetry(host=host, file=f"telemetry-{node_rank}-{name}.parquet", rate_hz=rate_hz)
        # As ASCII: an argument is written in the locale's encoding.
        asked = json.dumps(self._none.model_dump(mode="json"))
        command = ["-m", "scalestudy.cluster.sampler", str(folder), asked, repr(EPOCH_S)]
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self._process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def stop(self) -> Telemetry:
        """End the sampler and return what it says of its samples, or why it says nothing."""
        if self._process is None:
            return self._failed("the sampler could not be started")
        try:
            # A word, not the end of the pipe: who forked meanwhile holds it open.
            said, _ = self._process.communicate(b"stop\n", timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return self._failed(f"the sampler did not end within {_STOP_S:g} s")
        if self._process.returncode:
            code = self._process.returncode
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}, see the rank's log"
            return self._failed(f"the sampler {how}")
        try:
            return Telemetry.model_validate_json(said)
        except ValidationError:
            return self._failed(f"the sampler said {said[:200]!r}")

    def _failed(self, why: str) -> Telemetry:
        return self._none.model_copy(update={"error": why})
