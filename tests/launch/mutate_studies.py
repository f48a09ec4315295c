"""Mutations of the ready studies through `scalestudy run --dry-run`, in one process: what a mistake must never do.

`python mutate_studies.py COUNT` runs in an empty folder and prints what it found as JSON. Memory is limited, and every
file that is written, program that is started and connection that is made is a finding.
"""

import contextlib
import copy
import io
import json
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from scalestudy.launch.cli import main

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
MEMORY_BYTES = 4 * 2**30
LONGEST_S = 1.0
LONGEST_LINE = 1000
NAME = "study.yaml"

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**4, 10**9, 2**31, 2**63, 2**64, 10**30, 16**5000),
    *(-0.0, 0.5, 1e-320, 1e308, float("inf"), float("nan")),
    *("", " ", "auto", "1%", "2 %", "a" * 5000, "9" * 400, "1e999", "inf", "nan", "1e-3", "☃", "\0", "\n", "\ud800"),
    *("~", "~nobody/x", "images:~nobody/x", "images:.", "mnist:/", "digits:x", "images:\0", "images:" + "x" * 300),
    *("torch-ddp", "tf-mirrored", "cnn", "resnet18", "compiled", "graph", "fp16", "tf32", "strong", "gpu", "cpu"),
    *("local", "slurm", "adam", "digits", "[bold]", "$_{x}$", "{0}", "%s", "2024-01-01", "02:00:00"),
    *(date(2024, 1, 1), datetime(2024, 1, 1, tzinfo=UTC), b"\xff\0", {"a", "b"}),
    *([], [[]], {}, {"a": 1}, {1: 2}, {None: 1}, {"min": 2, "max": 10**9, "until": "1%"}, {"name": "cnn", "batch": 4}),
    *([1] * 50, [*range(1, 3000)], ["cnn"] * 300, [{"name": "cnn", "batch": size} for size in range(1, 300)]),
    *([None, 1, "a", [], {}], ["torch-ddp", "horovod-torch"], [1, 2], [1, True, 1.0], ["a" * 100] * 50),
]
# What no value comes to when it is written down.
TEXTS = [
    *("!!timestamp x", "!!int x", "!!float x", "!!bool x", "!!null x", "!!set {a}", "!!binary x", "!x y", "*a", "&a"),
    *("!!python/object/apply:os.system [true]", "!!python/name:os.system", "9" * 5000, "0x" + "f" * 5000, "=", "<<"),
    *("[" * 3000, "{" * 3000, "- " * 3000, "? " * 300, "'", '"', "|", ">", "@", "%YAML 3.0", "---", "...", "\t", "\0"),
    *("\x85", "\ufeff", "\u2028", "&a [*a]", "{<<: 1}", "2024-99-99", "59:" * 300 + "59", "#", ": ", "- ", "\x1b[2J"),
    '"\\ud800"',
    # Nine to the sixth values by aliases.
    "a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefg")),
]
KEYS = ["trainer", "worldsizes", "max_trials", "name", "options", "slurm", "ray", "environments", "costs", "<<"]
KEYS += ["a\nb", "", "\ud800"]


def value_changed(text: str, rng: random.Random) -> bytes:
    """Put another value, often of another type, in the place of one."""
    content = yaml.safe_load(text)
    holder, key = rng.choice(places(content))
    holder[key] = copy.deepcopy(rng.choice(VALUES))
    return written(content)


def key_changed(text: str, rng: random.Random) -> bytes:
    """Rename, add or remove a field."""
    content = yaml.safe_load(text)
    holder = rng.choice([holder for holder, _ in places(content) if isinstance(holder, dict)])
    key = rng.choice([*holder])
    value = holder.pop(key)
    match rng.randrange(3):
        case 0:
            holder[rng.choice([*KEYS, 1, None, True, 2.5, date(2024, 1, 1)])] = value
        case 1:
            holder |= {key: value, rng.choice(KEYS): copy.deepcopy(rng.choice(VALUES))}
    return written(content)


def text_changed(text: str, rng: random.Random) -> bytes:
    """Put a piece of YAML somewhere, in the place of a value, or of the whole."""
    piece, lines = rng.choice(TEXTS), text.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines[at] = lines[at].partition(":")[0] + ": " + piece
        case 1:
            lines.insert(at, piece)
        case 2:
            place = rng.randrange(len(text))
            return (text[:place] + piece + text[place:]).encode()
        case 3:
            lines = [piece]
    return "\n".join(lines).encode()


