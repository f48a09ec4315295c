"""How often is a claim of the report wrong, and how often is what is there found? Whole studies, simulated.

Usage: python benchmarks/error_rates.py [--quick] [--share S] [--only SECTION] [--seed N] [--out FILE.json]

Records are generated, those of causes by the real measuring loop on a virtual cluster, and read by the code of the
report. Prints Markdown tables and writes the same as JSON, with Clopper-Pearson intervals of every rate.
"""

import argparse
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import claims
import numpy as np
from light_records import NOISES, STEP_S, Point, failed, light_record, noise, study, write
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta
from virtual_cluster import FIRST_START, Cluster, Truth, record

from scalestudy.analysis.intervals import FEWEST_REPEATS
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.runner import pending
from scalestudy.launch.study import Repeats
from scalestudy.trainers.record import Record
from scalestudy.trainers.trainer import TRAINERS

Values = NDArray[np.float64]
Outcome = Mapping[str, bool | None]

PROCESSES = 2
# Of repeats, unless a cell says so.
SPREAD = 0.02


# --- What is simulated: each takes a generator and what a cell plants, and returns what came of one page.


def difference(rng: np.random.Generator, kind: str, repeats: int, ratio: float, spread: float = SPREAD) -> Outcome:
    """Two trainers on one device; the second has `ratio` of the first's throughput."""
    points = [Point("torch-ddp"), Point("horovod-torch", step_s=STEP_S / ratio)]
    page = claims.Page(study(points, noise(kind, spread, (repeats, 2), rng), rng))
    claimed = {fast for fast, _, _ in claims.faster(page)}
    fast, low, high = claims.ratio_interval(page)
    true = 1 / ratio if fast == "torch-ddp" else ratio
    if ratio == 1:
        return {"a faster one is claimed": bool(claimed), "the ratio's interval holds it": _holds(low, high, true)}
    return {
        "the faster one is claimed": "torch-ddp" in claimed,
        "the slower one is claimed": "horovod-torch" in claimed,
        "the ratio's interval holds it": _holds(low, high, true),
    }


def identical(rng: np.random.Generator, kind: str, repeats: int) -> Outcome:
    """Five trainers that are alike, on one and on two devices."""
    points = [Point(trainer, devices) for trainer in TRAINERS for devices in (1, 2)]
    page = claims.Page(study(points, noise(kind, SPREAD, (repeats, len(points)), rng), rng))
    return {
        "a faster one is claimed": bool(claims.faster(page)),
        "repeats are called unlike": claims.unlike_repeats(page),
        "a trial is called unsteady": claims.unsteady(page),
    }


def intervals(rng: np.random.Generator, kind: str, repeats: int) -> Outcome:
    """One trainer on one device, and on eight with an efficiency of 90 %."""
    points = [Point(devices=1), Point(devices=8, step_s=STEP_S / 0.9)]
    page = claims.Page(study(points, noise(kind, SPREAD, (repeats, 2), rng), rng))
    low, high = claims.throughput_interval(page)
    return {
        "the throughput's interval holds it": _holds(low, high, 8 * 64 * 0.9 / STEP_S / _middle(kind)),
        "the efficiency's interval holds it": _holds(*claims.efficiency_interval(page), 0.9),
    }


def adaptive(rng: np.random.Generator, kind: str, until: str) -> Outcome:
    """One trainer on one device, repeated until its interval is narrow enough, as `runner.pending` says."""
    asked = Repeats.model_validate({"until": until})
    every = study([Point()], noise(kind, SPREAD, (asked.max, 1), rng), rng)
    done: dict[str, Record] = {}
    folder = cast(StudyFolder, SimpleNamespace(record=lambda trial: done.get(trial.id)))
    while due := {trial.id for trial in pending([one.trial for one in every], folder, asked)}:
        done |= {one.trial.id: one for one in every if one.trial.id in due}
    low, high = claims.throughput_interval(claims.Page(done.values()))
    return {"the throughput's interval holds it": _holds(low, high, 64 / STEP_S / _middle(kind))}


