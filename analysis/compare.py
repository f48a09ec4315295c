"""Two result folders against each other: what differs between their environments, and what got faster or slower."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from scalestudy.analysis import differences, figures, intervals, metrics
from scalestudy.analysis.fairness import guarded, once
from scalestudy.analysis.report import Facts, as_image, page, read_study
from scalestudy.trainers.files import DamagedError

# What must be equal for a point of one folder to be that of the other. Not the launcher: it is part of the environment.
MATCH = ["workload", "scaling", "device", "trainer", "execution", "options", "series", "world_size"]
# What Markdown, or GitHub's of it, would take for markup; within a word `_` is itself.
_MARKS = re.compile(r"[\\`*<>\[\]|$~&]|(?<!\w)_|_(?!\w)")
_MOST_NAMED = 5
SLOWER, FASTER, ALIKE = "slower", "faster", "no difference shown"
REGRESSED, HELD, UNCLEAR = "regressed", "held", "unclear"
_MEASURED = [
    *("base", "new", "base_repeats", "new_repeats", "ratio", "ratio_low", "ratio_high"),
    *("p_value", "p_past", "detectable", "repeats_needed", "days"),
]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """NEW against BASE.

    environment: what differs, by subject, of both. unlike: what is not compared, not being the same work. points: a row
    a point that both have measured, see `changes`. tried: a row a point that both tried, with base_failed, base_tried,
    new_failed, new_tried. base_only, new_only: points that the other has not; lost: those that it tried, and every
    trial failed. damaged: the records of both that cannot be read, with the reason. interleaved: whether both were
    measured in turns, repeat by repeat.
    """

    base: Path
    new: Path
    tolerance: float
    environment: Mapping[str, tuple[str, str]]
    unlike: list[str]
    points: pd.DataFrame
    tried: pd.DataFrame
    lost: pd.DataFrame
    base_only: pd.DataFrame
    new_only: pd.DataFrame
    damaged: Sequence[DamagedError] = ()
    interleaved: bool = False

    @property
    def regressed(self) -> bool:
        """Whether anything is shown to be worse: slower past the tolerance, failing more often, failed, or missing."""
        missing = len(self.base_only) > 0 and len(self.points) > 0
        return bool((self.points.gate == REGRESSED).any()) or self.fails_more or len(self.lost) > 0 or missing

    @property
    def unclear(self) -> bool:
        """Whether it cannot be told if anything is worse."""
        return self.points.empty or bool((self.points.gate == UNCLEAR).any()) or len(self.failing) > 0

    @property
    def failing(self) -> pd.DataFrame:
        """Points of which a larger share of trials failed in the new one."""
        return self.tried[self.tried.new_failed / self.tried.new_tried > self.tried.base_failed / self.tried.base_tried]

    @property
    def fails_more(self) -> bool:
        """Whether more trials fail than chance explains, over all points that both tried.

        The exact test of several tables, which for one is Fisher's (Gart 1970): given how many trials of a point failed
        on both sides together, those of the new one are hypergeometric, and their sum is what all points have.
        """
        chance = np.ones(1)
        for row in self.tried.itertuples():
            failed, tried = row.base_failed + row.new_failed, row.base_tried + row.new_tried
            chance = np.convolve(chance, hypergeom(tried, failed, row.new_tried).pmf(np.arange(failed + 1)))
        return bool(chance[int(self.tried.new_failed.sum()) :].sum() <= 1 - intervals.CONFIDENCE)


def compare(base: Path, new: Path, tolerance: float, base_again: Sequence[Path] = ()) -> Comparison:
    """Match two folders point by point; raises ValueError where one holds no record, or not what it is given for.

    `base_again` is the base measured on other days: what a day changes is then in the intervals.
    """
    read = [_read(out) for out in (base, new, *base_again)]
    (base_facts, *_), (new_facts, *_), *_ = read
    sides = ["base", "new", *(f"again {number}" for number in range(len(base_again)))]
    together, unlike = guarded(
        pd.concat(
            [trials.assign(side=side) for side, (_, trials, _) in zip(sides, read, strict=True)], ignore_index=True
        ),
        work_alone=True,
    )
    _checked([together[together.side == side] for side in sides], (base, new, *base_again))
    counted = [once(together[together.side == side]) for side in sides]
    base_trials, new_trials, *again = (trials for trials, _ in counted)
    unlike += [sentence for _, said in counted for sentence in said]
    there, here = (trials[trials.throughput_images_per_s.notna()] for trials in (base_trials, new_trials))
    base_keys, new_keys = (_points_of(trials) for trials in (there, here))
    missing = _only(base_keys, new_keys)
    lost = missing.merge(_points_of(new_trials[new_trials.outcome != "skipped"]), on=MATCH)
    same_host = base_facts.environment.get("host") == new_facts.environment.get("host")
    in_turns = same_host and interleaved(base_trials, new_trials) and not again
    return Comparison(
        base=base,
        new=new,
        tolerance=tolerance,
        environment=_differences(base_facts, new_facts),
        unlike=unlike,
        points=changes(there, here, tolerance, paired=in_turns, again=again),
        tried=_tried(base_trials, new_trials),
        lost=lost,
        base_only=_only(missing, lost),
        new_only=_only(new_keys, base_keys),
        damaged=[error for _, _, damaged in read for error in damaged],
        interleaved=in_turns,
    )


def _checked(sides: Sequence[pd.DataFrame], folders: Sequence[Path]) -> None:
    """Raise ValueError where folders are not what they are given for: base, new, and the base of other days."""
    # To the last digit: two that started within the same second are not the same.
    record = ["trial", "started_at", "throughput_images_per_s"]
    measured = [trials[trials.throughput_images_per_s.notna()] for trials in sides]
    for (there, one), (here, other) in combinations(zip(folders, measured, strict=True), 2):
        shared = len(one[record].drop_duplicates().merge(other[record].drop_duplicates(), on=record))
        if shared:
            raise ValueError(
                f"{here}: holds {_count(shared, 'record')} that {there} also holds: what was measured once tells "
                "nothing of what changed"
            )
    for folder, trials in zip(folders, measured, strict=True):
        launchers = trials.groupby(MATCH).launcher.unique()
        mixed = launchers[launchers.map(len) > 1]
        if len(mixed):
            raise ValueError(
                f"{folder}: holds {mixed.index[0][MATCH.index('series')]} on "
                f"{_count(mixed.index[0][MATCH.index('world_size')], 'device')} by the launchers "
                f"{' and '.join(sorted(mixed.iloc[0]))}: compare folders of one launcher each"
            )
    days: dict[str, Path] = {}
    for place in (0, *range(2, len(folders))):
        if place and measured[0].merge(measured[place], on=MATCH).empty:
            raise ValueError(f"{folders[place]}: --base-again: holds no point that {folders[0]} measured")
        day = measured[place].started_at.min()[:10] if len(measured[place]) else ""
        if len(folders) > 2 and day in days:
            raise ValueError(
                f"{folders[place]}: --base-again: was measured on {day}, as was {days[day]}: give other days"
            )
        days[day] = folders[place]


def interleaved(base: pd.DataFrame, new: pd.DataFrame) -> bool:
    """Return whether two sides were measured in turns: every repeat of both before the next one of either."""
    started = pd.concat([base, new]).groupby("repeat", sort=True).started_at.agg(["min", "max"])
    shared = set(base["repeat"]) & set(new["repeat"])
    # One repeat of each may lie days apart.
    in_order = (started["max"].iloc[:-1].to_numpy() < started["min"].iloc[1:].to_numpy()).all()
    return len(shared) > 1 and bool(in_order)


def changes(
    base: pd.DataFrame,
    new: pd.DataFrame,
    tolerance: float,
    *,
    paired: bool = False,
    again: Sequence[pd.DataFrame] = (),
) -> pd.DataFrame:
    """Return a row a point that both measured: base and new (median images/s), and new / base as a `Difference`.

    verdict: slower or faster where that is shown, see `differences.judged`; of a tolerance below 1 %, past it. gate:
    regressed where the ratio is shown to lie below 1 - tolerance, by Holm over the points; held where its interval lies
    above, from six repeats on; else unclear. detectable: the smallest loss that would be found four times in five;
    repeats_needed: how many would find the tolerance so. days: on how many the base was measured there.
    """
    before, after = (metrics.throughputs(trials, MATCH) for trials in (base, new))
    others = [metrics.throughputs(trials, MATCH) for trials in again]
    keys = [key for key in before if key in after]
    rows = []
    for key in keys:
        days = [before[key], *(other[key] for other in others if key in other)]
        found, past = (
            differences.day_difference(after[key], days, null)
            if len(days) > 1
            else differences.difference(after[key], days[0], null, paired=paired)
            for null in (1.0, 1 - tolerance)
        )
        repeats = (len(before[key]), len(after[key]))
        needed = None
        if len(days) == 1:
            needed = differences.repeats_to_find(found, min(repeats), tolerance, len(keys))
        rows.append(
            {
                "base": np.median(before[key]),
                "new": np.median(after[key]),
                "base_repeats": repeats[0],
                "new_repeats": repeats[1],
                "ratio": found.ratio,
                "ratio_low": found.low,
                "ratio_high": found.high,
                "p_value": found.p_value,
                "p_past": past.p_value,
                "detectable": differences.detectable(found, len(keys)),
                "repeats_needed": np.nan if needed is None else needed,
                "days": len(days),
            }
        )
    points = pd.DataFrame(keys, columns=MATCH).join(pd.DataFrame(rows, columns=_MEASURED))
    [points] = differences.judged(points, least=min(differences.LEAST_DIFFERENCE, tolerance))
    sure = differences.holm(points.p_past.to_numpy(np.float64)) <= 1 - intervals.CONFIDENCE
    enough = points[["base_repeats", "new_repeats"]].min(axis=1) >= intervals.FEWEST_REPEATS
    # Of what has surely lost more than the tolerance, whatever the other claims.
    points["shown"] |= sure & (points.ratio < 1 - tolerance)
    return points.assign(
        verdict=np.select([points.shown & (points.ratio > 1), points.shown], [FASTER, SLOWER], ALIKE),
        gate=np.select(
            [sure & (points.ratio < 1 - tolerance), enough & (points.ratio_low > 1 - tolerance)],
            [REGRESSED, HELD],
            UNCLEAR,
        ),
    )


def markdown(found: Comparison) -> str:
    """Return the comparison as a Markdown text: the environments first."""
    lines = [f"# {_plain(found.new)} against {_plain(found.base)}", "", "## What differs between them", ""]
    lines += [
        f"* {_plain(subject)}: {_plain(there)} → {_plain(here)}" for subject, (there, here) in found.environment.items()
    ]
    lines += ["", "## What came of it", "", *(f"* {_plain(sentence)}" for sentence in summary(found)), ""]
    lines += [
        "| | workload | trainer | devices | base, images/s | new, images/s | new / base | 95 % interval | repeats |"
    ]
    lines += ["|---" * 9 + "|"]
    for row in found.points.itertuples():
        interval = "–" if np.isnan(row.ratio_low) else f"{row.ratio_low:.3f}–{row.ratio_high:.3f}"
        verdict = f"**{row.verdict}**" if row.verdict != ALIKE else row.verdict
        lines.append(
            f"| {verdict} | {_plain(row.workload)} | {_plain(row.series)} | {row.world_size} "
            f"| {_rate(row.base)} | {_rate(row.new)} | {row.ratio:.3f} | {interval} "
            f"| {row.base_repeats}, {row.new_repeats} |"
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
    said += [f"A record cannot be read and is left out: {error}." for error in found.damaged[:_MOST_NAMED]]
    if len(found.damaged) > _MOST_NAMED:
        said.append(f"{len(found.damaged) - _MOST_NAMED} more cannot be read.")
    for verdict, did in ((SLOWER, "lost"), (FASTER, "gained")):
        rows = found.points[found.points.verdict == verdict]
        if len(rows):
            furthest = rows.loc[(rows.ratio - 1).abs().idxmax()]
            said.append(
                f"{len(rows)} of {_count(len(found.points), 'point')} {_is(len(rows))} {verdict}; "
                f"{furthest.series} on {_count(furthest.world_size, 'device')} {did} most: "
                f"{_change(furthest.ratio)} ({furthest.workload})."
            )
    alike = int((found.points.verdict == ALIKE).sum())
    if alike:
        said.append(f"Of {_count(alike, 'point')} no difference is shown.")
    return [*said, *_gates(found), *_days(found)]


def _gates(found: Comparison) -> Iterator[str]:
    """Say what the exit code says, and why."""
    for row in found.failing.head(_MOST_NAMED).itertuples():
        yield (
            f"{row.series} on {_count(row.world_size, 'device')}: {row.new_failed} of {_count(row.new_tried, 'trial')} "
            f"failed, in the base {row.base_failed} of {row.base_tried} ({row.workload})."
        )
    if len(found.failing) > _MOST_NAMED:
        yield f"Of {_count(len(found.failing) - _MOST_NAMED, 'more point')} more trials failed than in the base."
    if found.fails_more:
        yield "More trials fail than chance explains."
    elif len(found.failing):
        yield "Whether more trials fail now cannot be told: so few can fail by chance."
    if len(found.lost):
        yield f"{_count(len(found.lost), 'point')} that the base measured failed in every trial of the new one."
    if found.points.empty:
        yield "They have no point in common that both measured: nothing can be compared."
        return
    if len(found.base_only):
        yield f"{_count(len(found.base_only), 'point')} of the base {_is(len(found.base_only))} missing in the new one."
    past, unclear = (found.points[found.points.gate == gate] for gate in (REGRESSED, UNCLEAR))
    tolerance = f"the tolerance of {found.tolerance:.1%}"
    if len(past):
        yield f"{_count(len(past), 'point')} {_is(len(past))} slower by more than {tolerance}."
    if len(unclear):
        yield (
            f"Whether {_count(len(unclear), 'point')} lost more than {tolerance} cannot be told. "
            f"{_would_tell(unclear, found)}"
        )
    if not found.regressed and not found.unclear:
        yield f"No point lost more than {tolerance}: every interval lies above that."


def _would_tell(unclear: pd.DataFrame, found: Comparison) -> str:
    """Say of the least certain point which loss could have been seen, and what would see the tolerance."""
    fewest = int(unclear[["base_repeats", "new_repeats"]].min().min())
    if fewest < intervals.FEWEST_REPEATS:
        return f"A point has {_count(fewest, 'repeat')}: measure it {intervals.FEWEST_REPEATS} times."
    row = unclear.loc[unclear.detectable.idxmax()]
    seen = (
        f"For {row.series} on {_count(row.world_size, 'device')} a loss of {row.detectable:.1%} would have been found "
        "in four of five cases"
    )
    if row.days > 1:
        return f"{seen}; with the base on more days, smaller ones are."
    if not found.tolerance:
        return f"{seen}; to show that nothing at all was lost is not possible: give a --tolerance."
    if np.isnan(row.repeats_needed):
        return f"{seen}; to find {found.tolerance:.1%}, a thousand repeats would not do."
    if row.repeats_needed <= fewest:
        return f"{seen}; the interval of what was lost reaches across the tolerance, and more repeats would narrow it."
    return f"{seen}; to find {found.tolerance:.1%} takes {row.repeats_needed:.0f} repeats of both."


def _days(found: Comparison) -> Iterator[str]:
    """Say whether what a day or a host changes is in the intervals."""
    if found.points.empty:
        return
    days = found.points.days.max()
    alone = int((found.points.days < days).sum())
    if days > 1:
        most = f"The base was measured on {days:.0f} days: what a day changes is in the intervals"
        yield f"{most}, but for {alone} of {_count(len(found.points), 'point')} on fewer." if alone else f"{most}."
    elif not found.interleaved:
        yield (
            "The two were not measured in turns: what another day or host changes is not in the intervals. Measure "
            "them with scalestudy compare --again BASE.yaml NEW.yaml, or give the base of other days with --base-again."
        )


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


def _tried(base: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    counts = [
        trials[trials.outcome != "skipped"]
        .assign(failed=trials.outcome != "ok")
        .groupby(MATCH, sort=True)
        .failed.agg([(f"{side}_failed", "sum"), (f"{side}_tried", "size")])
        for side, trials in (("base", base), ("new", new))
    ]
    return counts[0].join(counts[1], how="inner").reset_index()


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


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"
