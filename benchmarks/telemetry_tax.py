"""What telemetry costs: steps with the sampler at 10 and at 100 Hz against steps without, interleaved in one run.

Usage: python benchmarks/telemetry_tax.py [ROUNDS [TRAINER…]]

Ratio = throughput with the sampler / without. Samplers of both rates run beside the ranks, stopped (SIGSTOP) but in the
windows that they have a part in. Windows of half a second take turns; a second window without a sampler in each round
shows what the machine's noise alone makes of two equal things. Medians over rounds with their 95 % bootstrap intervals.
The last column is the processor time that a sample takes, as the kernel counts it: with every core at work, the rate
times that is the share of one core that telemetry takes.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness_tax import with_interval
from held_sampler import HeldSampler
from ranks import run_ranks, trial_of

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.measure import steps_for, timed_window
from scalestudy.trainers.pinning import take_place
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Trial

WINDOW_S = 0.5
RATES_HZ = (10.0, 100.0)
CNN = Data(source="synthetic", channels=1, image_size=32, classes=10)


def rank_main(folder: Path, count: int) -> None:
    """Take the windows of one rank in turn; the first rank holds the samplers, and writes what everything took."""
    trial = Trial.model_validate_json((folder / "trial.json").read_bytes())
    rank = Rank.from_environ(os.environ)
    samplers = [HeldSampler(folder, number, rate) for number, rate in enumerate(RATES_HZ)] if rank.rank == 0 else []
    take_place(trial, rank, os.environ, folder)
    trainer: Any = TRAINERS[trial.trainer].load()(trial, rank)
    trainer.build()
    # Past the samplers' own imports.
    time.sleep(3)
    for sampler in samplers:
        sampler.hold()
    step_s = trainer.max_over_ranks(-np.subtract(*timed_window(trainer, 50)[:2])) / 50
    steps = steps_for(WINDOW_S, step_s)
    idle_s = [sampler.cpu_s() for sampler in samplers]
    rounds: list[list[float]] = []
    for index in range(count):
        took_s = [0.0] * 4
        for place in range(4):
            # Everyone goes first as often as last: none, 10 Hz, 100 Hz, none again.
            who = (index + place) % 4
            active = samplers[who - 1] if samplers and who in (1, 2) else None
            if active:
                active.go_on()
            window = timed_window(trainer, steps)
            took_s[who] = float(trainer.max_over_ranks(window.end_s - window.start_s))
            if active:
                active.hold()
        rounds.append(took_s)
    if rank.rank == 0:
        spent_s = [sampler.cpu_s() - before for sampler, before in zip(samplers, idle_s, strict=True)]
        active_s = [sum(took[who] for took in rounds) for who in (1, 2)]
        per_sample_s = [
            spent / (active * rate) for spent, active, rate in zip(spent_s, active_s, RATES_HZ, strict=True)
        ]
        for sampler in samplers:
            sampler.stop()
        (folder / "rounds.json").write_text(json.dumps([rounds, per_sample_s]))
    trainer.close()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Print a row a case."""
    if sys.argv[1:2] == ["--rank"]:
        rank_main(Path(sys.argv[2]), int(sys.argv[3]))
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print("| trainer | ranks | 10 Hz / none | 100 Hz / none | none / none again | CPU time of a sample at 10, 100 Hz |")
    print("|---" * 6 + "|")
    for trainer in sys.argv[2:] or ("torch-ddp", "tf-multiworker"):
        for world_size in (1, 2):
            rounds, per_sample_s = run_ranks(__file__, trial_of(trainer, "cnn", CNN, 64, world_size), count)
            ratios = [
                with_interval(
                    [(none + again) / 2 / took[who] for took in rounds for none, again in [took[::3]]], digits=4
                )
                for who in (1, 2)
            ]
            noise = with_interval([none / again for none, _, _, again in rounds], digits=4)
            cpu = ", ".join(f"{1e3 * spent:.2f} ms" for spent in per_sample_s)
            print(f"| {trainer} | {world_size} | {ratios[0]} | {ratios[1]} | {noise} | {cpu} |", flush=True)


if __name__ == "__main__":
    main()
