"""A cluster on a virtual clock: it drives the real measuring loop for all ranks at once, and knows the truth.

The loop reads one clock and asks one trainer. Here the clock returns an array, a time a rank, and the trainer moves all
ranks; so one pass of `measure` and `measure_causes` takes 2 or 4,096 ranks through a trial, and the windows, which hold
arrays, are split into those of every rank afterwards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.stats import norm

from scalestudy.cluster.host import Host
from scalestudy.cluster.rank import Rank
from scalestudy.trainers.measure import Causes, Measured, measure, measure_causes
from scalestudy.trainers.record import Environment, Memory, RankReport, Record, Window
from scalestudy.trainers.trainer import TRAINERS, Trainer
from scalestudy.trainers.trial import Data, Measurement, Optimizer, Trial

Values = NDArray[np.float64]
# Of a ResNet-50 in float32.
_EXCHANGED_BYTES = 102_228_128
# What the truth is worked out from where there is no formula: steps, and points of an integral.
_LONG_STEPS, _POINTS = 4000, 20_001
FIRST_START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is planted.

    ranks: devices, a process each. step_s: local computing of a step. slowdown: factors of it, one a rank, or a
    function of the repeat that returns them; None for ranks that are alike. jitter: sigma of a lognormal factor of mean
    1, drawn for every step and rank; common_jitter: the same for every step, alike on all ranks; repeat_jitter: for
    every trial. blip_s: what a rank's step takes longer with blip_probability. exchange_s: the exchange of a step
    alone, hidden: the share of it that costs a step nothing. batch_period_s: how often every rank's producer makes a
    batch, up to `queue` ahead of the step; with a queue of 0 the step makes its own batch; with a period of 0 all data
    lie on the device. workers: so many make them, each as many times slower; they begin together, so that their batches
    get ready at once.
    drift: by which share the step is longer at first, which ends with the time constant drift_tau_s.
    """

    ranks: int
    step_s: float = 0.1
    slowdown: Sequence[float] | Callable[[int], Sequence[float] | Values] | None = None
    jitter: float = 0.0
    common_jitter: float = 0.0
    repeat_jitter: float = 0.0
    blip_s: float = 0.0
    blip_probability: float = 0.0
    exchange_s: float = 0.0
    hidden: float = 0.0
    batch_period_s: float = 0.0
    queue: int = 0
    workers: int = 1
    drift: float = 0.0
    drift_tau_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError where workers would idle."""
        if self.workers > max(self.queue, 1):
            raise ValueError(f"{self.workers} workers, of whose batches the queue holds {self.queue}")

    @property
    def resident(self) -> bool:
        """Whether all data lie on the device."""
        return self.batch_period_s == 0

    @property
    def exposed_s(self) -> float:
        """What the exchange adds to a step."""
        return self.exchange_s * (1 - self.hidden) if self.ranks > 1 else 0.0

    def slowdowns(self, repeat: int) -> Values:
        """Return a factor a rank."""
        if self.slowdown is None:
            return np.ones(self.ranks)
        given = self.slowdown(repeat) if callable(self.slowdown) else self.slowdown
        factors = np.asarray(given, dtype=np.float64)
        if factors.shape != (self.ranks,):
            raise ValueError(f"slowdown has {factors.shape} factors for {self.ranks} ranks")
        return factors

    def slowest_s(self, repeat: int = 0) -> float:
        """Return the expected time of the slowest rank's computing in a step, after the drift.

        The integral of 1 - F over time, F the product of the ranks' distribution functions.
        """
        slowdowns, counts = np.unique(self.slowdowns(repeat), return_counts=True)
        alone_s = self.step_s * slowdowns
        if not (self.jitter or self.blip_probability):
            return float(alone_s.max())
        most_s = alone_s.max() * math.exp(9 * self.jitter) + self.blip_s
        times_s = np.linspace(0, most_s, _POINTS)[1:]
        log_below = np.zeros_like(times_s)
        for own_s, count in zip(alone_s, counts, strict=True):
            below = (1 - self.blip_probability) * self._below(times_s / own_s)
            below += self.blip_probability * self._below((times_s - self.blip_s) / own_s)
            log_below += count * np.log(np.maximum(below, 1e-300))
        return float(trapezoid(1 - np.exp(log_below), times_s) + times_s[0])

    def _below(self, factors: Values) -> Values:
        """Return how often a step's jitter is below these factors."""
        if not self.jitter:
            return np.asarray(factors >= 1, dtype=np.float64)
        positive = np.maximum(factors, 1e-300)
        return np.asarray(norm.cdf(np.log(positive) / self.jitter + self.jitter / 2))

    def resident_s(self, repeat: int = 0) -> float:
        """Return the expected step on data that lie on the device, after the drift."""
        return self.slowest_s(repeat) + self.exposed_s

    def whole_s(self, repeat: int = 0) -> float:
        """Return the expected step, after the drift and with the queue as a long training leaves it."""
        resident_s = self.resident_s(repeat)
        if self.resident:
            return resident_s
        if self.queue == 0:
            return resident_s + self.batch_period_s
        if not (self.jitter or self.common_jitter or self.blip_probability):
            return max(resident_s, self.batch_period_s)
        trainer = VirtualTrainer(replace(self, drift=0.0, repeat_jitter=0.0), repeat)
        for _ in range(2 * self.queue + 100):
            trainer.step()
        began_s = trainer.times_s.max()
        for _ in range(_LONG_STEPS):
            trainer.step()
        return float(trainer.times_s.max() - began_s) / _LONG_STEPS

    def truth(self, reference: "Cluster", repeat: int = 0) -> "Truth":
        """Return the factors of the efficiency against a reference, in weak scaling."""
        own, there = self._factors(repeat), reference._factors(repeat)
        return Truth(*(one / other for one, other in zip(own, there, strict=True)))

    def _factors(self, repeat: int) -> tuple[float, ...]:
        slowdowns = self.slowdowns(repeat)
        # Every rank has the same share of blips.
        blips_s = self.blip_probability * self.blip_s
        typical_s = self.step_s * float(np.quantile(slowdowns, 0.5, method="lower")) + blips_s
        longest_s = self.step_s * float(slowdowns.max()) + blips_s
        slowest_s, resident_s = self.slowest_s(repeat), self.resident_s(repeat)
        return (
            1 / typical_s,
            typical_s / longest_s,
            longest_s / slowest_s,
            slowest_s / resident_s,
            resident_s / self.whole_s(repeat),
        )


