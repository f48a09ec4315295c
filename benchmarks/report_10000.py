"""Time and memory of `scalestudy report` over 10,000 generated trials of 8 ranks and 50 windows.

Usage: python benchmarks/report_10000.py [TRIALS]
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from scalestudy.cluster.host import this_host
from scalestudy.cluster.rank import Rank
from scalestudy.trainers.record import Environment, LossPoint, Memory, RankReport, Record, Window
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Measurement, Optimizer, Trial

RANKS, WINDOWS, REPEATS = 8, 50, 5
WORLD_SIZES = (8, 16, 32, 64)
MODELS = ("cnn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def generate(out: Path, count: int) -> None:
    """Write records of plausible shape: every trainer and model, some batches, 4 world sizes, 5 repeats."""
    rng = np.random.default_rng(0)
    host = this_host()
    points = [
        (trainer, model, world_size, repeat)
        for trainer in TRAINERS
        for model in MODELS
        for world_size in WORLD_SIZES
        for repeat in range(REPEATS)
    ]
    for index in range(count):
        trainer, model, world_size, repeat = points[index % len(points)]
        trial = Trial(
            trainer=trainer,
            model=model,
            data=Data(source="synthetic", channels=3, image_size=64, classes=10),
            scaling="weak",
            world_size=world_size,
            devices_per_node=world_size,
            device="cpu",
            per_device_batch=8 + index // len(points),
            execution=TRAINERS[trainer].execution,
            options=TRAINERS[trainer].options(),
            optimizer=Optimizer(),
            measurement=Measurement(),
            threads_per_device=1,
            seed=1,
            repeat=repeat,
        )
        ends = np.cumsum(rng.normal(0.5, 0.01, size=(RANKS, WINDOWS)), axis=1)
        reports = tuple(
            RankReport(
                rank=Rank(
                    rank=rank, world_size=RANKS, local_rank=rank, local_world_size=RANKS, node_rank=0, host=host.name
                ),
                phases={"import": 3.0, "rendezvous": 0.1, "build": 1.0, "first_step": 0.5, "warm_up": 2.0},
                warm_up_windows=tuple(Window(i, i + 0.1, 2) for i in range(10)),
                warm_up_steady=True,
                windows=tuple(Window(float(end) - 0.5, float(end), 10) for end in ends[rank]),
                losses=tuple(LossPoint(i, 1 / i) for i in range(1, WINDOWS + 12)),
                memory=Memory(peak_resident_bytes=2**30),
                parameter_count=1,
                parameter_checksums=("abc",),
                host=host if rank == 0 else None,
            )
            for rank in range(RANKS)
        )
        environment = Environment(
            started_at="2026-01-01T00:00:00+00:00",
            duration_s=30.0,
            launcher="local",
            host=host,
            scalestudy="0.1.0",
            git_commit=None,
            study_name="generated",
            study="name: generated",
        )
        folder = out / "trials" / trial.folder_name
        folder.mkdir(parents=True)
        record = Record(trial=trial, outcome="ok", reports=reports, environment=environment)
        (folder / "record.json").write_text(record.model_dump_json(by_alias=True))


def main() -> None:
    """Generate, report, print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), count)
        began_s = time.monotonic()
        subprocess.run([Path(sys.executable).with_name("scalestudy"), "report", folder], check=True)
        took_s = time.monotonic() - began_s
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{count} trials: {took_s:.1f} s, {peak_bytes / 2**20:.0f} MiB at the peak")


if __name__ == "__main__":
    main()
