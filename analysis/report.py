"""Records to a report: results.csv, results.parquet, figures/ and one self-contained report.html."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from scalestudy.analysis import (
    answer,
    causes,
    collectives,
    devices,
    differences,
    fairness,
    figures,
    intervals,
    laws,
    metrics,
    placement,
    resolution,
    shares,
)
from scalestudy.analysis.canvas import Figure, as_svg, save_png
from scalestudy.analysis.frames import Frames, frames, read_records, record_files
from scalestudy.analysis.tables import Tables, tables
from scalestudy.trainers.files import DamagedError, read_record
from scalestudy.trainers.record import Costs, Record
from scalestudy.trainers.trainer import series_name

# By `Gpu.power`.
_POWER = {"instant": "of the moment", "usual": "as the driver tells it, on most GPUs the mean of the last second"}


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where the report is, which records could not be read, and what of the images is left out, a sentence a folder."""

    html: Path
    damaged: list[DamagedError]
    left_out: list[str]


# Most tables have few rows, and there pandas works faster on Python's strings than on Arrow's.
@pd.option_context("mode.string_storage", "python")
def write_report(out: Path, prices: Mapping[str, float] | None = None, *, png: bool = False) -> Written:
    """Analyse a study's folder; `prices` are fields of Costs that replace the study's own.

    Figures are SVG, which the page holds too: text in it can be searched, and it is sharp at any size. `png` writes
    them as PNG as well, for slides, which takes as long again.

    Raises ValueError where it holds no record.
    """
    facts, found, damaged = read_study(out)
    made = tables(found)
    trials, points = made.trials, made.points
    made.comparisons.to_csv(out / "comparisons.csv", index=False)
    traps = pd.DataFrame(fairness.traps(trials), columns=devices.NOTICE_COLUMNS)
    notices = _notices(pd.concat([traps, found.notices]), trials)
    swept = collectives.read(out, damaged)
    results = metrics.results(trials)
    results.to_csv(out / "results.csv", index=False)
    results.to_parquet(out / "results.parquet", index=False)
    found.devices.to_parquet(out / "devices.parquet", index=False)

    (out / "figures").mkdir(exist_ok=True)
    shown = metrics.most_measured(points, _MOST_PANELS) if len(points) else []
    fitted = laws.fits(trials)
    drawn = {
        name: _save(figure, out / "figures" / name, png=png)
        for name, figure in _draw(found, _of(made, shown), fitted, out / "trials").items()
    }
    if len(swept):
        figure = figures.collectives(collectives.points(swept), collectives.fits(swept))
        drawn["collectives"] = _save(figure, out / "figures" / "collectives", png=png)
    html = out / "report.html"
    costs = facts.costs.model_copy(update=dict(prices or {}))
    said = answer.headline(points, made.comparisons, made.compilation) if len(points) else []
    html.write_text(
        encoding="utf-8",
        data=_page(
            facts,
            costs,
            trials,
            points,
            damaged,
            answers=said,
            unlike=[*made.unlike, *(f"{sentence}." for sentence in facts.left_out)],
            notices=notices,
            sizes=_sizes(points, fitted, resolution.resolution(trials)),
            swept=collectives.fits(swept).to_dict("records"),
            figures=drawn,
        ),
    )
    return Written(html=html, damaged=damaged, left_out=[*facts.left_out])


def read_study(out: Path) -> tuple["Facts", Frames, list[DamagedError]]:
    """Return what a study's folder says, and the records that are damaged; raises ValueError where no other is."""
    facts = Facts()
    damaged: list[DamagedError] = []
    # One record in memory at a time: the frames keep what the report needs.
    found = frames((facts.seen(record) for record in read_records(record_files(out), damaged)), out / "trials")
    if found.trials.empty:
        raise ValueError(f"{out}: no record there can be read; {damaged[0]}")
    return facts, found, damaged


