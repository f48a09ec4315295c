"""How long a step takes to become what it will be: short windows from the first step on, no warm-up left out.

Usage: python benchmarks/warm_up.py OUT.json SECONDS [TRAINER MODEL PRECISION EXECUTION BATCH]...

Without cases: those of a CPU, or of a GPU where torch sees one. For every case it prints by how much of the last
third's median the windows are off, second by second; OUT.json has every window.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

from ranks import trial_of

from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.rank import Rank
from scalestudy.trainers.measure import timed_window
from scalestudy.trainers.record import Window
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data

WINDOW_S = 0.1
AT_S = (0.5, 1, 2, 3, 5, 10, 15, 20, 30, 45, 60)
CPU_CASES = [
    ("torch-ddp", "cnn", "fp32", "eager", 64),
    ("torch-ddp", "resnet18", "fp32", "eager", 4),
    ("tf-multiworker", "cnn", "fp32", "graph", 64),
    ("tf-multiworker", "resnet18", "fp32", "graph", 4),
]
GPU_CASES = [
    ("torch-ddp", "resnet50", "bf16", "graph", 128),
    ("torch-ddp", "resnet50", "bf16", "eager", 128),
    ("torch-ddp", "resnet50", "tf32", "eager", 128),
]


def main() -> None:
    """Run every case in a process of its own, and print its curve."""
    out, seconds, cases = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if os.environ.get("WARM_UP_CASE"):
        print(json.dumps(curve(seconds, *json.loads(os.environ["WARM_UP_CASE"]))))
        return
    import subprocess

    chosen = [tuple(cases[at : at + 5]) for at in range(0, len(cases), 5)] or (GPU_CASES if on_gpu() else CPU_CASES)
    found = {}
    for case in chosen:
        environ = os.environ | {"WARM_UP_CASE": json.dumps(case)}
        told = subprocess.run([sys.executable, *sys.argv], env=environ, stdout=subprocess.PIPE)
        if told.returncode:
            print(f"{' '.join(map(str, case))}: failed")
            continue
        windows = json.loads(told.stdout.splitlines()[-1])
        found[" ".join(map(str, case))] = windows
        out.write_text(json.dumps(found))
        print(" ".join(map(str, case)), described(windows), flush=True)


def on_gpu() -> bool:
    """Return whether there is an NVIDIA GPU."""
    return Path("/dev/nvidiactl").exists()


def curve(seconds: float, trainer: str, model: str, precision: str, execution: str, batch: int) -> list[Window]:
    """Return windows of a tenth of a second, for so many seconds after the first step."""
    gpu = on_gpu()
    size, channels, classes = (224, 3, 1000) if gpu else (32, 1 if model == "cnn" else 3, 10)
    data = Data(source="synthetic", channels=channels, image_size=size, classes=classes)
    trial = trial_of(trainer, model, data, int(batch), 1, device="gpu" if gpu else "cpu")
    trial = trial.model_copy(update={"precision": precision, "execution": execution})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": [f"127.0.0.1:{free_ports(1)[0]}"]}, "task": {"type": "worker", "index": 0}}
    )
    rank = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="localhost")
    chosen = TRAINERS[trainer].load()(trial, rank)
    chosen.build()
    chosen.step()
    chosen.synchronize()
    windows: list[Window] = []
    ends_s = time.monotonic() + seconds
    steps = 1
    while time.monotonic() < ends_s:
        windows.append(timed_window(chosen, steps))
        taken_s = windows[-1].end_s - windows[-1].start_s
        steps = max(1, round(steps * WINDOW_S / max(taken_s, 1e-6)))
    return windows


def described(windows: list[list[float]]) -> str:
    """Return how far the windows around each moment are from the median of the last third."""
    first_s = windows[0][0]
    times = [((start_s + end_s) / 2 - first_s, (end_s - start_s) / steps) for start_s, end_s, steps, _ in windows]
    late = median(step_s for _, step_s in times[2 * len(times) // 3 :])
    said = []
    for at_s in AT_S:
        near = [step_s for middle_s, step_s in times if 0.7 * at_s <= middle_s <= 1.4 * at_s]
        if near:
            said.append(f"{at_s:g} s {median(near) / late - 1:+.1%}")
    return f"{1e3 * late:.4g} ms a step; " + ", ".join(said)


if __name__ == "__main__":
    main()
