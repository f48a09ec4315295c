"""Where a rank stands: it tells its log each phase it enters, and on a signal the Python stack of each of its threads.

The launcher that ends a trial at its deadline sends the signal, and reads both from the logs.
"""

import faulthandler
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Whoever does not await it ignores it: interpreters that have yet to start, containers around them, other children.
STACKS_SIGNAL = signal.SIGURG
# A stack is written within milliseconds; on a shared folder it has a way to go.
STACKS_WAIT_S = 1.0
# What a rank is in before it imports its framework, while it measures, and when all is done.
START, MEASURING, DONE = "start", "measuring", "done"
_ORDER = (
    START,
    "import",
    "rendezvous",
    "sweep",
    "build",
    "first_step",
    "warm_up",
    MEASURING,
    "test",
    "causes",
    "close",
    DONE,
)
_ENTERED = re.compile(r"^scalestudy: phase (\w+)$", re.MULTILINE)
_STACK = re.compile(r"^(?:Current thread|Thread) 0x.* \(most recent call first\):\n((?:  .*\n?)*)", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_INSTALLED = re.compile(r".*/(?:site|dist)-packages/(.+)")
_OURS = ("trainers", "cluster")
_MOST_GROUPS = 4


class Standing(NamedTuple):
    """The phase a rank entered last, None where it entered none, and where in it the rank is, None where unknown."""

    phase: str | None
    place: str | None


class _Frame(NamedTuple):
    path: str
    line: int
    function: str

    @property
    def ours(self) -> bool:
        return PurePosixPath(self.path).parent.name in _OURS

    @property
    def installed(self) -> re.Match[str] | None:
        return _INSTALLED.fullmatch(self.path)

    def __str__(self) -> str:
        name = self.installed[1] if self.installed and not self.ours else PurePosixPath(self.path).name
        return f"{name}:{self.line} {self.function}"


def answer_for_stacks() -> None:
    """Have this process write all its stacks to its log when asked: in C, for who hangs may hold Python's lock."""
    faulthandler.register(STACKS_SIGNAL, file=sys.__stderr__ or 2)
    # A data loader's worker would write into the same lines.
    os.register_at_fork(after_in_child=lambda: faulthandler.unregister(STACKS_SIGNAL))
    enter(START)


def enter(phase: str) -> None:
    """Tell the log that this rank enters a phase."""
    print(f"scalestudy: phase {phase}", file=sys.stderr, flush=True)


def told(log: str) -> Standing:
    """Return where a rank stood at the end of its log."""
    entered = _ENTERED.findall(log)
    return Standing(entered[-1] if entered else None, _place(log))


def standings(folder: Path, count: int) -> str:
    """Say in one line where each of a trial's ranks stood: who is alike together, who is farthest first."""
    alike: dict[Standing, list[int]] = {}
    for rank in range(count):
        log = folder / f"rank-{rank}.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        alike.setdefault(told(text), []).append(rank)
    groups = sorted(alike.items(), key=lambda group: -_progress(group[0].phase))
    farthest = groups[0][0].phase
    said = [_said(ranks, standing, farthest) for standing, ranks in groups]
    # Who never came is what holds up the others.
    if len(said) > _MOST_GROUPS:
        left_out = sum(len(ranks) for _, ranks in groups[_MOST_GROUPS - 1 : -1])
        said[_MOST_GROUPS - 1 : -1] = [f"{left_out} more stand elsewhere (see their logs)"]
    return "; ".join(said)


def _said(ranks: Sequence[int], standing: Standing, farthest: str | None) -> str:
    one = len(ranks) == 1
    who = f"rank{'' if one else 's'} {_ranges(ranks)}"
    where = f" ({standing.place})" if standing.place else ""
    if standing.phase is None:
        return f"{who} never began"
    if standing.phase == DONE:
        return f"{who} {'is' if one else 'are'} done"
    if standing.phase == farthest:
        return f"{who} {'is' if one else 'are'} in {standing.phase}{where}"
    return f"{who} never came there: in {standing.phase}{where}"


def _progress(phase: str | None) -> int:
    return _ORDER.index(phase) if phase in _ORDER else -1


def _place(log: str) -> str | None:
    """Return the innermost frame of ours in the main thread's stack, and that of the framework which it called."""
    stacks = _STACK.findall(log)
    if not stacks:
        return None
    # Python lists its oldest thread last.
    frames = [_Frame(path, int(line), function) for path, line, function in _FRAME.findall(stacks[-1])]
    ours = next((frame for frame in frames if frame.ours), None)
    # A library's call says more than Python's own lock, queue or socket beneath it.
    inner = next((frame for frame in frames if frame.ours or frame.installed), None)
    shown = [str(frame) for frame in dict.fromkeys((ours, inner)) if frame] or [str(frame) for frame in frames[:1]]
    return ", in ".join(shown) or None


def _ranges(ranks: Sequence[int]) -> str:
    """Return numbers in ascending order as 0, 2–7."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in spans)