def page(name: str) -> jinja2.Template:
    """Return one of our templates."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "share": shares.share,
        "give_or_take": shares.give_or_take,
        "off_by": shares.off_by,
        "devices": lambda count: metrics.devices(int(count)),
        "told_apart": resolution.told_apart,
        "ratio": lambda row, name, digits=0: shares.ratio(*_with_ends(row, name), digits),
        "known": lambda row, name: row[f"{name}_low"] == row[f"{name}_low"],
        "ends": lambda row, name: shares.ends(row[f"{name}_low"], row[f"{name}_high"]),
    }
    return environment.from_string(files("scalestudy.analysis").joinpath(name).read_text(encoding="utf-8"))


def _with_ends(row: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


class Facts:
    """What a report says of where the records come from, gathered as they pass by."""

    def __init__(self) -> None:
        self.studies: dict[str, str] = {}
        self.environment: dict[str, dict[str, None]] = {}
        self._places: dict[str, dict[tuple[str, str], dict[str, None]]] = {}
        self.first: str = ""
        self.last: str = ""
        self.costs = Costs()
        self.left_out: dict[str, None] = {}

    def seen(self, record: Record) -> Record:
        """Note a record and hand it on."""
        where = record.environment
        self.studies.setdefault(where.study, where.study_name)
        self.first = min(filter(None, [self.first, where.started_at]))
        if where.started_at >= self.last:
            self.last, self.costs = where.started_at, where.costs
        self._note("launcher", where.launcher)
        for subject, value in where.scheduler.items():
            self._note(subject, value)
        self._note("scalestudy", f"{where.scalestudy}, commit {where.git_commit or 'unknown'}")
        for host in {where.host, *(report.host for report in record.reports if report.host)}:
            memory = f"{host.memory_bytes / 2**30:.0f} GiB"
            self._note("host", f"{host.name}: {host.cpu_count} CPUs ({host.cpu_model}), {memory}, {host.system}")
            self._note("GPUs", ", ".join(host.gpus) if host.gpus else "none")
            if host.nvidia_driver:
                self._note("NVIDIA driver", host.nvidia_driver)
        sharing = placement.sharing(record.reports)
        for report in record.reports:
            if report.left_out:
                self.left_out[report.left_out] = None
            if telemetry := report.telemetry:
                self._note("telemetry", f"{telemetry.rate_hz:g} samples a second")
                for gpu in telemetry.gpus:
                    if gpu.power:
                        self._note("power of the GPUs", _POWER[gpu.power])
                for link in telemetry.links:
                    nvlinks = f"{link.nvlinks} NVLinks, " if link.nvlinks else ""
                    self._note("GPU links", f"{link.a}–{link.b}: {nvlinks}{link.path or 'path unknown'}")
                for what, why in telemetry.missing.items():
                    # What a lost device did not tell stands among the warnings.
                    if " " in what or what == "gpu":
                        self._note("not told by the devices", f"{what}: {why}")
            if software := report.software:
                self._note("Python", software.python)
                for name, version in software.versions.items():
                    if name != "scalestudy":
                        self._note(name, version)
                pinned = placement.described(
                    software.cpus, report.placement, report.rank.devices, shares=report.rank.rank in sharing
                )
                settings = ", ".join(f"{name} {count}" for name, count in software.settings.items())
                # By its place on its node: a thousand ranks of equal nodes are a few lines.
                place = f"local rank {report.rank.local_rank} of {report.rank.local_world_size}"
                self._note_place(f"{series_name(record.trial)}: CPUs and settings", (place, settings), pinned)
                for name, value in software.variables.items():
                    # Differs by trial and names ports: who talks to whom, not how.
                    if name != "TF_CONFIG":
                        self._note("environment variable", f"{name}={value}")
        return record

    def _note_place(self, subject: str, rank: tuple[str, str], pinned: str) -> None:
        """Note in one line where ranks of the same place and settings were: in every repeat on other devices."""
        by_rank = self._places.setdefault(subject, {})
        places = by_rank.setdefault(rank, {})
        if pinned not in places:
            places[pinned] = None
            lines = [f"{place}: {' or '.join(known)}; {settings}" for (place, settings), known in by_rank.items()]
            self.environment[subject] = dict.fromkeys(lines)

    def _note(self, subject: str, value: str) -> None:
        self.environment.setdefault(subject, {})[value] = None


def _save(figure: Figure, path: Path, *, png: bool) -> str:
    """Write PATH.svg, and PATH.png if asked to; return the former as a data URI."""
    image = as_svg(figure)
    path.with_suffix(".svg").write_bytes(image)
    if png:
        save_png(figure, path.with_suffix(".png"))
    else:
        # That of an earlier report would show other numbers.
        path.with_suffix(".png").unlink(missing_ok=True)
    return _uri(image)


def as_image(figure: Figure) -> str:
    """Return the figure as a data URI."""
    return _uri(as_svg(figure))


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _of(made: Tables, workloads: list[str]) -> Tables:
    """Return the tables' rows of some workloads."""
    names = [field.name for field in fields(made) if field.name != "unlike"]
    rows = {name: table[table.workload.isin(workloads)] for name in names if len(table := getattr(made, name))}
    return replace(made, **rows)


