"""CPU time and memory of `scalestudy report` over 10,000 generated trials of 8 ranks and 50 windows.

Usage: python benchmarks/report_10000.py [TRIALS [FOLDER]]

The records hold what real ones do: windows that differ between ranks and in time, a warm-up, the parts of a step and
single steps, losses of real data, software, placement, and of every tenth trial samples of its node. FOLDER keeps them
for the next call.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalestudy.cluster.cpu_use import CpuUse
from scalestudy.cluster.host import this_host
from scalestudy.cluster.rank import Rank
from scalestudy.cluster.sample_file import SampleWriter
from scalestudy.cluster.telemetry import Telemetry
from scalestudy.trainers.record import (
    Environment,
    LossPoint,
    Memory,
    Placement,
    RankReport,
    Record,
    Software,
    Window,
)
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Measurement, Optimizer, Trial

RANKS, WINDOWS, WARM_UP_WINDOWS, PART_WINDOWS, SINGLE_STEPS, REPEATS = 8, 50, 10, 4, 40, 5
WORLD_SIZES = (8, 16, 32, 64)
MODELS = ("cnn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
DATA = (
    Data(source="images", folder="/data/images", channels=3, image_size=64, classes=10),
    Data(source="synthetic", channels=3, image_size=64, classes=10),
)
# A tenth of the trials change in step time on the way, each by so much.
CHANGED, CHANGE = 10, 1.1
# Every so many trials have samples of their node, at 10 Hz for 30 s and of so many CPUs.
SAMPLED, SAMPLES, CPUS = 10, 300, 64
STEPS, BEGAN_S = 10, 1_767_225_600.0
SAMPLE_FILE = "telemetry-0-node.parquet"

Values = NDArray[np.float64]


def generate(out: Path, count: int) -> None:
    """Write so many records: every trainer and model, some batches, 4 world sizes, 5 repeats."""
    rng = np.random.default_rng(0)
    host = this_host()
    out.mkdir(parents=True, exist_ok=True)
    write_samples(out / SAMPLE_FILE)
    points = list(product(TRAINERS, MODELS, WORLD_SIZES, range(REPEATS)))
    for index in range(count):
        trainer, model, world_size, repeat = points[index % len(points)]
        batch = index // len(points)
        trial = Trial(
            trainer=trainer,
            model=model,
            data=DATA[batch % 2],
            scaling="weak",
            world_size=world_size,
            devices_per_node=world_size,
            device="cpu",
            per_device_batch=8 + batch,
            execution=TRAINERS[trainer].execution,
            options=TRAINERS[trainer].options(),
            optimizer=Optimizer(),
            measurement=Measurement(windows=WINDOWS),
            threads_per_device=1,
            seed=1,
            repeat=repeat,
        )
        sampled = index % SAMPLED == 0
        record = Record(
            trial=trial,
            outcome="ok",
            reports=reports(trial, index, rng, sampled=sampled),
            environment=Environment(
                started_at=datetime.fromtimestamp(BEGAN_S + 40 * index, UTC).isoformat(),
                duration_s=35.0,
                launcher="local",
                host=host,
                scalestudy="0.1.0",
                git_commit=None,
                study_name="generated",
                study="name: generated",
            ),
        )
        folder = out / "trials" / trial.folder_name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(record.model_dump_json(by_alias=True))
        if sampled:
            shutil.copy(out / SAMPLE_FILE, folder)


def reports(trial: Trial, index: int, rng: np.random.Generator, *, sampled: bool) -> tuple[RankReport, ...]:
    """Return what the ranks of a trial report: noise of their own over a pace, which all of them wait for."""
    step_s = 0.05 * (1 + index % 7 / 20) * (1 + 0.02 * np.log2(trial.world_size)) * rng.lognormal(0, 0.01)
    pace = rng.lognormal(0, 0.01, WINDOWS)
    if index % CHANGED == 0:
        pace[WINDOWS // 2 :] *= CHANGE
    own = rng.lognormal(0, 0.01, (RANKS, 1))
    warm_up = timed(step_s * own * rng.lognormal(0.05, 0.05, (RANKS, WARM_UP_WINDOWS)), BEGAN_S + 6)
    windows = timed(step_s * own * pace * rng.lognormal(0, 0.01, (RANKS, WINDOWS)), warm_up[-1][-1].end_s)
    parts: dict[str, list[tuple[Window, ...]]] = {}
    at_s = windows[-1][-1].end_s
    shares = {"resident": 0.95, "local": 0.85, "exchange": 0.2}
    if trial.data.source != "synthetic":
        shares |= {"whole": 1.0, "input": 0.3}
    for part, share in shares.items():
        parts[part] = timed(share * step_s * own * rng.lognormal(0, 0.02, (RANKS, PART_WINDOWS)), at_s)
        at_s = parts[part][-1][-1].end_s
    single_s = np.round(0.85 * step_s * own * rng.lognormal(0, 0.03, (RANKS, SINGLE_STEPS)), 9)
    steps = [1, *range(1 + STEPS, 1 + STEPS * (WINDOWS + WARM_UP_WINDOWS + 1), STEPS)]
    losses = 2.3 * np.exp(-np.array(steps) / 300) * rng.lognormal(0, 0.05, (RANKS, len(steps)))
    each = trial.world_size // RANKS
    memory = Memory(peak_resident_bytes=2**30)
    return tuple(
        RankReport(
            rank=Rank(rank=rank, world_size=RANKS, local_rank=rank, local_world_size=RANKS, node_rank=0, host="node"),
            pid=1000 + rank,
            # As many ranks whatever the world size, so that the records are of one size.
            replicas=each,
            phases={"import": 3.0, "rendezvous": 0.5, "build": 1.0, "first_step": 1.0, "warm_up": 5.0, "causes": 5.0},
            phase_starts_s={
                "import": BEGAN_S,
                "rendezvous": BEGAN_S + 3,
                "build": BEGAN_S + 3.5,
                "first_step": BEGAN_S + 4.5,
                "warm_up": BEGAN_S + 6,
                "causes": windows[rank][-1].end_s,
            },
            warm_up_windows=warm_up[rank],
            warm_up_steady=True,
            windows=windows[rank],
            **{f"{part}_windows": taken[rank] for part, taken in parts.items()},
            exchanged_bytes=4_000_000,
            local_step_times_s=tuple(single_s[rank].tolist()),
            losses=tuple(map(LossPoint, steps, losses[rank].tolist())),
            training_images=50_000,
            warm_up_memory=memory,
            memory=memory,
            parameter_count=1_000_000,
            parameter_checksums=("924ec094f37d8a77",) * each,
            host=this_host() if rank == 0 else None,
            telemetry=telemetry() if sampled and rank == 0 else None,
            software=Software(
                python="3.11.7",
                versions={"numpy": "2.4.6", "scalestudy": "0.1.0", trial.trainer: "2.13.0"},
                settings={"communication": "gloo", "intra_op": 1, "tf32": 0},
                cpus=tuple(range(rank * each, (rank + 1) * each)),
                variables={"OMP_NUM_THREADS": "1"},
            ),
            placement=Placement(
                cpus=tuple(range(rank * each, (rank + 1) * each)),
                cores=tuple(range(rank * each, (rank + 1) * each)),
                numa_nodes=(0,),
            ),
            cpu_before=CpuUse(elapsed_s=10.0, own_s=9.5, busy_s=9.6, run_delay_s=0.1, stalled_s={"io": 0.0}),
            cpu_measured=CpuUse(elapsed_s=20.0, own_s=19.5, busy_s=19.6, run_delay_s=0.1, stalled_s={"io": 0.0}),
        )
        for rank in range(RANKS)
    )


def timed(steps_s: Values, began_s: float) -> list[tuple[Window, ...]]:
    """Return each rank's windows from step times, ranks × windows; all begin when the slowest is done."""
    seconds = STEPS * steps_s
    starts_s = began_s + np.concatenate([[0.0], np.cumsum(seconds.max(axis=0) + 0.001)])[:-1]
    return [
        tuple(Window(start_s, end_s, STEPS) for start_s, end_s in zip(starts_s.tolist(), ends_s, strict=True))
        for ends_s in (starts_s + seconds).tolist()
    ]