@dataclass(frozen=True)
class Truth:
    """The efficiency's factors, as `metrics.CAUSES` calls them; waiting is for the slowest of ranks that jitter."""

    compute_scaling: float
    load_balance: float
    waiting: float
    communication: float
    input: float

    @property
    def efficiency(self) -> float:
        """The factors' product."""
        return math.prod((self.compute_scaling, self.load_balance, self.waiting, self.communication, self.input))


class _Times(np.ndarray[Any, np.dtype[np.float64]]):
    """Times of all ranks, which the loop may round as it does one."""

    def __round__(self, digits: int = 0) -> "_Times":
        return cast("_Times", np.round(self, digits))


class VirtualTrainer:
    """All ranks of one trial; what the loop calls takes them along `times_s`, a time a rank."""

    def __init__(self, cluster: Cluster, repeat: int = 0) -> None:
        self.cluster = cluster
        self.times_s: Values = np.zeros(cluster.ranks)
        # Points of one study are not disturbed alike.
        self._rng = np.random.default_rng([cluster.seed, repeat, cluster.ranks])
        pace = _factor(self._rng, cluster.repeat_jitter)
        self._alone_s = cluster.step_s * cluster.slowdowns(repeat) * pace
        # When each worker's last batch was ready, and when the last `queue` of all were taken: so far ahead is made.
        self._ready_s: Values = np.zeros((cluster.workers, cluster.ranks))
        self._taken_s: Values = np.zeros((cluster.queue, cluster.ranks))
        self._batches = 0

    def now_s(self) -> Values:
        """Return the clock of every rank."""
        return self.times_s.copy().view(_Times)

    def step(self) -> None:
        """Take a batch, compute, wait for the slowest, and for as much of the exchange as is not hidden."""
        self.next_batch()
        self.resident_step()

    def resident_step(self) -> None:
        """Take the step without a batch; producers go on."""
        self.local_step()
        self._meet()
        self.times_s += self.cluster.exposed_s

    def local_step(self) -> None:
        """Compute, and wait for nobody."""
        cluster, rng = self.cluster, self._rng
        own_s = self._alone_s * _factor(rng, cluster.jitter, cluster.ranks)
        if cluster.blip_probability:
            own_s += cluster.blip_s * (rng.random(cluster.ranks) < cluster.blip_probability)
        if cluster.drift:
            own_s *= 1 + cluster.drift * np.exp(-self.times_s / cluster.drift_tau_s)
        self.times_s = self.times_s + own_s * _factor(rng, cluster.common_jitter)

    def exchange_step(self) -> None:
        """Meet and exchange."""
        self._meet()
        self.times_s += self.cluster.exchange_s

    def next_batch(self) -> None:
        """Take a batch: one that lies there, or the next that gets ready."""
        if self.cluster.resident:
            return
        if self.cluster.queue == 0:
            self.times_s = self.times_s + self.cluster.batch_period_s
            return
        # A producer goes on as soon as there is room.
        place, worker = self._batches % self.cluster.queue, self._batches % self.cluster.workers
        began_s = np.maximum(self._ready_s[worker], self._taken_s[place])
        self._ready_s[worker] = began_s + self.cluster.workers * self.cluster.batch_period_s
        self.times_s = np.maximum(self.times_s, self._ready_s[worker])
        self._taken_s[place] = self.times_s
        self._batches += 1

    def max_over_ranks(self, value: float | Values) -> float:
        """Return the largest, and let all clocks go on from the latest."""
        self._meet()
        return float(np.max(value))

    def batches_ahead(self) -> int:
        """Return how many batches lie ready at most."""
        return self.cluster.queue

    def exchanged_bytes(self) -> int | None:
        """Return those of a usual model."""
        return _EXCHANGED_BYTES

    def kept(self) -> Callable[[], None]:
        """Keep nothing: no step changes anything."""
        return lambda: None

    def synchronize(self) -> None:
        """Do nothing: no step returns before its end."""

    def device_timer(self) -> Callable[[], float | None]:
        """Return a clock that tells nothing."""
        return lambda: None

    def loss(self) -> float:
        """Return a finite number."""
        return 1.0

    def memory(self) -> Memory:
        """Return something."""
        return Memory(peak_resident_bytes=2**30)

    def reset_peaks(self) -> None:
        """Do nothing."""

    def _meet(self) -> None:
        self.times_s = np.full(self.cluster.ranks, self.times_s.max())


