"""Whole studies of light records, quick to make: known steps, and noise of repeats of several kinds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from virtual_cluster import FIRST_START, Cluster, environment, trial

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.record import LossPoint, Memory, RankReport, Record, Window
from scalestudy.trainers.trial import Measurement

Values = NDArray[np.float64]
# How many scales wide the middle half is: of a normal distribution, of t with 3 degrees of freedom, of Lomax with 2.
_NORMAL, _T, _LOMAX = 1.3490, 1.5298, 0.8453
STEP_S, _WINDOWS, _WINDOW_SPREAD = 0.1, 10, 0.005


def noise(kind: str, spread: float, shape: tuple[int, int], rng: np.random.Generator) -> Values:
    """Return a factor of the step time a repeat (rows) and point (columns).

    The middle half of it is as wide as that of a normal distribution with the deviation `spread`, but for `bimodal`.
    Raises ValueError of an unknown kind.
    """
    if kind == "lognormal":
        return np.asarray(np.exp(spread * rng.standard_normal(shape)))
    if kind == "t":
        # Three degrees of freedom: outliers on either side.
        return np.asarray(np.exp(spread * _NORMAL / _T * rng.standard_t(3, shape)))
    if kind == "bimodal":
        # Three of ten repeats run in a slower state.
        slow = rng.random(shape) < 0.3
        return np.asarray((1 + 4 * spread * slow) * np.exp(spread / 4 * rng.standard_normal(shape)))
    if kind == "Pareto":
        # Nothing is faster than the best, and some are far slower.
        return np.asarray(1 + spread * _NORMAL / _LOMAX * rng.pareto(2, shape))
    if kind == "blocks":
        # All points of a repeat share most of it, as they share a machine's hour.
        shared = rng.standard_normal((shape[0], 1))
        return np.asarray(np.exp(spread * shared + spread / 2 * rng.standard_normal(shape)))
    raise ValueError(f"no such noise: {kind}")


NOISES = ("lognormal", "t", "bimodal", "Pareto", "blocks")


@dataclass(frozen=True)
class Point:
    """One trainer on so many devices, with its true step."""

    trainer: str = "torch-ddp"
    devices: int = 1
    step_s: float = STEP_S
    model: str = "resnet50"


def study(points: Sequence[Point], factors: Values, rng: np.random.Generator, day: int = 0) -> list[Record]:
    """Return a record of every repeat (rows of factors) and point (columns), in the shuffled order of a run."""
    found: list[Record] = []
    for repeat, row in enumerate(factors):
        for index in rng.permutation(len(points)):
            point = points[index]
            steps_s = point.step_s * row[index] * np.exp(_WINDOW_SPREAD * rng.standard_normal(_WINDOWS))
            start = FIRST_START + timedelta(days=day, minutes=len(found))
            found.append(light_record(point, repeat, steps_s, start.isoformat()))
    return found


def light_record(point: Point, repeat: int, steps_s: Values, started_at: str) -> Record:
    """Return a trial whose windows have these steps: one process drives all devices, and no part of a step is timed."""
    steps = max(1, math.ceil(0.5 / point.step_s))
    ends_s = np.cumsum(steps_s * steps)
    windows = tuple(
        Window(end_s - step_s * steps, end_s, steps)
        for end_s, step_s in zip(ends_s.tolist(), steps_s.tolist(), strict=True)
    )
    report = RankReport(
        rank=Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="node0"),
        replicas=point.devices,
        phases={"import": 3.0, "rendezvous": 0.1, "build": 1.0, "first_step": 0.5, "warm_up": 2.0},
        warm_up_steady=True,
        windows=windows,
        losses=(LossPoint(1, 1.0),),
        memory=Memory(peak_resident_bytes=2**30),
        parameter_count=1,
        host=environment(started_at).host,
    )
    measured = trial(
        Cluster(ranks=point.devices),
        repeat,
        Measurement(windows=len(windows)),
        trainer=point.trainer,
        model=point.model,
        devices_per_node=2**20,
    )
    return Record(trial=measured, outcome="ok", reports=(report,), environment=environment(started_at))


def failed(one: Record) -> Record:
    """Return the record that it would be, had its first rank failed."""
    return Record(trial=one.trial, outcome="failed", reason="rank 0: out of luck", environment=one.environment)


def write(out: Path, records: Sequence[Record]) -> None:
    """Write a folder as a run leaves it."""
    for one in records:
        folder = out / "trials" / one.trial.folder_name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(one.model_dump_json(by_alias=True))