def telemetry() -> Telemetry:
    """Return what a report says of `SAMPLE_FILE`."""
    return Telemetry(host="node", file=SAMPLE_FILE, rate_hz=10.0, samples=SAMPLES, cpus=tuple(range(CPUS)))


def write_samples(path: Path) -> None:
    """Write a node's samples of one trial: its CPUs' counters, which tick on with noise."""
    rng = np.random.default_rng(0)
    path.unlink(missing_ok=True)
    writer = SampleWriter(path)
    busy_s = 1000 + np.cumsum(rng.uniform(0.08, 0.1, (SAMPLES, CPUS)), axis=0)
    writer.add(
        {
            "time_s": BEGAN_S + 0.1 * index,
            "device": "host",
            "memory_used_bytes": 2**34,
            "cpu_busy_s": busy_s[index].round(2).tolist(),
            "cpu_steal_s": [0.0] * CPUS,
        }
        for index in range(SAMPLES)
    )
    writer.close()


def main() -> None:
    """Generate, report, print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(temporary)
        if not (folder / "trials").exists():
            generate(folder, count)
        began_s = time.monotonic()
        subprocess.run([Path(sys.executable).with_name("scalestudy"), "report", folder], check=True)
        took_s = time.monotonic() - began_s
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{count} trials: {used.ru_utime + used.ru_stime:.1f} s of CPU in {took_s:.1f} s, "
        f"{used.ru_maxrss / 2**10:.0f} MiB at the peak"
    )


if __name__ == "__main__":
    main()
