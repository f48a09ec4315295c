"""The sampler, one process a node: `python -m scalestudy.cluster.sampler FOLDER TELEMETRY EPOCH_S`.

Outside the training processes, whose interpreter it would hold up. It ends when its stdin has something to read or is
closed, writes its samples to FOLDER, and says on stdout what it has sampled: TELEMETRY, filled in.
"""

import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scalestudy.cluster.cuda_devices import visible_gpus
from scalestudy.cluster.host_counters import HostCounters
from scalestudy.cluster.nvml import Gpus
from scalestudy.cluster.sample_file import SampleWriter, warm_up
from scalestudy.cluster.telemetry import Telemetry


def main() -> None:
    """Sample until told to stop."""
    folder, telemetry, epoch_s = Path(sys.argv[1]), Telemetry.model_validate_json(sys.argv[2]), float(sys.argv[3])
    # Before devices are asked for anything: what is asked is then sampled at once.
    warm_up()
    gpus, counters, writer = Gpus(), HostCounters(), SampleWriter(folder / telemetry.file)
    missing: dict[str, str] = {}
    sources: dict[str, Callable[[float], Iterable[dict[str, Any]]]] = {
        "host": lambda at_s: [counters.sample(at_s)],
        "gpu": gpus.sample,
    }
    interval_s = 1 / telemetry.rate_hz
    samples = late = 0
    due_s = time.perf_counter()
    stopping = False
    while not stopping:
        # Once more when told to stop: of a window that ended since the last sample nothing would be known.
        stopping = _told_to_stop(due_s - time.perf_counter())
        at_s = epoch_s + time.perf_counter()
        for name, sample in list(sources.items()):
            try:
                rows = list(sample(at_s))
            # Whatever it is: one source that fails costs itself.
            except Exception as error:
                traceback.print_exc()
                missing[name] = f"{type(error).__name__}: {error}"
                del sources[name]
            else:
                writer.add(rows)
        samples += 1
        due_s += interval_s
        # Held up: what was missed stays missed, rather than be sampled in a row.
        while due_s < time.perf_counter():
            due_s += interval_s
            late += 1
    writer.close()
    filled_in = {
        "samples": samples,
        "late": late,
        "gpus": gpus.gpus,
        "links": gpus.links,
        "visible": visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), gpus.gpus, gpus.driver),
        "interfaces": counters.interfaces,
        "cpus": counters.cpus,
        "missing": {**counters.missing, **gpus.missing, **missing},
    }
    sys.stdout.buffer.write(telemetry.model_copy(update=filled_in).model_dump_json().encode())


def _told_to_stop(wait_s: float) -> bool:
    return bool(select.select([sys.stdin], [], [], max(0.0, wait_s))[0])


if __name__ == "__main__":
    main()
