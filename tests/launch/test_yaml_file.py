"""A study file as people have it: doubled, torn, in another encoding, or made to blow up."""

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from scalestudy.launch.errors import InputError
from scalestudy.launch.yaml_file import environments_in, read_yaml

ALIASES = "a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefghij"))
MERGES = "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{f'*{a}, ' * 9}]}}\n" for a, b in pairwise("abcdefghij"))


def refused(tmp_path: Path, content: str | bytes) -> list[str]:
    """Return the lines with which a file is refused, each after its name."""
    path = tmp_path / "s.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{path}: ") and line.isprintable() for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_a_field_given_twice_is_refused_at_any_depth_with_both_lines(tmp_path: Path) -> None:
    text = "world_sizes: [1, 2]\nm:\n  - {a: 1}\n  - {a: 1,\n     a: 2}\n'world_sizes': [1]\n"
    assert refused(tmp_path, text) == [
        "m.1.a: is given twice, in line 4 and in line 5; keep one",
        "world_sizes: is given twice, in line 1 and in line 6; keep one",
    ]
    assert refused(tmp_path, "a: {b: &x {c: 1, c: 2}}\nd: *x") == [
        "a.b.c: is given twice, in line 1 and in line 1; keep one"
    ]


def test_a_merged_field_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("usual: &usual {a: 1, b: 2}\nmine: {<<: *usual, a: 3}\n")
    assert read_yaml(path) == {"usual": {"a": 1, "b": 2}, "mine": {"a": 3, "b": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: !!timestamp x", "line 1: a: 'x': has a tag that no study needs, 'tag:yaml.org,2002:timestamp'"),
        ("a:\n  - !!int x", "line 2: a.0: 'x': is no integer that can be read"),
        ("a: !!bool x", "line 1: a: 'x': is no boolean"),
        ("a: !!float x", "line 1: a: 'x': is no number"),
        ("a: !!set {x}", "has a tag that no study needs"),
        ("a: !!python/object/apply:os.system [x]", "has a tag that no study needs"),
        ("a: !!python/name:os.system", "has a tag that no study needs"),
        ("a: " + "9" * 5000, "is no integer that can be read"),
        ("a: 0x" + "f" * 5000, "is a number of more than 64 bits"),
        ("a: .inf", "line 1: a: '.inf': is not a finite number"),
        ("a: .nan", "line 1: a: '.nan': is not a finite number"),
        ('a: "\\ud800"', "holds half of a surrogate pair"),
        ("1: a", "line 1: the study: 1 is no name of a field"),
        ("a: {~: b}", "line 1: a: ~ is no name of a field"),
        ("a: {yes: b}", "line 1: a: yes is no name of a field"),
        ("? [a]\n: b", "a list or mapping is no name of a field"),
        ("[" * 1000, "not YAML: line 1: nested more than 30 deep"),
        ("{" * 1000, "not YAML: line 1: nested more than 30 deep"),
        ("- " * 1000 + "a", "not YAML: line 1: nested more than 30 deep"),
        (ALIASES, "more than 20,000 values"),
        (MERGES, "more than 20,000 values"),
        ("a: &a [*a]", "an alias stands for what it is itself a part of"),
        ("a: *b", "not YAML: line 1: found undefined alias 'b'"),
        ("a: b\n---\nc: d", "not YAML: line 2: expected a single document"),
        ("a: b\n\0", "not YAML: line 2: character 0x0 is not allowed there"),
        ("x: 1\n".encode("utf-16"), "cannot be read: byte 0xff in line 1 is not UTF-8; save it as UTF-8"),
        ("a: 1\n# größe\n".encode("latin-1"), "cannot be read: byte 0xf6 in line 2 is not UTF-8; save it as UTF-8"),
        ("# " + "x" * 70_000, "cannot be read: 70,002 bytes are no study"),
    ],
)
def test_what_cannot_be_meant_is_one_line_at_once(tmp_path: Path, content: str | bytes, message: str) -> None:
    began_s = time.process_time()
    [line] = refused(tmp_path, content)
    assert message in line
    assert time.process_time() - began_s < 1


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: cannot be read: is a pipe, not a file"):
        read_yaml(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot be read: is a folder, not a file"):
        read_yaml(tmp_path)


def test_utf_8_is_read_with_and_without_a_mark_and_dates_are_text(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + "a: größe\nb: 2024-01-01\n".encode())
    assert read_yaml(path) == {"a": "größe", "b": "2024-01-01"}


def test_environments_are_read_from_a_text_that_a_study_may_have() -> None:
    """To YAML alone the name is a date, and none that there is."""
    assert environments_in("name: 2026-13-45\nenvironments: {torch-ddp: ./python}") == {"torch-ddp": "./python"}
    assert environments_in("name: s") is None
    assert environments_in("") is None
