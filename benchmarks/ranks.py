"""What the benchmarks share: the trial that they run, and ranks that run a script of theirs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scalestudy.cluster.ports import free_ports
from scalestudy.launch.local import environment, local_ranks
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Measurement, Optimizer, Trial


def trial_of(trainer: str, model: str, data: Data, batch: int, world_size: int, **changes: Any) -> Trial:
    """Return the trial of ranks on CPU, a CPU each, changed as asked."""
    fields: dict[str, Any] = {
        "scaling": "weak",
        "devices_per_node": world_size,
        "device": "cpu",
        "execution": TRAINERS[trainer].execution,
        "options": TRAINERS[trainer].options(),
        "optimizer": Optimizer(),
        "measurement": Measurement(),
        "threads_per_device": 1,
        "seed": 1,
        "repeat": 0,
    }
    fields |= {"trainer": trainer, "model": model, "data": data, "world_size": world_size, "per_device_batch": batch}
    return Trial(**(fields | changes))


def run_ranks(script: str, trial: Trial, count: int) -> Any:
    """Start `script --rank FOLDER COUNT` for each rank as the local launcher does; return what rounds.json holds."""
    ranks = local_ranks(trial.world_size)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(trial.world_size)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "trial.json").write_text(trial.model_dump_json(by_alias=True))
        started = [
            subprocess.Popen(
                [sys.executable, script, "--rank", folder, str(count)],
                env=environment(os.environ, trial, rank, addresses) | {"SCALESTUDY_LIFELINE": ""},
                stderr=subprocess.DEVNULL,
            )
            for rank in ranks
        ]
        if any(process.wait() for process in started):
            raise SystemExit(f"{trial.trainer} {trial.model} world size {trial.world_size}: a rank failed")
        return json.loads(Path(folder, "rounds.json").read_text())
