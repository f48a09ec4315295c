"""Whether it matters who starts the ranks: the same trials by local, slurm and ray, taking turns on one host.

Usage: python benchmarks/launchers.py [ROUNDS]   (needs slurmctld, slurmd and munged of Debian's slurm-wlm and munge)

Slurm is a cluster of one node with all of the host's CPUs, Ray a cluster of one raylet with as many.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from scalestudy.analysis.frames import frames, read_records, record_files
from scalestudy.analysis.intervals import ratio_intervals
from scalestudy.analysis.metrics import with_throughput
from scalestudy.cluster.host import usable_cpus
from scalestudy.cluster.ports import free_ports

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CPUS = len(usable_cpus())
STUDY = """
schema: 1
name: launchers
device: cpu
trainers: [torch-ddp, tf-multiworker]
models:
  - {{name: cnn, data: digits, batch: 64}}
world_sizes: [1, 2]
devices_per_node: 2
threads_per_device: 1
repeats: {rounds}
measurement: {{window_s: 0.5, windows: 6, warm_up_max_s: 5}}
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Bring a Slurm of one node up and yield the environment to use it."""
    environ = {**os.environ, "NODES": "1", "CPUS": str(CPUS), "GPUS": "0", "SCALESTUDY": str(BIN / "scalestudy")}
    script = ROOT / "slurm" / "testcluster.sh"
    subprocess.run([script, "up", folder], check=True, env=environ, stdout=subprocess.DEVNULL)
    try:
        yield {**environ, "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([script, "down", folder], check=True, env=environ)


@contextmanager
def ray(folder: Path) -> Iterator[dict[str, str]]:
    """Bring a Ray of one node up and yield the environment to use it."""
    port, agent = free_ports(2, None)
    options = [f"--port={port}", "--node-ip-address=127.0.0.2", f"--num-cpus={CPUS}", "--include-dashboard=false"]
    where = [f"--temp-dir={folder}", f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000"]
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", *options, *where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield {**os.environ, "RAY_ADDRESS": f"127.0.0.2:{port}"}
    finally:
        head.terminate()
        head.wait()


def main() -> None:
    """Measure and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    # Short: Ray's sockets lie in it.
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    study = folder / "study.yaml"
    study.write_text(STUDY.format(rounds=rounds))
    try:
        with slurm(folder / "slurmd") as slurm_environ, ray(folder / "raylet") as ray_environ:
            run: list[str | Path] = [BIN / "scalestudy", "run", study]
            log = f"--output={folder}/%j.log"
            sbatch: list[str | Path] = ["sbatch", "--wait", "--nodes=1", log, ROOT / "slurm" / "scale.sh", study]
            ways = {
                "local": (run, dict(os.environ)),
                "slurm": (sbatch, slurm_environ),
                "ray": ([*run, "--launcher", "ray"], ray_environ),
            }
            for repeat in range(1, rounds + 1):
                for name in random.Random(repeat).sample(list(ways), k=len(ways)):
                    command, environ = ways[name]
                    argv = [*command, "--out", folder / name, "--repeat", str(repeat)]
                    subprocess.run(argv, check=True, env=environ, stdout=subprocess.DEVNULL)
        tables = [
            frames(read_records(record_files(folder / name), []), folder / name).trials
            for name in ("local", "slurm", "ray")
        ]
        print(table(with_throughput(pd.concat(tables))))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(trials: pd.DataFrame) -> str:
    """Return each launcher's median throughput over that of local, with 95 % bootstrap intervals."""
    lines = ["| trainer | ranks | local, images/s | slurm / local | ray / local | spread of local |", "|---" * 6 + "|"]
    for (trainer, world_size), rows in trials.groupby(["trainer", "world_size"]):
        by = {name: group.throughput_images_per_s.to_numpy() for name, group in rows.groupby("launcher")}
        cells = []
        for name in ("slurm", "ray"):
            low, high = ratio_intervals([by[name]], [by["local"]])
            cells.append(f"{np.median(by[name]) / np.median(by['local']):.3f} ({low[0]:.3f}–{high[0]:.3f})")
        spread = (by["local"].max() - by["local"].min()) / np.median(by["local"])
        lines.append(
            f"| {trainer} | {world_size} | {np.median(by['local']):,.0f} | {cells[0]} | {cells[1]} | {spread:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