def _draw(found: Frames, made: Tables, fitted: pd.DataFrame, trials_path: Path) -> dict[str, Figure]:
    """Return every figure there is something to draw for, in the report's order."""
    trials, points = made.trials, made.points
    if points.empty:
        return {}
    drawn = {
        "efficiency": figures.efficiency(points, trials),
        **_draw_causes(found, trials, points),
        "throughput_per_device": figures.throughput_per_device(points, trials),
        "speedup": figures.speedup(points, trials),
        "step_time": figures.step_time(metrics.step_time_spread(found.windows, trials)),
        "memory": figures.memory(points),
        "set_up": figures.set_up(metrics.phase_times(found.phases, trials)),
    }
    if len(made.ways):
        drawn["ways"] = figures.ways(made.ways)
    if len(made.compilation):
        drawn["compilation"] = figures.compilation(points, made.compilation)
    usual = _usual(fitted[fitted.workload.isin(points.workload)], points)
    if (usual.law != "").any():
        drawn["laws"] = figures.laws(points, usual)
    if points.joules_per_image.notna().any():
        drawn["energy"] = figures.energy(points, trials)
    drawn |= _draw_devices(found, trials, trials_path)
    losses = metrics.loss_curves(found.losses, trials)
    return drawn if losses.empty else drawn | {"loss_curves": figures.loss_curves(losses)}


def _draw_causes(found: Frames, trials: pd.DataFrame, points: pd.DataFrame) -> dict[str, Figure]:
    decomposed = causes.decomposed(trials)
    explained = points[causes.at_largest(points) & points.compute_scaling.notna()]
    if explained.empty:
        return {}
    drawn = {"waterfall": figures.waterfall(explained)}
    exchanged = points[points.exchange_s.notna()]
    if len(exchanged):
        drawn["overlap"] = figures.overlap(exchanged)
    named = decomposed[["trial", "own_waiting", "together", *metrics.POINT]].head(_MOST_EXAMPLES)
    ranks = found.ranks.merge(named, on="trial")
    # One process drives all devices of tf-mirrored: none of them is seen to wait.
    ranks = ranks[ranks.groupby("trial")["rank"].transform("nunique") > 1]
    return drawn if ranks.empty else drawn | {"stragglers": figures.stragglers(ranks)}


def _draw_devices(found: Frames, trials: pd.DataFrame, trials_path: Path) -> dict[str, Figure]:
    """Return the figures of single trials: of each trainer one at its largest world size that has samples."""
    sampled = trials[trials.trial.isin(found.devices.loc[found.devices["rank"].notna(), "trial"].unique())]
    if sampled.empty:
        return {}
    chosen = metrics.examples(sampled, _MOST_EXAMPLES)
    drawn = []
    for folder_name in chosen.folder_name:
        record = read_record(trials_path / folder_name)
        drawn.append(devices.timelines(record, devices.nodes(record, trials_path / folder_name)))
    samples, spans = (pd.concat(parts) for parts in zip(*drawn, strict=True))
    named = chosen[["trial", *metrics.POINT]]
    use = found.devices[found.devices.trial.isin(chosen.trial)].dropna(subset=["rank", "window"])
    return {
        "timeline": figures.timeline(samples.merge(named, on="trial"), spans),
        "device_map": figures.device_map(use.merge(named, on="trial")),
    }


