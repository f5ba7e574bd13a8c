"""Reads YAML 1.2 text and `KEY=VALUE` overrides into plain values, and remembers on which line each key was written.

The text is composed by ruamel.yaml and turned into values here rather than by its constructor, because the constructor
stops at the first duplicate key, and expands nested aliases without limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructft.redaction import is_secret, redact

KeyPath = tuple[str | int, ...]  # ("data", "datasets", 0, "rows"), written data.datasets.0.rows

MAX_BYTES = 200_000  # of a recipe file
MAX_VALUES = 20_000  # in a recipe, aliases expanded: a "billion laughs" file stops here


def dotted(path: Iterable[str | int]) -> str:
    """("data", "datasets", 0) -> "data.datasets.0"."""
    return ".".join(str(part) for part in path)


@dataclass
class Document:
    """What a recipe file and its overrides say: the values, where each was written, what is wrong so far."""

    values: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)  # path -> `line 3` or `override "train.seed=1"`
    problems: list[tuple[str, str]] = field(default_factory=list)  # (place, message)
    unread: set[KeyPath] = field(default_factory=set)  # values that could not be read, and are None
    bad: set[KeyPath] = field(default_factory=set)  # paths with a problem, and those that a wrong key stood for

    def written(self, path: KeyPath) -> KeyPath:
        """The longest beginning of a path that somebody wrote, so `data.datasets` for a bare name in it."""
        while path and path not in self.places:
            path = path[:-1]
        return path

    def place(self, path: KeyPath) -> str:
        """`line 3`, `override "train.seed=1"`, or "" for what nobody wrote."""
        return self.places.get(self.written(path), "")

    def add(self, path: KeyPath, message: str) -> None:
        """Note a problem of the key at `path`."""
        self.problems.append((self.place(path), f"{dotted(path)}: {message}"))
        self.bad.add(path)

    def is_bad(self, *paths: KeyPath) -> bool:
        """Whether a problem is known already of a key, of something in it, or of what it is in."""
        return any(bad[: len(path)] == path or path[: len(bad)] == bad for bad in self.bad for path in paths)

    def move(self, old: KeyPath, new: KeyPath) -> None:
        """Follow keys below `old`, which are below `new` from now on."""
        for path in [path for path in self.places if len(path) > len(old) and path[: len(old)] == old]:
            self.places[new + path[len(old) :]] = self.places.pop(path)

    def lines(self) -> list[str]:
        """All problems in the order of the file, then of the overrides, then what is missing everywhere."""

        def order(problem: tuple[str, str]) -> tuple[int, int]:
            place = problem[0]
            return (0, int(re.split(r"[ ,]", place)[1])) if place.startswith("line ") else (1 if place else 2, 0)

        found = sorted(dict.fromkeys(self.problems), key=order)
        return [redact(f"{place}: {message}" if place else message) for place, message in found]


def read_document(path: Path) -> Document:
    """Read a recipe file; everything wrong with it is in `.problems`.

    >>> read_document(Path("recipes/quickstart.yaml")).values["data"]["datasets"]
    ['quickstart', 'quickstart-chat']
    """
    document = Document()
    try:
        if path.stat().st_size > MAX_BYTES:
            document.problems.append(("", f"the file has {path.stat().st_size:,} bytes; a recipe has a few thousand"))
            return document
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        document.problems.append(("", f"the file is not UTF-8 text (byte {error.start}); save it as UTF-8"))
        return document
    except OSError as error:
        document.problems.append(("", f"the file cannot be read: {error.strerror}"))
        return document
    values = _Reader(document, None).read(text, ())
    if document.problems and values is None:
        return document
    if values is None:
        document.problems.append(("", "the file is empty; a recipe needs at least `model` and `data`"))
    elif not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "a single value"
        document.problems.append(("line 1", f"found {found}, expected keys such as `model:` and `data:`"))
    else:
        document.values = values
    return document


def apply_override(document: Document, override: str) -> None:
    """Set one `KEY=VALUE` in a document. VALUE is YAML: `[a, b]`, `null` and `1e-4` are what they are in a file."""
    key, equals, text = override.partition("=")
    key = key.strip()
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    if not equals or not all(str(part).strip() for part in path):
        shown = redact(key) if equals or re.fullmatch(r"[\w.]*", key) else "…"  # it may hold a token
        document.problems.append((f'override "{shown}"', "expected KEY=VALUE, as in train.max_steps=10"))
        return
    place = f'override "{key}=…"'
    reader = _Reader(document, place)
    value = reader.read(text, path)
    if reader.failed:
        return
    if not any(map(is_secret, path)) and not _contains_secret(value):
        place = f'override "{redact(override)}"'
    into, depth = document.values, 0  # the container of the key, and how many parts of the path lead to it
    while depth < len(path) - 1:
        part = path[depth]
        child = _child(into, part)
        if child is None and isinstance(into, dict):
            child = into[str(part)] = {}
            document.places.setdefault(path[: depth + 1], place)
        if not isinstance(child, dict | list):
            break
        into, depth = child, depth + 1
    parent, last = dotted(path[:depth]), path[depth]
    if isinstance(into, list) and not isinstance(last, int):
        say = f"is a list; write {parent}.0.{dotted(path[depth:])} for its first entry"
        document.problems.append((place, f"{parent}: {say}"))
    elif isinstance(into, list) and isinstance(last, int) and last >= len(into):
        document.problems.append((place, f"{parent}: has {len(into)} entries, counted from 0; there is no {last}"))
    elif depth < len(path) - 1:
        document.problems.append((place, f"{dotted(path[: depth + 1])}: is a single value, with no keys below it"))
    else:
        into[last if isinstance(into, list) else str(last)] = value
        for known in [known for known in document.places if known[: len(path)] == path]:
            del document.places[known]
        document.places.update(dict.fromkeys([path, *reader.seen], place))


def _child(into: Any, part: str | int) -> Any:
    if isinstance(into, dict):
        return into.get(str(part))
    return into[part] if isinstance(into, list) and isinstance(part, int) and part < len(into) else None


def _contains_secret(value: Any) -> bool:
    if isinstance(value, dict):
        return any(is_secret(key) or _contains_secret(item) for key, item in value.items())
    return isinstance(value, list) and any(map(_contains_secret, value))


class _Reader:
    """YAML text to plain values; fills a Document's places and problems."""

    def __init__(self, document: Document, override: str | None):
        self.document = document
        self.override = override
        self.seen: list[KeyPath] = []
        self.count = 0  # of values, aliases expanded
        self.failed = False  # nothing more to be had from this text
        self.open: list[int] = []  # nodes that are being read: an alias to one of them never ends

    def read(self, text: str, path: KeyPath) -> Any:
        from ruamel.yaml import YAML  # here: 40 ms that `instructft --help` need not wait for
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        loader = YAML(typ="safe", pure=True)
        try:
            if re.search(r"^%YAML\s+1\.1", text, re.MULTILINE):
                raise _Stop("line 1", "`%YAML 1.1`: recipes are YAML 1.2, where `no` is a word; take the line out")
            if re.search(r"[\[{](?:\s*[\[{]){50}", text):  # the parser takes seconds over these
                raise RecursionError
            node = loader.compose(text)
            return None if node is None else self.value(node, path, loader)
        except _Stop as stop:
            self.problem(stop.place, stop.message)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(str(error.problem or error.context).split())
            if "'\\t'" in what:
                what += "; indent with spaces, not with tabs"
            elif "mapping values are not allowed" in what:
                what += _deeper(text, mark.line) if mark else ""
            elif "escape" in what:
                what += r"; in double quotes a backslash begins an escape: write a path in single quotes, or with /"
            self.problem(f"line {mark.line + 1}, column {mark.column + 1}" if mark else "", f"not valid YAML: {what}")
        except RecursionError:
            self.problem("", "nested too deeply to be a recipe")
        except YAMLError as error:
            line = text[: getattr(error, "position", 0)].count("\n") + 1
            self.problem(
                f"line {line}", f"not valid YAML: {getattr(error, 'reason', 'a character that is not allowed')}"
            )
        self.failed = True
        return None

    def problem(self, place: str, message: str) -> None:
        self.document.problems.append((self.override or place, message))

    def line(self, node: Any) -> str:
        return self.override or f"line {node.start_mark.line + 1}"

    def note(self, path: KeyPath, node: Any) -> None:
        self.document.places.setdefault(path, self.line(node))
        self.seen.append(path)

    def value(self, node: Any, path: KeyPath, loader: Any) -> Any:
        """One node of the composed text as a plain value."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise _Stop("", f"more than {MAX_VALUES:,} values once its aliases (`*name`) are expanded; not a recipe")
        if id(node) in self.open:
            raise _Stop(self.line(node), f"{dotted(path)}: the alias *{node.anchor} contains itself")
        kind = str(node.tag or "").removeprefix("tag:yaml.org,2002:")
        self.open.append(id(node))
        try:
            if isinstance(node.value, str):
                return self.scalar(node, kind, path, loader)
            if kind == "seq":
                values = []
                for index, item in enumerate(node.value):
                    self.note((*path, index), item)
                    values.append(self.value(item, (*path, index), loader))
                return values
            if kind == "map":
                return self.mapping(node, path, loader)
        finally:
            self.open.pop()
        self.document.unread.add(path)
        self.problem(self.line(node), f"{dotted(path)}: the YAML tag `{node.tag}` is refused; write plain values")
        return None

    def scalar(self, node: Any, kind: str, path: KeyPath, loader: Any) -> Any:
        if kind == "null":
            return None
        if kind in ("str", "timestamp", "merge"):  # YAML 1.2 knows no dates: 2024-01-31 is a text
            return node.value
        if kind in ("bool", "int", "float"):
            try:
                return getattr(loader.constructor, f"construct_yaml_{kind}")(node)
            except (ValueError, KeyError, IndexError):
                self.document.unread.add(path)
                self.problem(self.line(node), f"{dotted(path)}: `{node.value[:40]}` is no number that can be read")
                return None
        self.document.unread.add(path)
        self.problem(self.line(node), f"{dotted(path)}: the YAML tag `{node.tag}` is refused; write plain values")
        return None

    def mapping(self, node: Any, path: KeyPath, loader: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key == "<<" and key_node.style is None:
                self.merge(value_node, values, path, loader)
                continue
            if not isinstance(key, str) or not str(key_node.tag).endswith((":str", ":null", ":bool", ":int", ":float")):
                where = f"{dotted(path)}: " if path else ""
                self.problem(self.line(key_node), f"{where}found a key that is not a word")
                continue
            if key in first:
                one, two = self.line(first[key]), self.line(key_node)
                where = f"{one} and {two}" if one != two else "twice"
                self.problem(two, f"{dotted((*path, key))}: given twice ({where}); keep one")
                continue
            first[key] = key_node
            self.document.places.pop((*path, key), None)  # a merged one, overruled
            self.note((*path, key), key_node)
            values[key] = self.value(value_node, (*path, key), loader)
        return values

    def merge(self, node: Any, values: dict[str, Any], path: KeyPath, loader: Any) -> None:
        """`<<: *name`: the keys of another mapping, unless they are written here."""
        merged = self.value(node, path, loader)
        for other in merged if isinstance(merged, list) else [merged]:
            if not isinstance(other, dict):
                self.problem(self.line(node), f"{dotted(path)}: `<<` merges mappings only")
                continue
            for key, value in other.items():
                values.setdefault(key, value)


def _deeper(text: str, number: int) -> str:
    """What keeps a `KEY: VALUE` in line `number` (from 0) from being one: deeper than the line before, or no quotes."""
    lines = text.splitlines()
    line = lines[number]
    said = [i for i in range(number) if lines[i].strip() and not lines[i].lstrip().startswith("#")]
    before = said[-1] if said else None
    if before is not None and not lines[before].rstrip().endswith(":"):
        column = len(lines[before]) - len(lines[before].lstrip("- "))  # where its key stands, behind a dash too
        if len(line) - len(line.lstrip()) > column and line.count(": ") + line.rstrip().endswith(":") == 1:
            return f"; line {number + 1} is indented deeper than line {before + 1}, whose key has a value already"
    return "; a text that holds `: ` needs quotes"


class _Stop(Exception):
    """A text that is not read to its end."""

    def __init__(self, place: str, message: str):
        super().__init__(message)
        self.place, self.message = place, message
