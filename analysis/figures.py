"""Metrics to figures. No arithmetic on what was measured is done here, only on where it is drawn.

A trainer has one colour and one marker in every figure (Okabe & Ito 2008: told apart by the colour-blind).
"""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from scalestudy.analysis.frames import PHASES

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
_PHASE_NAMES = {"first_step": "first step", "warm_up": "warm-up"}
_IDEAL: dict[str, Any] = {"color": "#777777", "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
_COLUMNS = 3
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "svg.fonttype": "none",
    # The same figure twice is the same file twice.
    "svg.hashsalt": "scalestudy",
}


def speedup(points: pd.DataFrame) -> Figure:
    """Draw speedup over the reference with the ideal line."""

    def ideal(axes: Axes, rows: pd.DataFrame) -> None:
        sizes = sorted(rows.world_size.unique())
        reference = rows.reference_world_size.min()
        axes.plot(sizes, [size / reference for size in sizes], label="ideal", **_IDEAL)
        axes.set_ylim(bottom=0)

    return _scaling(
        points,
        "speedup",
        title="Speedup: how much faster than the smallest world size",
        label=lambda rows: f"throughput over that of {_devices(rows.reference_world_size.min())}",
        written=lambda value: f"{value:.2f}×",
        decorate=ideal,
    )


def efficiency(points: pd.DataFrame) -> Figure:
    """Draw efficiency with the ideal line."""

    def full(axes: Axes, rows: pd.DataFrame) -> None:
        axes.axhline(1, label="ideal", **_IDEAL)
        axes.set_ylim(0, max(1.12, 1.05 * rows[["efficiency", "efficiency_high"]].max().max()))
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    return _scaling(
        points,
        "efficiency",
        title="Scaling efficiency: what every device still delivers",
        label=lambda rows: f"throughput per device (% of {_devices(rows.reference_world_size.min())})",
        written=lambda value: f"{value:.0%}",
        decorate=full,
    )


def throughput_per_device(points: pd.DataFrame) -> Figure:
    """Draw throughput per device, where absolute speed and loss by scaling show together."""

    def from_zero(axes: Axes, rows: pd.DataFrame) -> None:
        axes.set_ylim(0, 1.15 * rows[["throughput_per_device", "throughput_per_device_high"]].max().max())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))

    return _scaling(
        points,
        "throughput_per_device",
        title="Throughput per device: which trainer is faster",
        label=lambda _: "images/s per device",
        written=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
        decorate=from_zero,
    )


def step_time(spread: pd.DataFrame) -> Figure:
    """Draw the distribution of step times over windows: box of quartiles, whiskers at 5 and 95 %."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        sizes = sorted(rows.world_size.unique())
        trainers = _trainers(rows)
        for offset, trainer in _dodged(trainers):
            for row in rows[rows.trainer == trainer].itertuples():
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
                    widths=0.6 / len(trainers),
                    showfliers=False,
                    patch_artist=True,
                    boxprops={"facecolor": COLOURS[trainer], "edgecolor": "black", "linewidth": 0.8},
                    medianprops={"color": "black", "linewidth": 1.5},
                )
        for trainer in trainers:
            axes.bar(0, 0, color=COLOURS[trainer], label=trainer)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("world size (devices)")
        axes.set_ylabel("step time (ms)")

    return _panels(spread, "Step time: how steady are the windows (box: quartiles, whiskers: 5–95 %)", draw)


def memory(points: pd.DataFrame) -> Figure:
    """Draw the peak memory of the fullest process."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        mebibytes = rows.assign(peak_mib=rows.peak_memory_bytes / 2**20)
        trainers = _trainers(rows)
        sns.barplot(
            mebibytes,
            x="world_size",
            y="peak_mib",
            hue="trainer",
            hue_order=trainers,
            palette=COLOURS,
            errorbar=None,
            saturation=1,
            ax=axes,
        )
        for container in axes.containers:
            axes.bar_label(container, fmt="{:,.0f}", padding=2, fontsize=8.5)  # type: ignore[arg-type]
        axes.margins(y=0.12)
        axes.set_xlabel("world size (devices)")
        axes.set_ylabel("peak memory of a process (MiB)")

    return _panels(points, "Memory: what the fullest process needed", draw)


