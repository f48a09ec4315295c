"""Two result folders against each other: what differs between their environments, and what got faster or slower."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scalestudy.analysis import differences, figures, intervals, metrics
from scalestudy.analysis.fairness import guarded
from scalestudy.analysis.report import Facts, as_image, page, read_study
from scalestudy.analysis.shares import share
from scalestudy.trainers.files import DamagedError

# What must be equal for a point of one folder to be that of the other. Not the launcher: it is part of the environment.
MATCH = ["workload", "scaling", "device", "trainer", "execution", "options", "series", "world_size"]
# What Markdown, or GitHub's of it, would take for markup; within a word `_` is itself.
_MARKS = re.compile(r"[\\`*<>\[\]|$~&]|(?<!\w)_|_(?!\w)")
_MOST_DAMAGED = 5
SLOWER, FASTER, ALIKE = "slower", "faster", "no difference shown"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """NEW against BASE.

    environment: what differs, by subject, of both. unlike: what is not compared, not being the same work. points: a row
    a point that both have measured, see `changes`.
    base_only, new_only: points that the other has not; lost: those that it tried, and every trial failed. damaged: the
    records of both that cannot be read, with the reason.
    """

    base: Path
    new: Path
    tolerance: float
    environment: Mapping[str, tuple[str, str]]
    unlike: list[str]
    points: pd.DataFrame
    lost: pd.DataFrame
    base_only: pd.DataFrame
    new_only: pd.DataFrame
    damaged: Sequence[DamagedError] = ()

    @property
    def regressions(self) -> pd.DataFrame:
        """Points that are shown to be slower, by more than the tolerance."""
        return self.points[(self.points.verdict == SLOWER) & (self.points.ratio < 1 - self.tolerance)]

    @property
    def regressed(self) -> bool:
        """Whether anything got worse: slower past the tolerance, or failed."""
        return len(self.regressions) > 0 or len(self.lost) > 0


def compare(base: Path, new: Path, tolerance: float) -> Comparison:
    """Match two folders point by point; raises ValueError where one of them holds no record."""
    (base_facts, base_trials, base_damaged), (new_facts, new_trials, new_damaged) = map(_read, (base, new))
    together, unlike = guarded(
        pd.concat([base_trials.assign(side="base"), new_trials.assign(side="new")], ignore_index=True),
        work_alone=True,
    )
    base_trials, new_trials = (together[together.side == side] for side in ("base", "new"))
    there, here = (trials[trials.throughput_images_per_s.notna()] for trials in (base_trials, new_trials))
    base_keys, new_keys = (_points_of(trials) for trials in (there, here))
    missing = _only(base_keys, new_keys)
    return Comparison(
        base=base,
        new=new,
        tolerance=tolerance,
        environment=_differences(base_facts, new_facts),
        unlike=unlike,
        points=changes(there, here),
        lost=missing.merge(_points_of(new_trials), on=MATCH),
        base_only=_only(missing, _points_of(new_trials)),
        new_only=_only(new_keys, base_keys),
        damaged=[*base_damaged, *new_damaged],
    )


def changes(base: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Return a row a point that both measured: base and new (median images/s), ratio new / base, and a verdict.

    ratio_low and ratio_high are its 95 % bootstrap interval, superiority how often a new run is the faster of two. The
    verdict is `no difference shown` where the two throughputs' own intervals overlap, and where either was measured
    once.
    """
    by_point = [
        {key: group.to_numpy() for key, group in trials.groupby(MATCH, sort=True).throughput_images_per_s}
        for trials in (base, new)
    ]
    keys = [key for key in by_point[0] if key in by_point[1]]
    before, after = ([samples[key] for key in keys] for samples in by_point)
    before_low, before_high = intervals.median_intervals(before)
    after_low, after_high = intervals.median_intervals(after)
    ratio_low, ratio_high = intervals.ratio_intervals(after, before)
    medians = [[float(np.median(sample)) for sample in samples] for samples in (before, after)]
    found = pd.DataFrame(keys, columns=MATCH).assign(
        base=medians[0],
        new=medians[1],
        base_repeats=[len(sample) for sample in before],
        new_repeats=[len(sample) for sample in after],
        ratio_low=ratio_low,
        ratio_high=ratio_high,
    )
    verdict = np.select([after_low > before_high, after_high < before_low], [FASTER, SLOWER], ALIKE)
    won = [differences.superiority(*pair) for pair in zip(after, before, strict=True)]
    return found.assign(ratio=found.new / found.base, verdict=verdict, superiority=won)


