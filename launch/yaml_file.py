"""A YAML file that a user wrote, read strictly: nothing is guessed, and every mistake is one line that names its place.

Refused are a field given twice, of which YAML would silently keep the last; text that the type it claims cannot hold;
and files whose size, depth or aliases would take memory or time without end.
"""

import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scalestudy.launch.errors import InputError

# A study is a few kilobytes.
_MOST_BYTES = 2**16
# Values of a file, every alias counted as all that it stands for.
_MOST_VALUES = 20_000
_DEEPEST = 30
_CORE = "tag:yaml.org,2002:"
_TAGS = {f"{_CORE}{name}": words for name, words in {"int": "integer", "float": "number", "bool": "boolean"}.items()}


class _Loader(yaml.SafeLoader):
    """The types of a study file alone: to YAML an unquoted date is a date, here it is text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_CORE}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag in {None, *_TAGS, f"{_CORE}null", f"{_CORE}str", f"{_CORE}seq", f"{_CORE}map"}
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        try:
            if self._depth > _DEEPEST:
                where = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(problem=f"nested more than {_DEEPEST} deep", problem_mark=where)
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def read_yaml(path: Path) -> Any:
    """Return what a file holds; raises InputError with a line for every mistake in its YAML."""
    text = read_text(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if mistakes := list(_Check(loader).mistakes(node)):
            raise InputError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {_said(error, text)}") from None


def read_text(path: Path) -> str:
    """Return the text of a file, UTF-8 whatever the locale; raises InputError where it is none."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            # Also a pipe: it is read more than once, and one that nobody writes to is waited for without end.
            raise InputError(f"{path}: cannot be read: is {_kind(found.st_mode)}, not a file")
        if found.st_size > _MOST_BYTES:
            size = f"{found.st_size:,} bytes"
            raise InputError(f"{path}: cannot be read: {size} are no study; at most {_MOST_BYTES:,} are read")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: cannot be read: byte {error.object[error.start]:#04x} in line {line} is not UTF-8; "
            "save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        # ValueError: a name that no file can have.
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def environments_in(text: str) -> object:
    """Return the `environments` of a study's text as they were written; None where it names none."""
    written = _Loader(text).get_single_data()
    return written.get("environments") if isinstance(written, dict) else None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


class _Check:
    """Looks at every node of a document once, before anything is made of it."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        # Values and depth below a node with every alias written out; None while the node is being looked at.
        self._sizes: dict[yaml.Node, tuple[int, int] | None] = {}

    def mistakes(self, node: yaml.Node, where: str = "") -> Iterator[str]:
        """Yield what is wrong with a node and all below it; raises YAMLError where to go on would take too long."""
        self._sizes[node] = None
        count, depth = 1, 1
        for child, place in self._children(node, where):
            if child not in self._sizes:
                yield from self.mistakes(child, place)
            size = self._sizes[child]
            if size is None:
                raise _refused("an alias stands for what it is itself a part of", child)
            count, depth = count + size[0], max(depth, 1 + size[1])
            if count > _MOST_VALUES or depth > _DEEPEST:
                raise _refused(f"more than {_MOST_VALUES:,} values, or nested more than {_DEEPEST} deep", child)
        self._sizes[node] = count, depth
        if isinstance(node, yaml.MappingNode):
            yield from _given_twice(node, where)
        elif isinstance(node, yaml.ScalarNode):
            yield from self._wrong_value(node, where)
        elif node.tag != f"{_CORE}seq":
            raise _refused(f"has a tag that no study needs, {_quoted(node.tag)}", node)

    def _children(self, node: yaml.Node, where: str) -> Iterator[tuple[yaml.Node, str]]:
        if isinstance(node, yaml.MappingNode):
            if node.tag != f"{_CORE}map":
                raise _refused(f"has a tag that no study needs, {_quoted(node.tag)}", node)
            for key, value in node.value:
                yield value, f"{where}.{_name(key)}".lstrip(".")
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                yield value, f"{where}.{index}".lstrip(".")

    def _wrong_value(self, node: yaml.ScalarNode, where: str) -> Iterator[str]:
        place = f"line {node.start_mark.line + 1}: {where}: {_quoted(node.value)}"
        if node.tag not in self._loader.yaml_constructors:
            yield f"{place}: has a tag that no study needs, {_quoted(node.tag)}"
            return
        try:
            value = self._loader.construct_object(node)
        except (ValueError, KeyError, AttributeError, ArithmeticError, LookupError, TypeError):
            yield f"{place}: is no {_TAGS.get(node.tag, 'value')} that can be read"
            return
        if isinstance(value, str) and not _encodable(value):
            yield f"{place}: holds half of a surrogate pair, which is no character"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{place}: is not a finite number"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"{place}: is a number of more than 64 bits"


def _given_twice(node: yaml.MappingNode, where: str) -> Iterator[str]:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{_CORE}str", f"{_CORE}merge"):
            yield f"line {line}: {where or 'the study'}: {_name(key)} is no name of a field: put it in quotes"
            continue
        name = f"{where}.{_name(key)}".lstrip(".")
        if first := lines.get(key.value):
            yield f"{name}: is given twice, in line {first} and in line {line}; keep one"
        lines.setdefault(key.value, line)


def _name(key: yaml.Node) -> str:
    """Return a key as it may stand in a message."""
    if not isinstance(key, yaml.ScalarNode):
        return "a list or mapping"
    return key.value if key.value.isprintable() and 0 < len(key.value) <= 60 else _quoted(key.value)


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}…"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _said(error: yaml.YAMLError, text: str) -> str:
    """Return the parser's finding in one line."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: character {error.character:#x} is not allowed there"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    words = [getattr(error, part, None) for part in ("context", "problem")]
    said = ascii(", ".join(filter(None, words)))[1:-1].replace("\\'", "'")[:300]
    return f"line {mark.line + 1}: {said}" if mark else said