def _page(
    facts: Facts, costs: Costs, trials: pd.DataFrame, points: pd.DataFrame, damaged: list[DamagedError], **parts: Any
) -> str:
    ok = trials[trials.outcome == "ok"]
    return page("report.html.j2").render(
        studies=facts.studies,
        first=facts.first,
        last=facts.last,
        environment=facts.environment,
        tables=_tables(points),
        causes=_causes(points),
        factors=causes.CAUSES,
        closure=causes.CLOSURE_TOLERANCE,
        costs=costs,
        cost_tables=_tables(metrics.costs(points, costs)) if len(points) and costs != Costs() else [],
        sampled=len(points) > 0 and points.device_busy.notna().any(),
        most_series=figures.MOST_SERIES,
        series=points.series.nunique() if len(points) else 0,
        several_nodes=len(points) > 0 and points.nodes.max() > 1,
        workloads=points.workload.nunique() if len(points) else 0,
        most_panels=_MOST_PANELS,
        captions=_CAPTIONS,
        failed=trials[trials.outcome != "ok"].to_dict("records"),
        unsteady=ok[ok.warm_up_steady == False].to_dict("records"),  # noqa: E712
        damaged=damaged,
        trial_count=len(trials),
        ok_count=len(ok),
        repeats=int(points.repeats.min()) if len(points) else 0,
        held=lambda repeats: intervals.level(intervals.coverage(repeats)),
        ratio_held=lambda repeats: intervals.level(intervals.ratio_coverage(repeats)),
        floor=answer.EFFICIENCY_FLOOR,
        least=differences.LEAST_DIFFERENCE,
        accuracy=_accuracy(ok),
        **parts,
    )


