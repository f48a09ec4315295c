"""Records to a report: results.csv, results.parquet, figures/ and one self-contained report.html."""

import base64
import io
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from scalestudy.analysis import answer, figures, metrics
from scalestudy.analysis.frames import Frames, frames, read_records, record_files
from scalestudy.trainers.record import Record
from scalestudy.trainers.trainer import series_name


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where the report is, and which records could not be read."""

    html: Path
    damaged: list[Path]


def write_report(out: Path) -> Written:
    """Analyse a study's folder; raises ValueError where it holds no record."""
    damaged: list[Path] = []
    facts = _Facts()
    # One record in memory at a time: the frames keep what the report needs.
    found = frames(facts.seen(record) for record in read_records(record_files(out), damaged))
    if found.trials.empty:
        raise ValueError(f"{out}: every record there is damaged, the first is {damaged[0]}; run the study again")
    trials = metrics.with_efficiency(metrics.with_throughput(found.trials))
    points = metrics.points(trials)
    results = metrics.results(trials)
    results.to_csv(out / "results.csv", index=False)
    results.to_parquet(out / "results.parquet", index=False)

    (out / "figures").mkdir(exist_ok=True)
    shown = metrics.most_measured(points, _MOST_PANELS) if len(points) else []
    drawn = {
        name: _save(figure, out / "figures" / name)
        for name, figure in _draw(
            found, trials[trials.workload.isin(shown)], points[points.workload.isin(shown)]
        ).items()
    }
    html = out / "report.html"
    html.write_text(_render(facts, trials, points, drawn, damaged))
    return Written(html=html, damaged=damaged)


class _Facts:
    """What the report says of where the records come from, gathered as they pass by."""

    def __init__(self) -> None:
        self.studies: dict[str, str] = {}
        self.environment: dict[str, dict[str, None]] = {}
        self.first: str = ""
        self.last: str = ""

    def seen(self, record: Record) -> Record:
        """Note a record and hand it on."""
        where = record.environment
        self.studies.setdefault(where.study, where.study_name)
        self.first = min(filter(None, [self.first, where.started_at]))
        self.last = max(self.last, where.started_at)
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
        for report in record.reports:
            if software := report.software:
                self._note("Python", software.python)
                for name, version in software.versions.items():
                    if name != "scalestudy":
                        self._note(name, version)
                pinned = ", ".join(map(str, software.cpus))
                settings = ", ".join(f"{name} {count}" for name, count in software.settings.items())
                # By its place on its node: a thousand ranks of equal nodes are a few lines.
                place = f"local rank {report.rank.local_rank} of {report.rank.local_world_size}"
                self._note(
                    f"{series_name(record.trial)}: CPUs and settings", f"{place}: pinned to CPU {pinned}; {settings}"
                )
                for name, value in software.variables.items():
                    # Differs by trial and names ports: who talks to whom, not how.
                    if name != "TF_CONFIG":
                        self._note("environment variable", f"{name}={value}")
        return record

    def _note(self, subject: str, value: str) -> None:
        self.environment.setdefault(subject, {})[value] = None


def _save(figure: Figure, path: Path) -> str:
    """Write PATH.png and PATH.svg; return the latter as a data URI."""
    figure.savefig(path.with_suffix(".png"), dpi=110)
    # The layout is found and costs as much as the drawing.
    figure.set_layout_engine("none")
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    path.with_suffix(".svg").write_bytes(svg.getvalue())
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


def _draw(found: Frames, trials: pd.DataFrame, points: pd.DataFrame) -> dict[str, Figure]:
    """Return every figure there is something to draw for, in the report's order."""
    if points.empty:
        return {}
    drawn = {
        "efficiency": figures.efficiency(points),
        "throughput_per_device": figures.throughput_per_device(points),
        "speedup": figures.speedup(points),
        "step_time": figures.step_time(metrics.step_time_spread(found.windows, trials)),
        "memory": figures.memory(points),
        "set_up": figures.set_up(metrics.phase_times(found.phases, trials)),
    }
    compared = metrics.ways(points, trials)
    if len(compared):
        drawn["ways"] = figures.ways(compared)
    compiled = metrics.compilation(points, trials)
    if len(compiled):
        drawn["compilation"] = figures.compilation(points, compiled)
    losses = metrics.loss_curves(found.losses, trials)
    return drawn if losses.empty else drawn | {"loss_curves": figures.loss_curves(losses)}


def _render(
    facts: _Facts, trials: pd.DataFrame, points: pd.DataFrame, drawn: dict[str, str], damaged: list[Path]
) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("scalestudy.analysis").joinpath("report.html.j2").read_text())
    ok = trials[trials.outcome == "ok"]
    return template.render(
        studies=facts.studies,
        first=facts.first,
        last=facts.last,
        environment=facts.environment,
        answers=answer.headline(points, metrics.comparisons(points, trials), metrics.compilation(points, trials))
        if len(points)
        else [],
        tables=_tables(points),
        most_series=figures.MOST_SERIES,
        series=points.series.nunique() if len(points) else 0,
        several_nodes=len(points) > 0 and points.nodes.max() > 1,
        figures=drawn,
        workloads=points.workload.nunique() if len(points) else 0,
        most_panels=_MOST_PANELS,
        captions=_CAPTIONS,
        failed=trials[trials.outcome != "ok"].to_dict("records"),
        unsteady=ok[ok.warm_up_steady == False].to_dict("records"),  # noqa: E712
        damaged=damaged,
        trial_count=len(trials),
        ok_count=len(ok),
        repeats=int(points.repeats.min()) if len(points) else 0,
        coverage=metrics.coverage,
        floor=answer.EFFICIENCY_FLOOR,
        accuracy=_accuracy(ok),
    )


def _tables(points: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table a workload, its rows by world size and series."""
    if points.empty:
        return []
    return [
        {
            "title": f"{key[0]}, {key[1]} scaling",
            "rows": rows.sort_values(["world_size", "series"]).to_dict("records"),
        }
        for key, rows in points.groupby(metrics.WORK, sort=True)
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

_CAPTIONS = {
    "efficiency": "Throughput per device over that at the smallest world size measured. "
    "100 % means that no device's time is lost to scaling.",
    "throughput_per_device": "The same in absolute terms: a trainer that scales badly from a high start "
    "may still be the faster one.",
    "speedup": "Throughput over that at the smallest world size measured; "
    "the dashed line is where every added device counts in full.",
    "step_time": "Seconds a step of the slowest rank, window by window, over all repeats.",
    "memory": "Median over repeats of the fullest process: on GPU the device allocator's peak, on CPU the resident "
    "set. A tf-mirrored process holds all devices of its node.",
    "set_up": "Median over repeats, slowest rank. Framework import, meeting the other ranks, building model and input, "
    "the first step (with compilation), and the warm-up.",
    "ways": "Median throughput over that of the same trainer with nothing changed, on as many devices; "
    "an interval that reaches across the line shows no difference.",
    "compilation": "Seconds so far over steps so far, on the smallest world size: tracing, compiling and capturing are "
    "in the first step. Caches of compiled code are empty at every start.",
    "loss_curves": "All trainers start from the same parameters and see the same shards, "
    "so the curves of one world size should lie together.",
}