def set_up(phases: pd.DataFrame) -> Figure:
    """Draw what passes before training is steady, phase by phase."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        bars = rows[["trainer", "world_size"]].drop_duplicates().sort_values(["trainer", "world_size"], ascending=False)
        labels = [f"{trainer}, {_devices(size)}" for trainer, size in bars.itertuples(index=False)]
        left = [0.0] * len(labels)
        for phase in PHASES:
            here = bars.merge(rows[rows.phase == phase], on=["trainer", "world_size"], how="left").seconds.fillna(0)
            axes.barh(labels, here, left=left, color=_PHASE_COLOURS[phase], label=_PHASE_NAMES.get(phase, phase))
            left = [start + length for start, length in zip(left, here, strict=True)]
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")

    return _panels(phases, "Set-up: where the time goes before training is steady", draw, width=5.6)


def loss_curves(losses: pd.DataFrame) -> Figure:
    """Draw the loss on real data against the images seen, a line a repeat."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        trainers = _trainers(rows)
        sizes = sorted(rows.world_size.unique())
        sns.lineplot(
            rows,
            x="images",
            y="loss",
            hue="trainer",
            hue_order=trainers,
            style="world_size",
            style_order=sizes,
            palette=COLOURS,
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
        named = {"trainer": "", "world_size": ""} | {str(size): _devices(size) for size in sizes}
        kept = [(h, named.get(text, text)) for h, text in zip(handles, labels, strict=True) if named.get(text, text)]
        axes.legend([h for h, _ in kept], [text for _, text in kept])

    return _panels(losses, "Loss on real data: does every trainer learn the same", draw)


def _scaling(
    points: pd.DataFrame,
    value: str,
    *,
    title: str,
    label: Callable[[pd.DataFrame], str],
    written: Callable[[float], str],
    decorate: Callable[[Axes, pd.DataFrame], Any],
) -> Figure:
    """Draw one value over world size, a line a trainer, with intervals and the last value written out."""

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        axes.set_xscale("log", base=2)
        ends = []
        for offset, trainer in _dodged(_trainers(rows)):
            line = rows[rows.trainer == trainer].sort_values("world_size")
            where = line.world_size * 2 ** (0.06 * offset)
            axes.errorbar(
                where,
                line[value],
                yerr=[
                    (line[value] - line[f"{value}_low"]).clip(lower=0).fillna(0),
                    (line[f"{value}_high"] - line[value]).clip(lower=0).fillna(0),
                ],
                color=COLOURS[trainer],
                marker=MARKERS[trainer],
                markersize=6,
                capsize=3,
                linewidth=1.8,
                label=trainer,
            )
            ends.append((float(line[value].iloc[-1]), float(where.iloc[-1]), trainer))
        decorate(axes, rows)
        _world_size_axis(axes, rows)
        axes.set_ylabel(label(rows))
        _write_ends(axes, ends, written)

    return _panels(points, f"{title} (bars: 95 % bootstrap interval)", draw)


def _write_ends(axes: Axes, ends: list[tuple[float, float, str]], written: Callable[[float], str]) -> None:
    """Write each line's last value beside its end, pushed apart so that no two overlap."""
    bottom, top = axes.get_ylim()
    apart = 0.075 * (top - bottom)
    at = -float("inf")
    for value, x, trainer in sorted(ends):
        at = max(value, at + apart)
        axes.annotate(
            written(value),
            (x, at),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[trainer],
            fontweight="bold",
            # Another trainer's line may run on behind it.
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
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


def _panels(rows: pd.DataFrame, title: str, draw: Callable[[Axes, pd.DataFrame], None], width: float = 4.6) -> Figure:
    """Draw one panel a workload, all under one legend."""
    workloads = list(rows.groupby(["workload", "scaling", "device", "launcher"], sort=True))
    columns = min(_COLUMNS, len(workloads))
    lines = -(-len(workloads) // columns)
    with sns.axes_style("whitegrid", rc=_STYLE), mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(width * columns, 7), 3.6 * lines + 0.9), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        legend: dict[str, Any] = {}
        for axes, (key, group) in zip(grid.flat, workloads, strict=False):
            draw(axes, group)
            sns.despine(ax=axes)
            axes.set_title("\n".join(textwrap.wrap(f"{key[0]}, {key[1]} scaling", 52)))
            legend |= _taken_legend(axes)
        for axes in grid.flat[len(workloads) :]:
            axes.remove()
        # What fits: eight bold letters an inch, five entries of the legend in seven.
        if len(title) > 8 * figure.get_figwidth():
            title = title.replace(" (", "\n(", 1)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
        figure.legend(
            legend.values(),
            legend.keys(),
            loc="outside lower left",
            ncols=min(len(legend), int(figure.get_figwidth() / 1.4)),
            frameon=False,
            fontsize=9.5,
        )
    return figure


def _taken_legend(axes: Axes) -> dict[str, Any]:
    """Take an axes' legend away and return its entries by their text."""
    shown = axes.get_legend()
    if shown is None:
        handles, labels = axes.get_legend_handles_labels()
        return dict(zip(labels, handles, strict=True))
    entries = {text.get_text(): handle for text, handle in zip(shown.get_texts(), shown.legend_handles, strict=True)}
    shown.remove()
    return entries


def _trainers(rows: pd.DataFrame) -> list[str]:
    present = set(rows.trainer)
    return [trainer for trainer in COLOURS if trainer in present]


def _dodged(trainers: list[str]) -> Iterator[tuple[float, str]]:
    """Yield each trainer with its place beside the others, in parts of a category's width."""
    for index, trainer in enumerate(trainers):
        yield (index - (len(trainers) - 1) / 2) * 0.66 / max(len(trainers), 1), trainer


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count > 1 else ''}"