def _tables(points: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table a workload, its rows by world size and series."""
    if points.empty:
        return []
    named = metrics.headings(points)
    return [
        {
            "title": named[key],
            "rows": rows.sort_values(["world_size", "series"]).to_dict("records"),
        }
        for key, rows in points.groupby(metrics.WORK, sort=True)
    ]


def _usual(rows: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each trainer's usual way: its bare name, which comes first."""
    by = [*metrics.WORK, "trainer"]
    return rows.merge(points.groupby(by).series.min().reset_index(), on=[*by, "series"])


def _causes(points: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row a point past its reference whose parts of a step were measured."""
    if points.empty:
        return []
    rows = points[(points.world_size > points.reference_world_size) & points.compute_scaling.notna()]
    named = rows.assign(model=rows.workload.map(lambda text: text.partition(",")[0])).sort_values(
        ["model", "world_size", "series"]
    )
    found: list[dict[str, Any]] = named.to_dict("records")
    return found


def _sizes(points: pd.DataFrame, fitted: pd.DataFrame, told_apart: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row a series that was measured on several world sizes: which to take, which law describes them, and how
    small a difference between them could be seen.
    """
    if points.empty:
        return []
    recommended = laws.recommendations(points, answer.EFFICIENCY_FLOOR)
    several = recommended[recommended.measured.map(len) > 1]
    found: list[dict[str, Any]] = (
        several.merge(fitted, on=metrics.SERIES).merge(told_apart, on=metrics.SERIES).to_dict("records")
    )
    return found


def _notices(notices: pd.DataFrame, trials: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row a kind of notice: what it means, how many trials have it, and the first of them."""
    named = notices.merge(trials[["trial", "model", "series", "world_size", "repeat"]], on="trial")
    return [
        {
            "kind": meaning,
            "count": rows.trial.nunique(),
            "first": rows.head(_MOST_NOTICES).to_dict("records"),
            "more": len(rows) - _MOST_NOTICES,
        }
        for kind, meaning in _NOTICES.items()
        if len(rows := named[named.kind == kind])
    ]


def _accuracy(ok: pd.DataFrame) -> list[dict[str, Any]]:
    measured = ok[ok.test_accuracy.notna()]
    grouped = measured.groupby(["workload", "series", "world_size"]).test_accuracy
    return [
        dict(zip(("workload", "series", "world_size"), key, strict=True)) | {"low": some.min(), "high": some.max()}
        for key, some in grouped
    ]


# So many workloads are drawn: past that a figure cannot be read.
_MOST_PANELS = 6

# So many single trials are drawn.
_MOST_EXAMPLES = 6
_MOST_NOTICES = 4
_NOTICES = {
    "throttled": "ran on a throttled device: it computed slower than it can",
    "shared": "shared a device or its host with other work",
    "busy before": "began on a device that was at work for somebody else",
    "quota": "was held up by a CPU quota: it computed slower than its CPUs can",
    "stalled": "ran on a host whose processes waited for something else than processors",
    "stolen": "had processor time taken by the hypervisor",
    "lost": "lost a device's telemetry while it ran",
    "clock": "came out otherwise by the device's clock than by the host's: not to be trusted",
    "error": "had a device report an error",
    "telemetry": "has no telemetry of a node",
    "without": "stopped after the timed windows, which stand, and did not measure what was to follow",
    "short": "ended after too short a time to be believed",
    "mixed": "ran on devices of different models: the slowest set the pace of all",
    "shared cores": "had ranks share the hardware threads of a core: its efficiency is in part that of hyper-threading",
    "in turns": "had its devices compute one after the other, as XLA does on a CPU: what reads as slower computing at "
    "more devices is that, and no scaling",
    "far from GPU": "had ranks on CPUs of another NUMA node than their GPU: copies to it take the longer way",
    "ranks": "left reports of some devices alone",
    "changed": "changed in step time while timed",
    "drifted": "drifted in step time while timed",
    "warming up": "had not warmed up: step time still fell while timed, and its speed is understated. Raise "
    "measurement.warm_up_min_s",
    "windows apart": "had windows far from the others",
    "unlearned": "learned nothing that shows, as from images of noise or in too few steps; their speed counts",
    "repeat apart": "came out far from the other repeats of the point",
}

_CAPTIONS = {
    "efficiency": "Throughput per device over that at the reference, the smallest world size that all trainers "
    "measured. 100 % means that no device's time is lost to scaling.",
    "waterfall": "What every device could deliver, were it as at the reference, and what takes it away: "
    "slower computing, load imbalance between ranks, waiting for whichever rank is late, communication that is not "
    "hidden behind computing, and input. Not explained: what the factors' product lacks to the efficiency. "
    "At the largest world size, the factors of the table.",
    "overlap": "Medians over repeats at the largest world size. Grey: as many bytes as a step exchanges, and no step. "
    "Colour: the step with the exchange less that of the slowest rank without it. Where the colour is longer, "
    "exchanging beside computing is slower than alone: both want the same processors, memory or links.",
    "stragglers": "The trials of median efficiency. Local steps, timed one by one, all ranks beginning together; last: "
    "how often a rank's was the longest. Lost to waiting: each step's slowest rank against the rank that is slowest "
    "for long. Lost to stepping together: that and lasting differences and all communication that is not hidden.",
    "collectives": "scalestudy collectives: medians over repeats of the slowest rank. Bus bandwidth is size / time × "
    "2 (n − 1) / n: what every link of a ring carries. Sizes in powers of 1024.",
    "throughput_per_device": "The same in absolute terms: a trainer that scales badly from a high start "
    "may still be the faster one.",
    "speedup": "Throughput over that at the reference, the smallest world size that all trainers measured; "
    "the dashed line is where every added device counts in full.",
    "step_time": "Seconds a step of the slowest rank, window by window, over all repeats.",
    "memory": "Median over repeats of the fullest process: on GPU the device allocator's peak in the timed windows, on "
    "CPU the resident set's since the start. A line above a bar is the peak of the warm-up, where it is larger: a "
    "device needs so much. A tf-mirrored process holds all devices of its node.",
    "set_up": "Median over repeats, slowest rank. Framework import, meeting the other ranks and connecting to them, "
    "building model and input, the first step (with compilation), and the warm-up.",
    "ways": "Median throughput over that of the same trainer with nothing changed, on as many devices; "
    "an interval that reaches across the line shows no difference.",
    "compilation": "Seconds so far over steps so far, on the smallest world size: tracing, compiling and capturing are "
    "in the first step. Caches of compiled code are empty at every start.",
    "laws": "Measured medians, the law that describes them, and by how much it misses the largest size when it is "
    "fitted without it. Past the largest size the band is as wide as that of every law that fits as well. It knows of "
    "no limit that was not reached yet: a network that is full, or an exchange that no longer hides behind computing.",
    "energy": "Energy of the trial's GPUs, or on CPU of its hosts' processors and memory (RAPL), over the images of "
    "the timed windows.",
    "timeline": "The first repeat of each trainer at its largest world size. On GPU busy is the share of time in which "
    "any kernel ran, on CPU that in which the rank's own CPUs did.",
    "device_map": "The same trials. A rank that waits for others burns a CPU core as if it worked where its framework "
    "spins; a dark row on GPU is a rank that idles.",
    "loss_curves": "All trainers start from the same parameters and see the same shards, "
    "so the curves of one world size should lie together.",
}