def _factor(rng: np.random.Generator, sigma: float, count: int | None = None) -> Any:
    """Return lognormal factors of mean 1."""
    return np.exp(sigma * rng.standard_normal(count) - sigma**2 / 2) if sigma else 1.0


def measured(
    cluster: Cluster, plan: Measurement, repeat: int = 0, *, warm_up_min_s: float = 0.0
) -> tuple[Measured, Causes]:
    """Take a trial through the real loop, as a worker does; what it saw holds arrays, a value a rank."""
    virtual = VirtualTrainer(cluster, repeat)
    trainer = cast(Trainer, virtual)
    with patch("scalestudy.trainers.measure.now_s", virtual.now_s):
        trainer.step()
        trainer.max_over_ranks(0.0)
        seen = measure(trainer, plan, lambda _: None, warm_up_min_s=warm_up_min_s)
        causes = Causes()
        if plan.cause_windows:
            causes = measure_causes(
                trainer,
                plan.cause_windows,
                seen.windows[-1].steps,
                resident=cluster.resident,
                alone=cluster.ranks == 1,
                seed=repeat,
                drain_max_s=plan.measure_max_s,
            )
    return seen, causes


def trial(
    cluster: Cluster,
    repeat: int,
    plan: Measurement,
    *,
    trainer: str = "torch-ddp",
    model: str = "resnet50",
    devices_per_node: int = 8,
) -> Trial:
    """Return what is measured on such a cluster, in weak scaling."""
    return Trial(
        trainer=trainer,
        model=model,
        data=Data(
            source="synthetic" if cluster.resident else "synthetic-host", channels=3, image_size=224, classes=1000
        ),
        scaling="weak",
        world_size=cluster.ranks,
        devices_per_node=devices_per_node,
        device="gpu",
        per_device_batch=64,
        execution=TRAINERS[trainer].execution,
        options=TRAINERS[trainer].options(),
        optimizer=Optimizer(),
        measurement=plan,
        threads_per_device=1,
        loader_workers=0 if cluster.resident else 8,
        seed=1,
        repeat=repeat,
    )


