"""Text is UTF-8 whatever the locale says, held by reading every call that reads or writes some."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path for floor in ("cluster", "trainers", "analysis", "launch") for path in (ROOT / floor).glob("*.py")
)
# Of a module, not of a path: they open no text.
OPENERS = {"os", "tarfile", "gzip", "Image"}


def by_locale(path: Path) -> Iterator[str]:
    """Yield the calls of a module whose text is in the encoding that the locale happens to have."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        of = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        constants = [one.value for one in [*call.args, *given.values()] if isinstance(one, ast.Constant)]
        binary = any("b" in one for one in constants if isinstance(one, str))
        as_text = method and name in ("read_text", "write_text")
        as_text |= name == "open" and of not in OPENERS and not binary
        as_text |= any(isinstance(given.get(one), ast.Constant) for one in ("text", "universal_newlines"))
        if as_text and "encoding" not in given:
            yield f"{path.name}:{call.lineno}: {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_text_is_read_or_written_in_the_encoding_of_the_locale(path: Path) -> None:
    assert [*by_locale(path)] == []