@lru_cache
def _middle(kind: str) -> float:
    """Return the median factor of a noise."""
    return float(np.median(noise(kind, SPREAD, (200_001, 1), np.random.default_rng(0))))


CAUSES = ("compute_scaling", "load_balance", "waiting", "communication", "input")
# What is everywhere and costs no more than 0.3 %, but for jitter past a thousand ranks: 0.7 %.
_QUIET = Cluster(
    ranks=1,
    jitter=0.002,
    common_jitter=0.01,
    repeat_jitter=0.01,
    exchange_s=0.0005,
    hidden=0.5,
    batch_period_s=0.05,
    queue=16,
)
# Farther from 1 a factor is planted, nearer it is none that may be named; between them either is right.
_PLANTED, _NONE = 0.95, 0.99


@lru_cache(maxsize=64)
def planted(causes: tuple[str, ...], ranks: int, leaves: float = 0.9) -> tuple[Cluster, Truth]:
    """Return a cluster in which each cause leaves so much of the efficiency, and the truth of it."""
    changed: dict[str, Any] = {"ranks": ranks}
    if "compute_scaling" in causes:
        changed["step_s"] = STEP_S / leaves
    if "load_balance" in causes:
        changed["slowdown"] = (*[1.0] * (ranks - 1), 1 / leaves)
    if "waiting" in causes:
        # Whatever is planted besides: the slowest rank over the slowest of ranks that jitter.
        alike_s = replace(_QUIET, **changed, jitter=0.0).slowest_s()

        def beyond(jitter: float) -> float:
            return alike_s / replace(_QUIET, **changed, jitter=jitter).slowest_s() - leaves

        changed["jitter"] = brentq(beyond, 1e-4, 1.0, xtol=1e-5)
    cluster = replace(_QUIET, **changed)
    if "communication" in causes:
        exposed_s = cluster.slowest_s() * (1 / leaves - 1)
        changed |= {"exchange_s": exposed_s / 0.7, "hidden": 0.3}
    if "input" in causes:
        changed["batch_period_s"] = replace(_QUIET, **changed).resident_s() / leaves
    cluster = replace(_QUIET, **changed)
    return cluster, cluster.truth(_QUIET)


def causes(rng: np.random.Generator, causes: tuple[str, ...], ranks: int, repeats: int) -> Outcome:
    """One device, and `ranks` of them with these causes planted, 10 % each."""
    cluster, truth = planted(causes, ranks)
    slow = ranks - 1 if "load_balance" in causes else None
    return _judged(rng, _QUIET, cluster, truth, repeats, slow)


def case(rng: np.random.Generator, repeats: int, ranks: int, reference: Mapping[str, Any], **changed: Any) -> Outcome:
    """A reference and a cluster by their fields, the cluster's on top of the reference's."""
    one = Cluster(ranks=1, **reference)
    cluster = Cluster(ranks=ranks, **{**reference, **changed})
    truth, slow = _cached_truth(one, cluster), None
    return _judged(rng, one, cluster, truth, repeats, slow)


@lru_cache(maxsize=64)
def _cached_truth(reference: Cluster, cluster: Cluster) -> Truth:
    return cluster.truth(reference)


def _judged(
    rng: np.random.Generator, reference: Cluster, cluster: Cluster, truth: Truth, repeats: int, slow: int | None
) -> Outcome:
    seed = int(rng.integers(2**32))
    page = claims.Page(
        record(replace(one, seed=seed + place), repeat)
        for repeat in range(repeats)
        for place, one in enumerate((reference, cluster))
    )
    named, accused = claims.causes(page), claims.accused(page)
    true = {cause: getattr(truth, cause) for cause in CAUSES}
    there = {cause for cause in CAUSES if true[cause] < _PLANTED}
    absent = {cause for cause in CAUSES if true[cause] > _NONE}
    held = {
        f"{cause}: the interval holds it": _holds(low, high, true[cause])
        for cause, (low, high) in claims.factor_intervals(page).items()
    }
    return {
        "all that is planted is named": there <= named if there else None,
        "something else is accused": bool(named & absent),
        "a rank is accused wrongly": accused is not None and accused != slow,
        "causes are said not to add up": claims.doubted(page),
        **held,
    }