def markdown(found: Comparison) -> str:
    """Return the comparison as a Markdown text: the environments first."""
    lines = [f"# {_plain(found.new)} against {_plain(found.base)}", "", "## What differs between them", ""]
    lines += [
        f"* {_plain(subject)}: {_plain(there)} → {_plain(here)}" for subject, (there, here) in found.environment.items()
    ]
    lines += ["", "## What came of it", "", *(f"* {_plain(sentence)}" for sentence in summary(found)), ""]
    lines += [
        "| | workload | trainer | devices | base, images/s | new, images/s | new / base | 95 % interval | faster |"
    ]
    lines += ["|---" * 9 + "|"]
    for row in found.points.itertuples():
        interval = "–" if np.isnan(row.ratio_low) else f"{row.ratio_low:.3f}–{row.ratio_high:.3f}"
        verdict = f"**{row.verdict}**" if row.verdict != ALIKE else row.verdict
        lines.append(
            f"| {verdict} | {_plain(row.workload)} | {_plain(row.series)} | {row.world_size} "
            f"| {_rate(row.base)} | {_rate(row.new)} | {row.ratio:.3f} | {interval} | {share(row.superiority)} |"
        )
    for title, rows in _unmatched(found).items():
        lines += ["", f"## {title}", ""]
        lines += [f"* {_plain(row.workload)}: {_plain(row.series)} on {row.world_size}" for row in rows.itertuples()]
    return "\n".join(lines) + "\n"


def html(found: Comparison) -> str:
    """Return the comparison as one page that opens offline."""
    return page("compare.html.j2").render(
        found=found,
        summary=summary(found),
        rate=_rate,
        points=found.points.to_dict("records"),
        unmatched={title: rows.to_dict("records") for title, rows in _unmatched(found).items()},
        figure=as_image(figures.changes(found.points, found.tolerance)) if len(found.points) else None,
    )


def summary(found: Comparison) -> list[str]:
    """Return in sentences what got faster, what slower, and of what nothing is shown."""
    said = list(found.unlike)
    said += [f"A record cannot be read and is left out: {error}." for error in found.damaged[:_MOST_DAMAGED]]
    if len(found.damaged) > _MOST_DAMAGED:
        said.append(f"{len(found.damaged) - _MOST_DAMAGED} more cannot be read.")
    for verdict, did in ((SLOWER, "lost"), (FASTER, "gained")):
        rows = found.points[found.points.verdict == verdict]
        if len(rows):
            furthest = rows.loc[(rows.ratio - 1).abs().idxmax()]
            said.append(
                f"{len(rows)} of {_count(len(found.points), 'point')} {'is' if len(rows) == 1 else 'are'} {verdict}; "
                f"{furthest.series} on {_count(furthest.world_size, 'device')} {did} most: "
                f"{_change(furthest.ratio)} ({furthest.workload})."
            )
    alike = int((found.points.verdict == ALIKE).sum())
    if alike:
        said.append(
            f"Of {_count(alike, 'point')} no difference is shown: the intervals overlap, or one was measured once."
        )
    if len(found.lost):
        said.append(f"{_count(len(found.lost), 'point')} that the base measured failed in every trial of the new one.")
    if found.points.empty:
        said.append("They have no point in common that both measured: nothing can be compared.")
    fewest = found.points[["base_repeats", "new_repeats"]].min().min()
    if fewest < intervals.FEWEST_REPEATS:
        said.append(
            f"The smallest point has {_count(int(fewest), 'repeat')}, whose interval holds the true median "
            f"{intervals.coverage(fewest):.0%} of the time, not 95 %; {intervals.FEWEST_REPEATS} or more reach that."
        )
    past = len(found.regressions)
    said.append(
        f"{_count(past, 'point')} slower by more than the tolerance of {found.tolerance:.1%}."
        if past
        else f"Nothing is shown to be slower by more than the tolerance of {found.tolerance:.1%}."
    )
    return said


def _read(out: Path) -> tuple[Facts, pd.DataFrame, list[DamagedError]]:
    facts, found, damaged = read_study(out)
    return facts, metrics.with_throughput(found.trials), damaged


def _differences(base: Facts, new: Facts) -> dict[str, tuple[str, str]]:
    """Return what differs, by subject; first when each was measured, which on a shared machine is a difference too."""
    found = {"measured": (f"{base.first} to {base.last}", f"{new.first} to {new.last}")}
    for subject in [*base.environment, *(subject for subject in new.environment if subject not in base.environment)]:
        there, here = (set(facts.environment.get(subject, {})) for facts in (base, new))
        if there != here:
            # What both have is left out, unless it is all that one has.
            sides = (there - here or there, here - there or here)
            found[subject] = (", ".join(sorted(sides[0])) or "–", ", ".join(sorted(sides[1])) or "–")
    return found


def _points_of(trials: pd.DataFrame) -> pd.DataFrame:
    return trials[MATCH].drop_duplicates()


def _only(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Return the points of one that the other does not have."""
    marked = one.merge(other, on=MATCH, how="left", indicator=True)
    return marked[marked._merge == "left_only"].drop(columns="_merge")


def _unmatched(found: Comparison) -> dict[str, pd.DataFrame]:
    titled: dict[str, Any] = {
        "Failed in the new one": found.lost,
        "In the base alone": found.base_only,
        "In the new one alone": found.new_only,
    }
    return {title: rows for title, rows in titled.items() if len(rows)}


def _plain(text: object) -> str:
    """Return text of users as Markdown that shows it as it is."""
    return _MARKS.sub(r"\\\g<0>", " ".join(str(text).split()))


def _change(ratio: float) -> str:
    return f"{1 - ratio:.1%} of its throughput" if ratio < 1 else f"{ratio:.3f}× its throughput"


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 1000 else f"{images_per_s:,.4g}"


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"
