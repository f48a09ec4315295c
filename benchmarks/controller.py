"""What the controller costs a trial beyond the life of its workers, and how fast `--help` answers.

Usage: python benchmarks/controller.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
TRIALS = 10
STUDY = """
schema: 1
name: controller
device: cpu
trainers: torch-ddp
models: cnn
batch: 8
world_sizes: [2]
repeats: {repeats}
measurement: {{window_s: 0.05, windows: 2, warm_up_max_s: 0.2}}
environments: {{torch-ddp: {interpreter}}}
"""
# Stands where the workers' interpreter would, and notes when each begins and ends.
WRAPPER = """#!/bin/bash
begun=$EPOCHREALTIME
{python} "$@" < /proc/self/fd/0
code=$?
echo "$3 $begun $EPOCHREALTIME" >> {lives}
exit $code
"""


def controller_s(folder: Path) -> float:
    """Return the seconds a trial adds to its workers' lives, over whole trials from the first's begin to the last's."""
    interpreter, lives, study = folder / "python", folder / "lives", folder / "study.yaml"
    interpreter.write_text(WRAPPER.format(python=sys.executable, lives=lives))
    interpreter.chmod(0o755)
    study.write_text(STUDY.format(repeats=TRIALS, interpreter=interpreter))
    subprocess.run([SCALESTUDY, "run", study, "--out", folder / "out"], check=True, capture_output=True)
    spans: dict[str, tuple[float, float]] = {}
    for line in lives.read_text().splitlines():
        trial, begun, ended = line.split()
        before = spans.get(trial, (float("inf"), 0.0))
        spans[trial] = (min(before[0], float(begun)), max(before[1], float(ended)))
    assert len(spans) == TRIALS
    ordered = sorted(spans.values())
    return median(after[0] - before[1] for before, after in zip(ordered, ordered[1:], strict=False))


def help_s() -> float:
    """Return the seconds that `scalestudy --help` takes."""
    took = []
    for _ in range(20):
        begun = time.perf_counter()
        subprocess.run([SCALESTUDY, "--help"], check=True, capture_output=True)
        took.append(time.perf_counter() - begun)
    return median(took)


def main() -> None:
    """Print both."""
    with tempfile.TemporaryDirectory() as folder:
        between_s = controller_s(Path(folder))
    print(f"controller: {between_s:.3f} s a trial, from its last worker's end to the next one's start (median)")
    print(f"--help: {help_s():.3f} s (median of 20)")


if __name__ == "__main__":
    main()