def gate(
    rng: np.random.Generator,
    kind: str,
    repeats: int,
    ratio: float = 1.0,
    points: int = 1,
    spread: float = SPREAD,
    day: float = 0.0,
    tolerance: float = 0.03,
    succeed: int | None = None,
    lacks: int = 0,
) -> Outcome:
    """Two folders of so many points: the new one has `ratio` of the base's throughput, and the days differ by `day`.

    Of the new one's repeats only the first so many succeed, and it lacks so many points.
    """
    models = [f"m{index}" for index in range(points)]
    base, new = (
        study([Point(model=model, step_s=STEP_S * scale) for model in models], factors, rng, when)
        for when, scale in enumerate((1.0, math.exp(day * rng.standard_normal()) / ratio))
        for factors in [noise(kind, spread, (repeats, points), rng)]
    )
    new = [
        one if succeed is None or one.trial.repeat < succeed else failed(one)
        for one in new
        if one.trial.model in models[lacks:]
    ]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "base"), base)
        write(Path(folder, "new"), new)
        said = claims.verdict(Path(folder, "base"), Path(folder, "new"), tolerance)
    worse = ratio < 1 - tolerance or succeed is not None or lacks > 0
    return {
        "it passes falsely" if worse else "it fails falsely": said == ("pass" if worse else "fail"),
        "it could not tell": said == "unknown",
    }


def steadiness(rng: np.random.Generator, kind: str, windows: int) -> Outcome:
    """One trial whose windows are independent, depend on each other (AR 1), drift or change once."""
    off = rng.standard_normal(windows)
    if kind.startswith("r = "):
        share = float(kind.removeprefix("r = "))
        for index in range(1, windows):
            off[index] = share * off[index - 1] + math.sqrt(1 - share**2) * off[index]
    at = np.arange(windows) / max(windows - 1, 1)
    planted_by = {"drift 8 %": 0.08 * at, "change 8 %": 0.08 * (at > 0.5)}.get(kind, np.zeros(windows))
    steps_s: Values = np.asarray(STEP_S * (1 + planted_by) * np.exp(SPREAD * off))
    page = claims.Page([light_record(Point(), 0, steps_s, FIRST_START.isoformat())])
    found = "it is found" if planted_by.any() else "it is falsely called unsteady"
    return {found: claims.unsteady(page)}


def repeats_unlike(rng: np.random.Generator, kind: str, repeats: int) -> Outcome:
    """One point whose repeats drift by 14 % in all, or have two speeds 10 % apart, in turns of no order."""
    factors = noise("lognormal", SPREAD / 4, (repeats, 1), rng)
    if kind == "drift 14 %":
        factors = factors * (1 + 0.14 * np.arange(repeats) / (repeats - 1))[:, None]
    if kind == "two speeds":
        factors = factors * (1 + 0.1 * rng.permutation(np.arange(repeats) % 2))[:, None]
    found = "repeats are falsely called unlike" if kind == "alike" else "it is found"
    return {found: claims.unlike_repeats(claims.Page(study([Point()], factors, rng)))}


def warm_up(rng: np.random.Generator, drift: float, drift_tau_s: float) -> Outcome:
    """One device whose step is longer at first; nothing but the measuring loop decides when to begin."""
    cluster = Cluster(ranks=1, jitter=0.01, drift=drift, drift_tau_s=drift_tau_s, seed=int(rng.integers(2**32)))
    page = claims.Page([record(cluster)])
    off = float(page.trials.throughput_images_per_s.iloc[0]) < 64 / STEP_S / 1.02
    said = claims.unsteady(page)
    return {
        "it is off by more than 2 %": off,
        "it is off by more than 2 %, and nothing is said": off and not said,
        "it is falsely called unsteady": None if drift else said,
    }