def lines_changed(text: str, rng: random.Random) -> bytes:
    """Duplicate, drop, swap or indent lines."""
    lines = text.splitlines()
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(other, lines[one])
        case 1:
            del lines[one]
        case 2:
            lines[one], lines[other] = lines[other], lines[one]
        case 3:
            lines[one] = " " * rng.randrange(1, 5) + lines[one]
    return "\n".join(lines).encode()


def bytes_changed(text: str, rng: random.Random) -> bytes:
    """Flip, insert, drop or repeat bytes, cut the file off, or write it in another encoding."""
    content = bytearray(text.encode())
    at = rng.randrange(len(content))
    end = min(len(content), at + rng.randrange(1, 40))
    match rng.randrange(6):
        case 0:
            content[at] = rng.randrange(256)
        case 1:
            content[at:at] = rng.randbytes(rng.randrange(1, 20))
        case 2:
            del content[at:end]
        case 3:
            content[at:at] = content[at:end] * rng.choice([1, 2, 50])
        case 4:
            del content[at:]
        case 5:
            return text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037"]))
    return bytes(content)


MUTATIONS: list[Callable[[str, random.Random], bytes]] = [
    *(value_changed, value_changed, key_changed),
    *(text_changed, lines_changed, bytes_changed),
]


def places(content: Any) -> list[tuple[Any, Any]]:
    """Return every place that a value can be put into: what holds it, and where there."""
    held = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in held:
        found.append((content, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def written(content: Any) -> bytes:
    """Return content as YAML, aliases and all."""
    sys.set_int_max_str_digits(0)
    try:
        return yaml.safe_dump(content, sort_keys=False).encode()
    finally:
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)


class Touched:
    """What was written, started or called while it is asked to look."""

    def __init__(self) -> None:
        self.looks = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.looks:
            return
        changes = event.startswith(("os.mk", "os.re", "os.link", "os.symlink", "os.truncate", "shutil.", "tempfile."))
        starts = event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if changes or starts or writes:
            self.seen.append(f"{event}{arguments}"[:200])


def outcome(content: bytes, touched: Touched) -> tuple[int | None, list[str]]:
    """Run a study and return its exit code, and what was not as it must be."""
    Path(NAME).write_bytes(content)
    sys.argv = ["scalestudy", "run", NAME, "--dry-run"]
    told, complained = io.StringIO(), io.StringIO()
    code, wrong = None, []
    touched.seen, touched.looks = [], True
    began_s = time.process_time()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(complained):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        wrong.append(traceback.format_exc(limit=-3))
    finally:
        touched.looks = False
    took_s = time.process_time() - began_s
    said = complained.getvalue()
    lines = said.splitlines()
    if code not in (0, 2) and not wrong:
        wrong.append(f"exit code {code}")
    if code == 0 and said:
        wrong.append(f"exit code 0 and {said[:200]!r}")
    if code == 2 and not (
        lines
        and lines[0].startswith("scalestudy: ")
        and all(line.startswith(NAME) for line in lines[1:])
        and all(line.isprintable() and len(line) <= LONGEST_LINE for line in lines)
        and told.getvalue() == ""
    ):
        wrong.append(f"exit code 2 and {said[:2000]!r}")
    if took_s > LONGEST_S:
        wrong.append(f"took {took_s:.1f} s")
    here = [path.name for path in Path().iterdir()]
    if touched.seen or here != [NAME]:
        wrong.append(f"touched {touched.seen}, {here}")
    return code, wrong


def explore(count: int) -> dict[str, Any]:
    """Run so many mutations, the same every time."""
    # What every machine has, so that what is wrong behind the first check is found too.
    studies = [path.read_text(encoding="utf-8") for path in STUDIES]
    studies = [text.replace("[1, 2, 4, 8]", "[1, 2]").replace("device: gpu", "device: cpu") for text in studies]
    touched = Touched()
    # Once, for what the first run imports.
    outcome(studies[0].encode(), touched)
    codes = {0: 0, 2: 0}
    findings = []
    for seed in range(count):
        rng = random.Random(seed)
        mutation = rng.choice(MUTATIONS)
        content = mutation(rng.choice(studies), rng)
        code, wrong = outcome(content, touched)
        if code in codes:
            codes[code] += 1
        findings += [f"seed {seed}, {mutation.__name__}: {text}" for text in wrong]
    return {"codes": codes, "findings": findings}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(json.dumps(explore(int(sys.argv[1]))))