def record(cluster: Cluster, repeat: int = 0, plan: Measurement | None = None, **named: Any) -> Record:
    """Return the record of one trial; `named` is what else `trial` takes."""
    plan = plan or Measurement()
    made = trial(cluster, repeat, plan, **named)
    seen, causes = measured(cluster, plan, repeat, warm_up_min_s=made.warm_up_min_s)
    return Record(
        trial=made,
        outcome="ok",
        reports=tuple(_reports(cluster, seen, causes, named.get("devices_per_node", 8))),
        environment=environment((FIRST_START + timedelta(minutes=repeat)).isoformat()),
    )


def environment(started_at: str) -> Environment:
    """Return where a trial is said to have run."""
    return Environment(
        started_at=started_at,
        duration_s=60.0,
        launcher="local",
        host=_host(0),
        scalestudy="0.1.0",
        git_commit=None,
        study_name="virtual",
        study="name: virtual",
    )


def records(clusters: Sequence[Cluster], repeats: int, plan: Measurement | None = None, **named: Any) -> list[Record]:
    """Return a study's records: every cluster is a point of one series, measured `repeats` times."""
    return [record(cluster, repeat, plan, **named) for repeat in range(repeats) for cluster in clusters]


def _reports(cluster: Cluster, seen: Measured, causes: Causes, devices_per_node: int) -> Iterator[RankReport]:
    """Yield every rank's report; of 4,096 ranks validating each window would take longer than all else."""
    shared: dict[str, Any] = {
        "warm_up_steady": seen.warm_up_steady,
        "losses": tuple(seen.losses),
        "warm_up_memory": seen.warm_up_memory,
        "memory": seen.memory,
        "phases": {"import": 3.0, "rendezvous": 0.1, "build": 1.0, "first_step": 0.5, "warm_up": 2.0},
        "parameter_count": _EXCHANGED_BYTES // 4,
        "parameter_checksums": ("same",),
        "exchanged_bytes": _EXCHANGED_BYTES if causes.exchange else None,
    }
    split: dict[str, Any] = {"warm_up_windows": _by_rank(seen.warm_up_windows), "windows": _by_rank(seen.windows)}
    for field in fields(causes):
        name = f"{field.name}_windows"
        split[name if name in RankReport.model_fields else field.name] = _by_rank(getattr(causes, field.name))
    for rank in range(cluster.ranks):
        node, local_rank = divmod(rank, devices_per_node)
        yield RankReport.model_construct(
            rank=Rank(
                rank=rank,
                world_size=cluster.ranks,
                local_rank=local_rank,
                local_world_size=min(devices_per_node, cluster.ranks - node * devices_per_node),
                node_rank=node,
                host=f"node{node}",
            ),
            host=_host(node) if local_rank == 0 else None,
            **shared,
            **{name: parts[rank] for name, parts in split.items() if parts},
        )


def _by_rank(seen: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return every rank's own of windows or seconds that hold arrays."""
    if not seen:
        return []
    if not isinstance(seen[0], Window):
        return list(zip(*(values.tolist() for values in seen), strict=True))
    parts = [
        [
            Window(start_s, end_s, window.steps)
            for start_s, end_s in zip(window.start_s.tolist(), window.end_s.tolist(), strict=True)
        ]
        for window in seen
    ]
    return list(zip(*parts, strict=True))


def _host(node: int) -> Host:
    return Host(name=f"node{node}", system="Linux", cpu_model="a CPU", cpu_count=64, memory_bytes=2**39)