def _holds(low: float, high: float, true: float) -> bool | None:
    if math.isnan(low) or math.isnan(high):
        return None
    return bool(low <= true <= high)


# --- The cells.


@dataclass(frozen=True)
class Cell:
    """Pages of one kind: the table, row and column that they stand in, how many, and what is planted."""

    section: str
    row: str
    column: str
    pages: int
    simulate: Callable[..., Outcome]
    planted: Mapping[str, Any] = field(default_factory=dict)


def cells(quick: bool) -> Iterator[Cell]:
    """Yield all that is simulated; quick: the first columns alone, and few pages."""
    for cell in (*_differences(), *_gates(), *_causes(), *_cases(), *_trials()):
        if not quick:
            yield cell
        elif cell.column in _QUICK and " and " not in cell.row:
            yield replace(cell, pages=max(_FEWEST_PAGES, cell.pages // 100))


_QUICK = {
    *("3 repeats", "6 repeats", "until 2%", "2 ranks", "8 ranks"),
    *("2 ahead", "16 ahead", "10 windows", "τ = 30 s"),
}
_FEWEST_PAGES = 3


def _differences() -> Iterator[Cell]:
    for kind in NOISES:
        for repeats in (2, 3, 4, 5, 6, 8, 10, 20, 30):
            column, planted = f"{repeats} repeats", {"kind": kind, "repeats": repeats}
            for ratio, said, pages in ((1.0, "identical", 400), (0.97, "−3 %", 200), (0.95, "−5 %", 200)):
                yield Cell(f"two trainers, {said}", kind, column, pages, difference, planted | {"ratio": ratio})
            yield Cell("five identical trainers at two sizes", kind, column, 200, identical, planted)
            yield Cell("intervals", kind, column, 400, intervals, planted)
        for until in ("2%", "1%"):
            yield Cell("adaptive repeats", kind, f"until {until}", 400, adaptive, {"kind": kind, "until": until})


def _gates() -> Iterator[Cell]:
    quiet = {"spread": 0.005}
    rows: dict[str, dict[str, Any]] = {
        "nothing changed": {},
        "nothing changed, tolerance 0": {"tolerance": 0.0},
        "nothing changed, another day, tolerance 0": {"day": 0.015, "tolerance": 0.0} | quiet,
        "−2.9 %": {"ratio": 0.971},
        "−2.9 %, quiet": {"ratio": 0.971} | quiet,
        "−5 %": {"ratio": 0.95},
        "−5 %, quiet": {"ratio": 0.95} | quiet,
        "−50 %": {"ratio": 0.5},
        "40 identical points, tolerance 0": {"points": 40, "tolerance": 0.0},
        "all but one repeat fail": {"succeed": 1},
        "one of two points is missing": {"points": 2, "lacks": 1},
    }
    for repeats in (1, 3, 6, 10, 20):
        for row, how in rows.items():
            pages = 100 if how.keys() & {"points", "succeed", "lacks"} else 400
            planted = {"kind": "lognormal", "repeats": repeats} | how
            yield Cell("compare, 3 % tolerance", row, f"{repeats} repeats", pages, gate, planted)


def _causes() -> Iterator[Cell]:
    for ranks in (2, 8, 64, 4096):
        for which in [(), *combinations(CAUSES, 1), *combinations(CAUSES, 2)]:
            planted: dict[str, Any] = {"causes": which, "ranks": ranks, "repeats": 6}
            pages = 200 if ranks <= 64 else 30
            yield Cell("causes", " and ".join(which) or "nothing", f"{ranks} ranks", pages, causes, planted)
    for repeats in (3, 6, 10, 20):
        planted = {"causes": ("communication",), "ranks": 8, "repeats": repeats}
        yield Cell("factors on 8 ranks", "communication", f"{repeats} repeats", 400, causes, planted)


def _cases() -> Iterator[Cell]:
    """Yield what was once judged wrongly; the reference is such a device too, but for what is said."""
    quiet = {"jitter": 0.002, "repeat_jitter": 0.005, "exchange_s": 0.0005}
    for queue in (0, 2, 16, 256):
        reference = quiet | {"batch_period_s": 0.05, "queue": queue}
        for period_s in (0.11, 0.125, 0.15, 0.2):
            planted: dict[str, Any] = {"ranks": 8, "repeats": 6, "reference": reference, "batch_period_s": period_s}
            row, column = f"{1e3 * period_s:.0f} ms a batch", f"{queue} ahead"
            yield Cell("input on 8 ranks, a step of 100 ms", row, column, 100, case, planted)
    for queue, workers in ((2, 2), (16, 8), (16, 16)):
        reference = quiet | {"batch_period_s": 0.05, "queue": queue, "workers": workers}
        for period_s in (0.08, 0.09, 0.11):
            planted = {"ranks": 8, "repeats": 6, "reference": reference, "batch_period_s": period_s}
            row, column = f"{1e3 * period_s:.0f} ms a batch, {workers} at once", f"{queue} ahead"
            yield Cell("input in bursts on 8 ranks, a step of 100 ms", row, column, 100, case, planted)
    rows: dict[str, dict[str, Any]] = {
        "5 % jitter, exchange 0.2 ms": {"jitter": 0.05, "exchange_s": 0.0002},
        "5 % jitter that is common": {"common_jitter": 0.05},
        "0.3 s in 1 of 10,000 steps of a rank": {"blip_s": 0.3, "blip_probability": 1e-4},
    }
    for row, how in rows.items():
        planted = {"ranks": 64, "repeats": 6, "reference": quiet | how}
        yield Cell("cases on 64 ranks", row, "6 repeats", 200, case, planted)
    planted = {"ranks": 64, "repeats": 6, "reference": quiet, "slowdown": _changing_straggler}
    yield Cell("cases on 64 ranks", "a straggler of 10 % that changes", "6 repeats", 200, case, planted)


def _trials() -> Iterator[Cell]:
    for kind in ("independent", "r = 0.3", "r = 0.6", "drift 8 %", "change 8 %"):
        for windows in (10, 20, 50):
            yield Cell(
                "windows of a trial", kind, f"{windows} windows", 400, steadiness, {"kind": kind, "windows": windows}
            )
    for kind in ("alike", "drift 14 %", "two speeds"):
        for repeats in (6, 10, 20):
            planted: dict[str, Any] = {"kind": kind, "repeats": repeats}
            yield Cell("repeats of a point", kind, f"{repeats} repeats", 200, repeats_unlike, planted)
    for drift in (0.0, 0.1, 0.3):
        for tau_s in (3.0, 30.0):
            planted = {"drift": drift, "drift_tau_s": tau_s}
            yield Cell("warm-up", f"{drift:.0%} longer at first", f"τ = {tau_s:.0f} s", 200, warm_up, planted)


def _changing_straggler(repeat: int) -> Values:
    factors = np.ones(64)
    factors[7 * repeat % 64] = 1.1
    return factors


# --- Running them, and what is written.


def simulated(cell: Cell, first: int, last: int, seed: int) -> list[Outcome]:
    """Return what came of some of a cell's pages; each page has a generator of its own."""
    name = zlib.crc32(f"{cell.section}|{cell.row}|{cell.column}".encode())
    return [cell.simulate(np.random.default_rng([seed, name, page]), **cell.planted) for page in range(first, last)]


# Outcomes that must be rare, and usual; from six repeats on.
RARE = {
    "a faster one is claimed",
    "the slower one is claimed",
    "something else is accused",
    "a rank is accused wrongly",
    "it fails falsely",
    "it passes falsely",
    "it is falsely called unsteady",
    "repeats are falsely called unlike",
    "it is off by more than 2 %, and nothing is said",
}
USUAL = {"all that is planted is named", "it is found"}
_RARELY, _USUALLY = 0.05, 0.95


def missed(cell: Cell, outcome: str, found: Mapping[str, Any]) -> bool:
    """Return whether an outcome is surely too frequent, or surely too rare: by the rate's interval."""
    if found["rate"] is None or cell.planted.get("repeats", FEWEST_REPEATS) < FEWEST_REPEATS:
        return False
    if outcome in RARE:
        return bool(found["low"] > _RARELY)
    return (outcome in USUAL or outcome.endswith("interval holds it")) and bool(found["high"] < _USUALLY)


def rate(outcomes: Sequence[Outcome], name: str) -> dict[str, Any]:
    """Return of how many pages an outcome can be told, its rate, and the rate's Clopper-Pearson 95 % interval."""
    values = [outcome[name] for outcome in outcomes if outcome.get(name) is not None]
    count, hits = len(values), sum(map(bool, values))
    if not count:
        return {"pages": 0, "rate": None, "low": None, "high": None}
    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return {"pages": count, "rate": hits / count, "low": low, "high": high}


def run(chosen: Sequence[Cell], seed: int, processes: int = PROCESSES) -> list[dict[str, Any]]:
    """Return a row a cell and outcome, whatever the number of processes."""
    parts = [
        (cell, first, min(first + size, cell.pages))
        for cell in chosen
        for size in [max(1, cell.pages // (2 * processes))]
        for first in range(0, cell.pages, size)
    ]
    outcomes: dict[int, list[Outcome]] = {id(cell): [] for cell in chosen}
    with ProcessPoolExecutor(processes) as pool:
        for (cell, _, _), some in zip(parts, pool.map(_simulated, [(*part, seed) for part in parts]), strict=True):
            outcomes[id(cell)] += some
    return [
        {"section": cell.section, "row": cell.row, "column": cell.column, "outcome": name}
        | found
        | {"missed": missed(cell, name, found)}
        for cell in chosen
        for name in {name: None for outcome in outcomes[id(cell)] for name in outcome}
        for found in [rate(outcomes[id(cell)], name)]
    ]


def _simulated(part: tuple[Cell, int, int, int]) -> list[Outcome]:
    return simulated(*part)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table a section and outcome; bold: what surely misses its goal."""
    lines = ["Bold: surely above 5 %, of what must be rare, or surely below 95 %, of what must be usual.", ""]
    for section, outcome in dict.fromkeys((row["section"], row["outcome"]) for row in rows):
        here = [row for row in rows if (row["section"], row["outcome"]) == (section, outcome)]
        if all(row["rate"] is None for row in here):
            continue
        columns = list(dict.fromkeys(row["column"] for row in here))
        told = {(row["row"], row["column"]): _share(row) for row in here}
        lines += [f"### {section}: {outcome}", "", f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for name in dict.fromkeys(row["row"] for row in here):
            lines.append(f"| {name} | {' | '.join(told.get((name, column), '') for column in columns)} |")
        lines.append("")
    return "\n".join(lines)


def _share(row: Mapping[str, Any]) -> str:
    if row["rate"] is None:
        return "–"
    mark = "**" if row["missed"] else ""
    return f"{mark}{100 * row['rate']:.1f} %{mark}"


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some columns, a hundredth of the pages")
    parser.add_argument("--share", type=float, default=1.0, help="of the pages of every cell")
    parser.add_argument("--only", default="", help="sections that begin like this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--out", type=Path, default=Path("error-rates.json"))
    given = parser.parse_args(argv)
    chosen = [
        replace(cell, pages=max(_FEWEST_PAGES, round(given.share * cell.pages)))
        for cell in cells(given.quick)
        if cell.section.startswith(given.only)
    ]
    rows = run(chosen, given.seed, given.processes)
    given.out.write_text(json.dumps({"seed": given.seed, "quick": given.quick, "rows": rows}, indent=1))
    print(markdown(rows))


if __name__ == "__main__":
    main()
