"""Metrics to figures. No arithmetic on what was measured is done here, only on where it is drawn.

A trainer has one colour and one marker in every figure (Okabe & Ito 2008: told apart by the colour-blind); the ways it
was run in are told apart by the dashes of its lines and the hatching of its bars.
"""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

# First, so that it is imported as canvas says.
from scalestudy.analysis.canvas import Figure, style  # isort: skip
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogFormatter,
    LogFormatterMathtext,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from scalestudy.analysis import intervals
from scalestudy.analysis.frames import PHASES
from scalestudy.analysis.metrics import POINT, SERIES, WORK, devices, headings
from scalestudy.analysis.shares import off_by, share

COLOURS = {
    "torch-ddp": "#D55E00",
    "tf-multiworker": "#0072B2",
    "tf-mirrored": "#56B4E9",
    "horovod-torch": "#E69F00",
    "horovod-tf": "#009E73",
}
MARKERS = {
    "torch-ddp": "o",
    "tf-multiworker": "s",
    "tf-mirrored": "D",
    "horovod-torch": "^",
    "horovod-tf": "v",
}
_PHASE_COLOURS = dict(zip(PHASES, ["#332288", "#88CCEE", "#44AA99", "#DDCC77", "#CC6677"], strict=True))
_PHASE_NAMES = {"first_step": "first step (compiles)", "warm_up": "warm-up"}
_CAUSE_NAMES = {
    "compute_scaling": "slower\ncomputing",
    "load_balance": "load im-\nbalance",
    "waiting": "waiting,\njitter",
    "communication": "commu-\nnication",
    "input": "input",
    "unexplained": "not ex-\nplained",
}
_LOST, _WON = "#AA4499", "#117733"
_IDEAL: dict[str, Any] = {"color": "#777777", "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
_ON_WHITE: dict[str, Any] = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
# How wide the repeats of a point are spread, in octaves of the world size.
_DOTS = 0.16
_COLUMNS = 3
# Of more series the usual way of each trainer is drawn: more lines in a panel cannot be told apart.
MOST_SERIES = 8
_MOST_TRAINER_PANELS = 9
# Of more values in a heat map none is written out.
_MOST_WRITTEN = 120
_MOST_POINTS = 40
_MOST_SWEPT = 4
_MOST_RANKS = 16
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_EXECUTION_DASHES = {"eager": (0, (1, 1.5)), "graph": (0, (5, 2)), "compiled": "-"}


def speedup(points: pd.DataFrame, trials: pd.DataFrame) -> Figure:
    """Draw speedup over the reference with the ideal line."""

    def ideal(axes: Axes, rows: pd.DataFrame) -> None:
        sizes = sorted(rows.world_size.unique())
        reference = rows.reference_world_size.min()
        axes.plot(sizes, [size / reference for size in sizes], label="ideal", **_IDEAL)
        axes.set_ylim(bottom=0)

    return _scaling(
        _scaled(points),
        trials,
        "speedup",
        title="Speedup: how much faster than the reference",
        label=lambda rows: f"throughput over that of {devices(rows.reference_world_size.min())}",
        written=lambda value: f"{value:.2f}×",
        decorate=ideal,
    )


def efficiency(points: pd.DataFrame, trials: pd.DataFrame) -> Figure:
    """Draw efficiency with the ideal line."""

    def full(axes: Axes, rows: pd.DataFrame) -> None:
        axes.axhline(1, label="ideal", **_IDEAL)
        axes.set_ylim(0, max(1.12, 1.05 * rows[["efficiency", "efficiency_high"]].max().max()))
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    return _scaling(
        _scaled(points),
        trials,
        "efficiency",
        title="Scaling efficiency: what every device still delivers",
        label=lambda rows: f"throughput per device (% of {devices(rows.reference_world_size.min())})",
        written=lambda value: f"{value:.0%}",
        decorate=full,
    )


def waterfall(points: pd.DataFrame) -> Figure:
    """Draw how efficiency comes down from 100 % to what was measured, a bar a cause, of every point given."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        row = rows.iloc[0]
        left, steps = 1.0, []
        for cause, name in _CAUSE_NAMES.items():
            # One process drives all devices: none of them is seen to wait.
            factor = 1.0 if pd.isna(row[cause]) else row[cause]
            steps.append((name, left, left * factor))
            left *= factor
        axes.bar(0, 1, color="#BBBBBB", width=0.7)
        for place, (_, before, after) in enumerate(steps, start=1):
            colour = _LOST if after < before else _WON
            axes.bar(place, before - after, bottom=after, color=colour, width=0.7)
            axes.plot([place - 1.35, place + 0.35], [before, before], color="#555555", linewidth=0.8)
            axes.annotate(
                # Not -0.0.
                f"{round(100 * (after - before), 1) + 0.0:+.1f}",
                (place, max(before, after)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.bar(len(steps) + 1, left, color=COLOURS[row.trainer], width=0.7)
        for place, value in ((0, 1.0), (len(steps) + 1, left)):
            axes.annotate(
                f"{value:.0%}",
                (place, value),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                fontweight="bold",
            )
        ends = [devices(size).replace(" ", "\n") for size in (row.reference_world_size, row.world_size)]
        names = [ends[0], *_CAUSE_NAMES.values(), ends[1]]
        axes.set_xticks(range(len(names)), names, fontsize=8.5)
        axes.set_ylim(0, 1.12 * max(1.0, *(max(step[1:]) for step in steps)))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("throughput per device")
        axes.grid(visible=False, axis="x")

    title = "Where the time goes: what takes efficiency from 100 % down to what was measured (in points of 100)"
    return _panels(points, title, draw, by=("series",), width=5.6)


def overlap(points: pd.DataFrame) -> Figure:
    """Draw what the exchange takes alone and what it adds to a step, at each series' largest world size."""
    largest = points[points.world_size == points.groupby(WORK).world_size.transform("max")]
    looks = _looks(largest)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        present = _series(rows)[::-1]
        by_series = rows.set_index("series")
        for place, series in enumerate(present):
            row = by_series.loc[series]
            axes.barh(place + 0.2, 1e3 * row.exchange_s, height=0.36, color="#BBBBBB", label="the exchange alone")
            axes.barh(
                place - 0.2,
                1e3 * max(row.exposed_s, 0),
                height=0.36,
                color=looks[series].colour,
                hatch=looks[series].hatch,
                edgecolor="white",
            )
            longest = 1e3 * max(row.exchange_s, row.exposed_s)
            said = f"{share(row.hidden)} hidden" if row.hidden >= 0 else f"none hidden: {1 - row.hidden:.1f}×"
            if row.hidden > 1:
                said = "not shown: adds nothing"
            axes.annotate(said, (longest, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(present)), map(_wrapped, present), fontsize=8.5)
        axes.set_xlim(0, 1.6e3 * rows[["exchange_s", "exposed_s"]].max().max())
        axes.set_xlabel(f"ms a step, on {devices(rows.world_size.iloc[0])}")
        axes.grid(visible=False, axis="y")

    lines = int(largest.groupby(WORK).series.nunique().max())
    title = "Communication: how much hides behind computing (colour: what it adds to a step)"
    return _panels(largest, title, draw, width=5.6, height=max(2.2, 1.1 + 0.5 * lines))


def stragglers(ranks: pd.DataFrame) -> Figure:
    """Draw how every rank steps alone in one trial, which is the last how often, and what jitter alone would cost."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        colour = COLOURS[rows.trainer.iloc[0]]
        # The slowest are what is looked for.
        rows = rows.sort_values("p50_s").tail(_MOST_RANKS).sort_values("rank")
        slowest = rows["last"].idxmax()
        for place, row in enumerate(rows.itertuples()):
            box = {
                "whislo": 1e3 * row.p05_s,
                "q1": 1e3 * row.p25_s,
                "med": 1e3 * row.p50_s,
                "q3": 1e3 * row.p75_s,
                "whishi": 1e3 * row.p95_s,
            }
            axes.bxp(
                [box],
                positions=[place],
                widths=0.5,
                showfliers=False,
                patch_artist=True,
                boxprops={"facecolor": colour if row.Index == slowest else "#D9D9D9", "linewidth": 0.8},
                medianprops={"color": "black", "linewidth": 1.5},
            )
            axes.annotate(
                f"last in\n{row.last:.0%}",
                (place, 1e3 * row.p95_s),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                fontweight="bold" if row.Index == slowest else "normal",
            )
        several = rows.host.nunique() > 1
        names = [f"rank {row.rank}\n{row.host}" if several else f"rank {row.rank}" for row in rows.itertuples()]
        axes.set_xticks(range(len(names)), names, fontsize=8.5, rotation=90 if several and len(names) > 4 else 0)
        axes.set_ylim(0, 1.3e3 * rows.p95_s.max())
        first = rows.iloc[0]
        lost = share(1 - first.own_waiting, 1), share(1 - first.together, 1)
        axes.set_xlabel(f"lost to waiting {lost[0]}, to all of stepping together {lost[1]}", fontsize=9)
        axes.set_ylabel("step alone (ms)")
        axes.grid(visible=False, axis="x")

    named = ranks.assign(panel=ranks.series + ", " + ranks.world_size.map(devices))
    title = (
        "Stragglers: which rank the others wait for (box: quartiles, whiskers: 5–95 % of steps with nothing exchanged)"
    )
    return _panels(named, title, draw, by=("panel",), width=5.0)


def throughput_per_device(points: pd.DataFrame, trials: pd.DataFrame) -> Figure:
    """Draw throughput per device, where absolute speed and loss by scaling show together."""

    def from_zero(axes: Axes, rows: pd.DataFrame) -> None:
        axes.set_ylim(0, 1.15 * rows[["throughput_per_device", "throughput_per_device_high"]].max().max())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))

    return _scaling(
        points,
        trials.assign(throughput_per_device=trials.throughput_images_per_s / trials.world_size),
        "throughput_per_device",
        title="Throughput per device: which trainer is faster",
        label=lambda _: "images/s per device",
        written=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
        decorate=from_zero,
    )


def step_time(spread: pd.DataFrame) -> Figure:
    """Draw the distribution of step times over windows: box of quartiles, whiskers at 5 and 95 %."""
    spread, looks = _readable(spread), _looks(spread)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        sizes = sorted(rows.world_size.unique())
        present = _series(rows)
        for offset, series in _dodged(present):
            look = looks[series]
            for row in rows[rows.series == series].itertuples():
                box = {
                    "whislo": 1e3 * row.p05_s,
                    "q1": 1e3 * row.p25_s,
                    "med": 1e3 * row.p50_s,
                    "q3": 1e3 * row.p75_s,
                    "whishi": 1e3 * row.p95_s,
                }
                axes.bxp(
                    [box],
                    positions=[sizes.index(row.world_size) + offset],
                    widths=0.6 / len(present),
                    showfliers=False,
                    patch_artist=True,
                    boxprops={"facecolor": look.colour, "edgecolor": "black", "linewidth": 0.8, "hatch": look.hatch},
                    medianprops={"color": "black", "linewidth": 1.5},
                )
        for series in present:
            look = looks[series]
            # For the legend; a bar of no height would be a line at the bottom.
            box = {"facecolor": look.colour, "hatch": look.hatch, "edgecolor": "black", "label": series}
            axes.add_patch(Rectangle((0, 0), 0, 0, **box))
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("world size (devices)")
        axes.set_ylabel("step time (ms)")

    return _panels(spread, "Step time: how steady are the windows (box: quartiles, whiskers: 5–95 %)", draw)


def memory(points: pd.DataFrame) -> Figure:
    """Draw the peak memory of the fullest process, and as a line that of the warm-up where it is larger."""
    points, looks = _readable(points), _looks(points)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        mebibytes = rows.assign(peak_mib=rows.peak_memory_bytes / 2**20)
        present = _series(rows)
        sns.barplot(
            mebibytes,
            x="world_size",
            y="peak_mib",
            hue="series",
            hue_order=present,
            palette={series: looks[series].colour for series in present},
            errorbar=None,
            saturation=1,
            ax=axes,
        )
        upright = len(rows) > 6
        for series, container in zip(present, list(axes.containers), strict=False):
            warm_up_mib = rows[rows.series == series].sort_values("world_size").warm_up_peak_bytes / 2**20
            for bar, peak_mib in zip(container, warm_up_mib, strict=False):
                bar.set(hatch=looks[series].hatch, edgecolor="white")
                axes.hlines(peak_mib, bar.get_x(), bar.get_x() + bar.get_width(), color="black", linewidth=1.5)
            axes.bar_label(
                container,  # type: ignore[arg-type]
                fmt="{:,.0f}",
                padding=2,
                fontsize=8.5,
                rotation=90 if upright else 0,
            )
        axes.margins(y=0.25 if upright else 0.12)
        axes.set_xlabel("world size (devices)")
        axes.set_ylabel("peak memory of a process (MiB)")

    return _panels(points, "Memory: what the fullest process needed", draw)


def set_up(phases: pd.DataFrame) -> Figure:
    """Draw what passes before training is steady, phase by phase."""
    # Every bar is named: more of them than lines can be told apart.
    phases = _readable(phases, most=2 * MOST_SERIES)
    names = phases.series + ", " + phases.world_size.map(devices).str.replace(" ", "\N{NO-BREAK SPACE}")
    phases = phases.assign(bar=names.map(_wrapped))

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        bars = rows.sort_values(["series", "world_size"], ascending=False).bar.unique()
        left = [0.0] * len(bars)
        for phase in PHASES:
            here = rows[rows.phase == phase].set_index("bar").seconds.reindex(bars, fill_value=0)
            axes.barh(bars, here, left=left, color=_PHASE_COLOURS[phase], label=_PHASE_NAMES.get(phase, phase))
            left = [start + length for start, length in zip(left, here, strict=True)]
        axes.tick_params(axis="y", labelsize=8.5)
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")

    bars, lines = phases.groupby(WORK).bar.nunique().max(), phases.bar.str.count("\n").max() + 1
    title = "Set-up: where the time goes before training is steady"
    return _panels(phases, title, draw, width=5.6, height=max(3.6, 1.2 + (0.1 + 0.14 * lines) * bars))


def ways(compared: pd.DataFrame) -> Figure:
    """Draw how fast every way to run a trainer is against its usual one, at the largest world size of each workload."""
    largest = compared[compared.world_size == compared.groupby(WORK).world_size.transform("max")]
    looks = _looks(largest)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        present = _series(rows)[::-1]
        by_series = rows.set_index("series")
        for place, series in enumerate(present):
            row, look = by_series.loc[series], looks[series]
            axes.errorbar(
                row.ratio,
                place,
                xerr=[
                    [np.nan_to_num(max(row.ratio - row.ratio_low, 0))],
                    [np.nan_to_num(max(row.ratio_high - row.ratio, 0))],
                ],
                color=look.colour,
                marker=look.marker,
                markersize=7,
                markerfacecolor=look.colour if row.shown or series == row.usual else "white",
                capsize=3,
                linewidth=1.8,
            )
            written = "usual" if series == row.usual else f"{row.ratio:.2f}×"
            axes.annotate(
                written,
                (row.ratio, place),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                bbox=_ON_WHITE,
            )
        axes.axvline(1, **_IDEAL)
        axes.set_yticks(range(len(present)), map(_wrapped, present), fontsize=8.5)
        axes.set_ylim(-0.6, len(present) - 0.2)
        axes.set_xlabel(f"throughput over the usual way's, on {devices(rows.world_size.iloc[0])}")
        axes.margins(x=0.12)

    rows = int(largest.groupby(WORK).series.nunique().max())
    title = "Ways to run a trainer: what changing it brings (right: faster; filled: shown; bars: 95 % interval)"
    return _panels(largest, title, draw, width=5.6, height=max(2.4, 1.1 + 0.42 * rows))


def changes(compared: pd.DataFrame, tolerance: float) -> Figure:
    """Draw each point's throughput in one folder over that in another, with the tolerance shaded."""
    looks = _looks(compared)
    rows = compared.sort_values(["workload", "series", "world_size"], ascending=False).head(_MOST_POINTS)
    with style():
        figure = Figure(figsize=(9.5, 1.5 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows.itertuples()):
            look = looks[row.series]
            low, high = np.nan_to_num([row.ratio - row.ratio_low, row.ratio_high - row.ratio]).clip(0)
            axes.errorbar(
                row.ratio,
                place,
                xerr=[[low], [high]],
                color=look.colour,
                marker=look.marker,
                markerfacecolor=look.colour if row.verdict != "no difference shown" else "white",
                markersize=7,
                capsize=3,
                linewidth=1.8,
            )
        axes.axvspan(1 - tolerance, 1, color="#777777", alpha=0.15, linewidth=0)
        axes.axvline(1, **_IDEAL)
        names = [f"{row.workload.split(',')[0]}, {row.series}, {devices(row.world_size)}" for row in rows.itertuples()]
        axes.set_yticks(range(len(rows)), names, fontsize=8.5)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(f"throughput of the new over the base's (shaded: within the tolerance of {tolerance:.1%})")
        sns.despine(ax=axes)
        title = "What changed: right of the line is faster (filled: shown; bars: 95 % interval)"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    return figure


def compilation(points: pd.DataFrame, compared: pd.DataFrame) -> Figure:
    """Draw the mean step time so far, the first step included, at the smallest world size, a panel a trainer.

    A mode that prepares itself starts high and has paid for itself where it crosses eager's line.
    """
    by = [*WORK, "trainer", "options", "world_size"]
    smallest = compared[compared.world_size == compared.groupby([*WORK, "trainer"]).world_size.transform("min")]
    panels = smallest[by].drop_duplicates().head(_MOST_TRAINER_PANELS)
    rows = points.merge(panels, on=by)
    crossings = smallest.merge(panels, on=by)
    most = crossings[crossings.shown & (crossings.ratio > 1)].break_even_steps.max()
    steps = np.geomspace(1, 10 ** np.ceil(np.log10(max(1e4, 10 * np.nan_to_num(most)))), 200)

    def draw(axes: Axes, group: pd.DataFrame) -> None:
        colour = COLOURS[group.trainer.iloc[0]]
        here = crossings.merge(group[[*by, "execution"]], on=[*by, "execution"])
        slower = set(here[here.shown & (here.ratio < 1)].execution)
        ends = []
        for row in group.sort_values("execution").itertuples():
            mean_ms = 1e3 * (row.first_step_s + (steps - 1) * row.step_time_s) / steps
            axes.plot(steps, mean_ms, color=colour, linestyle=_EXECUTION_DASHES[row.execution], linewidth=1.8)
            never = ",\nnever pays" if row.execution in slower else ""
            ends.append((mean_ms[-1], f"{row.execution} {1e3 * row.step_time_s:.3g} ms{never}"))
        axes.set_xscale("log")
        axes.set_yscale("log")
        for row in here[here.shown & (here.ratio > 1) & (here.break_even_steps > 1)].itertuples():
            at = 1e3 * (row.first_step_s + (row.break_even_steps - 1) * row.step_time_s) / row.break_even_steps
            axes.plot(row.break_even_steps, at, marker="o", color="black", markersize=5, zorder=5)
            axes.annotate(
                f"{row.execution} has paid after\n{row.break_even_steps:,.0f} steps",
                (row.break_even_steps, at),
                xytext=(6, 8),
                textcoords="offset points",
                fontsize=8.5,
                bbox=_ON_WHITE,
            )
        at = 0.0
        for end, text in sorted(ends):
            at = max(end, at * 1.5)
            axes.annotate(
                text,
                (steps[-1], at),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=colour,
            )
        axes.set_xlabel(f"steps taken, on {devices(group.world_size.iloc[0])}")
        axes.set_ylabel("mean step time so far (ms)")

    title = "Compilation: when a slower first step has paid for itself (the first step is in the mean)"
    return _panels(rows, title, draw, width=5.0, by=("trainer", "options"))


def laws(points: pd.DataFrame, fitted: pd.DataFrame) -> Figure:
    """Draw what was measured, the law that describes it, and how far it may be believed; series without a law are not.

    Needs one row at least whose law is known.
    """
    described = fitted[fitted.law != ""]
    rows = _readable(points.merge(described[[*WORK, "trainer", "series"]], on=[*WORK, "trainer", "series"]))

    def draw(axes: Axes, group: pd.DataFrame) -> None:
        first = group.sort_values("world_size").iloc[0]
        colour = COLOURS[first.trainer]
        [law] = described[(described[[*WORK, "series"]] == first[[*WORK, "series"]]).all(axis=1)].itertuples()
        curve, largest = law.predictions, group.world_size.max()
        past = curve[curve.world_size >= largest]
        for dashes, part, label in (
            ("-", curve[curve.world_size <= largest], None),
            ((0, (2, 2)), past if len(past) > 1 else past[:0], None),
        ):
            axes.fill_between(part.world_size, part.low, part.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(part.world_size, part.throughput, color=colour, linestyle=dashes, linewidth=1.4, label=label)
        axes.errorbar(
            group.world_size,
            group.throughput_images_per_s,
            yerr=[
                (group.throughput_images_per_s - group.throughput_low).clip(lower=0).fillna(0),
                (group.throughput_high - group.throughput_images_per_s).clip(lower=0).fillna(0),
            ],
            color="black",
            marker=MARKERS[first.trainer],
            markersize=5,
            linestyle="none",
            capsize=3,
        )
        per_device = first.throughput_images_per_s / first.world_size
        axes.plot(curve.world_size, curve.world_size * per_device, **_IDEAL)
        edge = law.devices_per_node + 0.5
        if first.world_size < edge < largest:
            axes.axvline(edge, color="#777777", linewidth=0.8, linestyle=":")
            axes.annotate(
                "one node │ several",
                (edge, 0.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=8,
                color="#555555",
                bbox=_ON_WHITE,
            )
        said = [law.law, f"without {devices(law.left_out_size)}: off by {off_by(abs(law.left_out_error), 1)}"]
        if law.reach == largest:
            said.append(f"nothing said past {devices(largest)}:")
        if law.why_no_further:
            said += textwrap.wrap(
                law.why_no_further if law.reach == largest else f"not further: {law.why_no_further}", 40
            )
        axes.annotate(
            "\n".join(said),
            (0.03, 0.97),
            xycoords="axes fraction",
            va="top",
            fontsize=8.5,
            color=colour,
            bbox=_ON_WHITE,
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        # Room for the words above the curve, which begins at the lower left.
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * (top / bottom) ** 0.25)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("world size (devices)")
        axes.set_ylabel("images/s")

    title = "Scaling laws: where it goes from here (dotted: past what was measured; grey: ideal; bands: 95 % interval)"
    return _panels(rows, title, draw, by=("series",), width=5.0)


def energy(points: pd.DataFrame, trials: pd.DataFrame) -> Figure:
    """Draw joules per image, where an added device that saves no time shows as energy wasted."""

    def from_zero(axes: Axes, rows: pd.DataFrame) -> None:
        axes.set_ylim(0, 1.15 * rows[["joules_per_image", "joules_per_image_high"]].max().max())

    return _scaling(
        points[points.joules_per_image.notna()],
        trials,
        "joules_per_image",
        title="Energy per image: what it takes to train on more devices",
        label=lambda rows: f"J per image ({'GPUs' if rows.device.iloc[0] == 'gpu' else 'processors and memory'})",
        written=lambda value: f"{value:.3g}",
        decorate=from_zero,
    )


def timeline(samples: pd.DataFrame, spans: pd.DataFrame) -> Figure:
    """Draw what every rank's device did from start to end of one trial, the phases shaded; power where it is known."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        colour = COLOURS[rows.trainer.iloc[0]]
        for span in spans[spans.trial == rows.trial.iloc[0]].itertuples():
            if span.phase in _PHASE_COLOURS:
                name = _PHASE_NAMES.get(span.phase, span.phase)
                axes.axvspan(span.start_s, span.end_s, color=_PHASE_COLOURS[span.phase], alpha=0.3, lw=0, label=name)
        ranks = rows.groupby(["rank", "device_name"])
        for _, line in ranks:
            axes.plot(line.seconds, line.value, color=colour, linewidth=1.0, alpha=max(0.25, 0.9 / len(ranks) ** 0.5))
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds since the trial's start")
        if rows.quantity.iloc[0] == "busy":
            axes.set_ylim(0, 105)
            axes.set_ylabel("device busy (%)")
        else:
            axes.set_ylim(bottom=0)
            axes.set_ylabel("power of a device (W)")

    named = samples.assign(panel=samples.series + ", " + samples.world_size.map(devices) + ", " + samples.quantity)
    title = "Devices over time: are they at work when they should be (a line a rank; white: the timed windows)"
    return _panels(named, title, draw, by=("panel",))


def device_map(use: pd.DataFrame) -> Figure:
    """Draw how busy every rank's device was in every window of one trial: which rank idles."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        # Not pivot_table: it would leave out a device that told nothing, which stays blank.
        busy = rows.assign(percent=100 * rows.busy, window=rows.window.astype(int) + 1).pivot(
            index=["rank", "host", "device_name"], columns="window", values="percent"
        )
        busy.index = [f"rank {rank:.0f}\n{device}" for rank, _, device in busy.index]
        written = busy.size <= _MOST_WRITTEN
        sns.heatmap(
            busy,
            vmin=0,
            vmax=100,
            cmap="cividis",
            annot=written,
            fmt=".0f",
            annot_kws={"fontsize": 8},
            cbar_kws={"label": "device busy (%)"},
            # Seaborn makes a canvas for each label, to see whether they overlap.
            xticklabels=False,
            yticklabels=False,
            ax=axes,
        )
        windows, ranks = slice(0, None, -(-busy.shape[1] // 10)), slice(0, None, max(1, len(busy) // 16))
        axes.set_xticks(np.arange(busy.shape[1])[windows] + 0.5, busy.columns[windows])
        axes.set_yticks(np.arange(len(busy))[ranks] + 0.5, busy.index[ranks], fontsize=8)
        axes.set_xlabel("timed window")
        axes.set_ylabel("")

    named = use.assign(panel=use.series + ", " + use.world_size.map(devices))
    most = int(named.groupby([*WORK, "panel"])["rank"].nunique().max())
    title = "Which rank idles: how busy its device was, window by window (dark: idle)"
    return _panels(named, title, draw, by=("panel",), height=max(2.2, 1.4 + 0.35 * min(most, 16)), width=5.2)


def collectives(points: pd.DataFrame, fitted: pd.DataFrame) -> Figure:
    """Draw seconds and bus bandwidth of an all-reduce over the size of its message, a row a number of devices."""
    line = [column for column in fitted.columns if column in points.columns]
    placed = points.groupby(["world_size", "devices_per_node"], sort=True)
    panels = list(placed)[-_MOST_SWEPT:]
    several = points.nodes.max() > 1
    with style():
        figure = Figure(figsize=(11, 3.4 * len(panels) + 0.9), layout="constrained")
        grid = figure.subplots(len(panels), 2, squeeze=False)
        legend: dict[str, Any] = {}
        for (left, right), ((size, per_node), group) in zip(grid, panels, strict=True):
            for series in _series(group):
                rows = group[group.series == series]
                trainer = rows.trainer.iloc[0]
                look = {
                    "color": COLOURS[trainer],
                    "marker": MARKERS[trainer],
                    "markersize": 4.5,
                    "linewidth": 1.4,
                    "label": series,
                }
                left.plot(rows.size_bytes, 1e3 * rows.time_s, **look)
                right.plot(rows.size_bytes, rows.bus_bytes_per_s / 1e9, **look)
                right.fill_between(
                    rows.size_bytes,
                    rows.bus_bytes_per_s_low / 1e9,
                    rows.bus_bytes_per_s_high / 1e9,
                    color=COLOURS[trainer],
                    alpha=0.15,
                    linewidth=0,
                )
                law = fitted.merge(rows[line].drop_duplicates(), on=line).iloc[0]
                # What the times tell nothing of is no part of the model.
                model_s = np.nan_to_num(law.latency_s) + rows.size_bytes * np.nan_to_num(1 / law.bandwidth_bytes_per_s)
                left.plot(rows.size_bytes, 1e3 * model_s, color=COLOURS[trainer], linestyle=(0, (2, 2)), linewidth=1)
            nodes = f" on {_nodes(-(-size // per_node))}" if several else ""
            left.set_title(f"{devices(size)}{nodes}: time (dotted: latency + size / bandwidth)")
            right.set_title(f"{devices(size)}{nodes}: bus bandwidth")
            left.set_yscale("log")
            left.set_ylabel("time of an all-reduce (ms)")
            left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            right.set_ylabel("bus bandwidth (GB/s)")
            right.set_ylim(bottom=0)
            ticks = [2**power for power in range(0, 45, 5) if group.size_bytes.min() <= 2**power]
            ticks = [tick for tick in ticks if tick <= group.size_bytes.max()]
            for axes in (left, right):
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_locator(FixedLocator(ticks))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_in_words(int(value))))
                axes.set_xlabel("size of the message")
                _plain_ticks(axes)
                sns.despine(ax=axes)
            legend |= _taken_legend(left)
        figure.suptitle(
            "Collectives: what an all-reduce takes, and what the network gives (bands: 95 % interval)",
            x=0.01,
            ha="left",
            fontsize=12.5,
            fontweight="bold",
        )
        figure.legend(
            legend.values(), legend.keys(), loc="outside lower left", ncols=len(legend), frameon=False, fontsize=9.5
        )
    return figure


def bytes_in_words(count: int) -> str:
    """Return a number of bytes as 1 KB, 32 MB, …, in powers of 1024."""
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count = count // 1024 if count % 1024 == 0 else count / 1024  # type: ignore[assignment]
    return f"{count:.3g} GB"


def loss_curves(losses: pd.DataFrame) -> Figure:
    """Draw the loss on real data against the images seen, a line a repeat."""
    losses, looks = _readable(losses), _looks(losses)

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        present = _series(rows)
        sizes = sorted(rows.world_size.unique())
        sns.lineplot(
            rows,
            x="images",
            y="loss",
            hue="series",
            hue_order=present,
            style="world_size",
            style_order=sizes,
            palette={series: looks[series].colour for series in present},
            units="trial",
            estimator=None,
            linewidth=1.1,
            ax=axes,
        )
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("images seen by all ranks")
        axes.set_ylabel("training loss (cross-entropy, nats)")
        handles, labels = axes.get_legend_handles_labels()
        named = {"series": "", "world_size": ""} | {str(size): devices(size) for size in sizes}
        kept = [(h, named.get(text, text)) for h, text in zip(handles, labels, strict=True) if named.get(text, text)]
        axes.legend([h for h, _ in kept], [text for _, text in kept])

    return _panels(losses, "Loss on real data: does every trainer learn the same", draw)


def _scaling(
    points: pd.DataFrame,
    trials: pd.DataFrame,
    value: str,
    *,
    title: str,
    label: Callable[[pd.DataFrame], str],
    written: Callable[[float], str],
    decorate: Callable[[Axes, pd.DataFrame], Any],
) -> Figure:
    """Draw one value over world size, a line a series, with intervals and the last value written out; a dot a repeat.

    Dots stand from left to right in the order of their start: repeats that drift or lie in two heaps are seen.
    """
    points, looks = _readable(points), _looks(points)
    measured = trials.loc[trials[value].notna(), [*POINT, "started_at", "repeat", value]]
    repeats = dict(list(measured.sort_values(["started_at", "repeat"]).groupby(SERIES)))

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        axes.set_xscale("log", base=2)
        ends = []
        for offset, series in _dodged(_series(rows)):
            line, look = rows[rows.series == series].sort_values("world_size"), looks[series]
            where = line.world_size * 2 ** (0.06 * offset)
            dots = repeats[tuple(line[SERIES].iloc[0])]
            dots = dots[dots.world_size.isin(line.world_size)]
            place = dots.groupby("world_size").cumcount() + 0.5
            count = dots.groupby("world_size")["repeat"].transform("size")
            axes.scatter(
                dots.world_size * 2 ** (0.06 * offset + _DOTS * (place / count - 0.5)),
                dots[value],
                s=9,
                color=look.colour,
                alpha=0.4,
                linewidth=0,
            )
            axes.errorbar(
                where,
                line[value],
                yerr=[
                    (line[value] - line[f"{value}_low"]).clip(lower=0).fillna(0),
                    (line[f"{value}_high"] - line[value]).clip(lower=0).fillna(0),
                ],
                color=look.colour,
                marker=look.marker,
                markerfacecolor=look.face,
                linestyle=look.dashes,
                markersize=6,
                capsize=3,
                linewidth=1.8,
                label=series,
            )
            ends.append((float(line[value].iloc[-1]), float(where.iloc[-1]), look.colour))
        decorate(axes, rows)
        _world_size_axis(axes, rows)
        axes.set_ylabel(label(rows))
        _write_ends(axes, ends, written)

    held = intervals.ratio_coverage if value in ("speedup", "efficiency") else intervals.coverage
    level = intervals.level(held(points.repeats.min()))
    by = ("panel",) if "panel" in points else ()
    return _panels(points, f"{title} (bars: {level} interval; dots: repeats)", draw, by=by)


def _scaled(points: pd.DataFrame) -> pd.DataFrame:
    """Return the points to set against a reference, a panel a reference, without those of series that have no other.

    Where no series has, all are there.
    """
    sizes = points.groupby([*WORK, "series"]).world_size.transform("nunique")
    one = (sizes == 1) & (sizes.groupby([points[column] for column in WORK]).transform("max") > 1)
    rows = points[~one]
    several = rows.groupby(WORK).reference_world_size.transform("nunique") > 1
    against = "against " + rows.reference_world_size.map(devices)
    return rows.assign(panel=against.where(several, ""))


def _write_ends(axes: Axes, ends: list[tuple[float, float, str]], written: Callable[[float], str]) -> None:
    """Write each line's last value beside its end, pushed apart so that no two overlap."""
    bottom, top = axes.get_ylim()
    apart = 0.075 * (top - bottom)
    at = -float("inf")
    for value, x, colour in sorted(ends):
        at = max(value, at + apart)
        axes.annotate(
            written(value),
            (x, at),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            # Another trainer's line may run on behind it.
            bbox=_ON_WHITE,
            # And dots of repeats.
            zorder=5,
            annotation_clip=False,
        )


def _world_size_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Mark the world sizes that were measured, and their nodes where they are several."""
    nodes = rows.groupby("world_size").nodes.max()
    several = nodes.max() > 1
    labels = [f"{size}\n{_nodes(count)}" if several else str(size) for size, count in nodes.items()]
    sizes = nodes.index.to_list()
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FixedFormatter(labels))
    axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
    axes.set_xlabel("world size (devices)")


def _panels(
    rows: pd.DataFrame,
    title: str,
    draw: Callable[[Axes, pd.DataFrame], None],
    *,
    width: float = 4.6,
    height: float = 3.6,
    by: tuple[str, ...] = (),
) -> Figure:
    """Draw one panel a workload, or one for each of its values in the columns `by`, all under one legend."""
    panels, named = list(rows.groupby([*WORK, *by], sort=True)), headings(rows)
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(max(width * columns, 7), height * lines + 0.9), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        legend: dict[str, Any] = {}
        for axes, (key, group) in zip(grid.flat, panels, strict=False):
            draw(axes, group)
            _plain_ticks(axes)
            sns.despine(ax=axes)
            own = " ".join(filter(None, key[len(WORK) :]))
            words = textwrap.wrap(named[key[: len(WORK)]], 52)
            axes.set_title("\n".join([own, *words] if own else words))
            legend |= _taken_legend(axes)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        # What fits: eight bold letters an inch, five entries of the legend in seven.
        if len(title) > 8 * figure.get_figwidth():
            title = title.replace(" (", "\n(", 1)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
        widest = max((len(text) for text in legend), default=1)
        if legend:
            figure.legend(
                legend.values(),
                legend.keys(),
                loc="outside lower left",
                ncols=max(1, min(len(legend), int(figure.get_figwidth() / (0.45 + 0.07 * widest)))),
                frameon=False,
                fontsize=9.5,
            )
    return figure


class _PlainLog(LogFormatter):
    """The ticks of a logarithmic axis as text: 0.5, 1,000, 10⁶."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        if not super().__call__(x, pos):
            return ""
        exponent = round(np.log10(x))
        if abs(exponent) > 3 and np.isclose(x, 10.0**exponent, rtol=1e-9):
            return f"10{str(exponent).translate(_SUPERSCRIPTS)}"
        return f"{x:,.6g}"


def _plain_ticks(axes: Axes) -> None:
    """Replace what would write a formula: no text of a figure is taken for one."""
    for axis in (axes.xaxis, axes.yaxis):
        for kind in ("major", "minor"):
            formatter = getattr(axis, f"get_{kind}_formatter")()
            if isinstance(formatter, LogFormatterMathtext):
                plain = _PlainLog(formatter._base, formatter.labelOnlyBase)  # type: ignore[attr-defined]
                getattr(axis, f"set_{kind}_formatter")(plain)


def _taken_legend(axes: Axes) -> dict[str, Any]:
    """Take an axes' legend away and return its entries by their text."""
    shown = axes.get_legend()
    if shown is None:
        handles, labels = axes.get_legend_handles_labels()
        return dict(zip(labels, handles, strict=True))
    entries = {text.get_text(): handle for text, handle in zip(shown.get_texts(), shown.legend_handles, strict=True)}
    shown.remove()
    return entries


class _Look(NamedTuple):
    """How a series is drawn; the usual way of a trainer is solid, filled and not hatched."""

    colour: str
    marker: str
    dashes: Any
    face: str
    hatch: str


def _looks(rows: pd.DataFrame) -> dict[str, _Look]:
    """Return how every series of a figure is drawn, the same in each of its panels."""
    looks = {}
    for trainer in COLOURS:
        for index, series in enumerate(sorted(rows[rows.trainer == trainer].series.unique())):
            looks[series] = _Look(
                colour=COLOURS[trainer],
                marker=MARKERS[trainer],
                dashes=_DASHES[index % len(_DASHES)],
                face="white" if index else COLOURS[trainer],
                hatch=_HATCHES[index % len(_HATCHES)],
            )
    return looks


def _readable(rows: pd.DataFrame, most: int = MOST_SERIES) -> pd.DataFrame:
    """Return the rows to draw: of too many series the first of every trainer, which is its usual way."""
    if rows.series.nunique() <= most:
        return rows
    return rows[rows.series.isin(rows.groupby("trainer").series.min())]


def _series(rows: pd.DataFrame) -> list[str]:
    """Return the series there are, trainer by trainer."""
    return [series for trainer in COLOURS for series in sorted(rows[rows.trainer == trainer].series.unique())]


def _dodged(series: list[str]) -> Iterator[tuple[float, str]]:
    """Yield each series with its place beside the others, in parts of a category's width."""
    for index, name in enumerate(series):
        yield (index - (len(series) - 1) / 2) * 0.66 / max(len(series), 1), name


def _wrapped(name: str) -> str:
    """Break a bar's name: a long one would leave no room for the bar."""
    return "\n".join(textwrap.wrap(name, 30))


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count > 1 else ''}"
