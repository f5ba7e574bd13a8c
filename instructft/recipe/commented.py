"""Writes a recipe as people write one: keys in the order they are thought of, and beside each the reason for it."""

from __future__ import annotations

import math
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.recipe.yaml_reader import KeyPath, dotted

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe

WIDTH = 120  # columns
_PLAIN = re.compile(r"[A-Za-z_./~\\][\w./@+=\\-]*(?: [\w./@+=\\-]+)*")
_WORDS = frozenset(("true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"))


@dataclass
class Draft:
    """A recipe in the making, with the reason of each key."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def put(self, path: str, value: Any, why: str = "") -> None:
        """Set a key by its dotted path."""
        *sections, key = path.split(".")
        into = self.values
        for section in sections:
            into = into.setdefault(section, {})
        into[key] = value
        if why:
            self.reasons[path] = why

    def recipe(self, name: str, *overrides: str) -> Recipe:
        """As `load_recipe` reads it from a file of this name."""
        from instructft.recipe.load import load_recipe

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.yaml"
            path.write_text(commented(self.values, {}), encoding="utf-8")
            return load_recipe(path, overrides)


def commented(values: Mapping[str, Any], reasons: Mapping[str, str], head: Sequence[str] = ()) -> str:
    """A recipe as YAML that readers of 1.1 and 1.2 take for the same, with comments.

    >>> print(commented({"data": {"max_length": 512}}, {"data.max_length": "tokens per row"}, ["Mine."]), end="")
    # Mine.
    data:
      max_length: 512  # tokens per row

    Args:
        values: the recipe, with the keys that are to be written.
        reasons: dotted key -> why it is so; of an item of a list with its number, as `data.datasets.0.path`.
        head: lines above it all.
    """
    lines = [comment for line in head for comment in _comment(line, "")]
    _mapping(lines, values, reasons, (), "")
    return "\n".join(lines) + "\n"


def _mapping(lines: list[str], values: Mapping[str, Any], reasons: Mapping[str, str], path: KeyPath, pad: str) -> None:
    for key, value in values.items():
        here = (*path, key)
        reason = reasons.get(dotted(here), "")
        below = any(name.startswith(f"{dotted(here)}.") for name in reasons)
        whole = f"{pad}{scalar(key)}: {flow(value)}"
        nested = isinstance(value, Mapping | list | tuple) and len(value) > 0
        if not nested or not (below or not path or len(whole) > WIDTH or _holds_mappings(value)):
            _put(lines, whole, reason, pad)
            continue
        if reason:
            lines += _comment(reason, pad)
        lines.append(f"{pad}{scalar(key)}:")
        if isinstance(value, Mapping):
            _mapping(lines, value, reasons, here, pad + "  ")
        else:
            _list(lines, value, reasons, here, pad + "  ")


def _list(lines: list[str], values: Sequence[Any], reasons: Mapping[str, str], path: KeyPath, pad: str) -> None:
    for number, value in enumerate(values):
        if not isinstance(value, Mapping) or not value:
            _put(lines, f"{pad}- {flow(value)}", reasons.get(dotted((*path, number)), ""), pad)
            continue
        inside: list[str] = []
        _mapping(inside, value, reasons, (*path, number), pad + "  ")
        first = next(i for i, line in enumerate(inside) if not line.lstrip().startswith("#"))
        inside[first] = f"{pad}- {inside[first][len(pad) + 2 :]}"
        lines += inside


def _put(lines: list[str], line: str, reason: str, pad: str) -> None:
    """A key with its reason behind it, or above it where both do not fit on one line."""
    if reason and len(line) + len(reason) + 4 <= WIDTH:
        lines.append(f"{line}  # {_one_line(reason)}")
        return
    lines += _comment(reason, pad) if reason else []
    lines.append(line)


def _comment(text: str, pad: str) -> list[str]:
    return [f"{pad}# {line}" for line in textwrap.wrap(_one_line(text), WIDTH - len(pad) - 2)] or [f"{pad}#"]


def _one_line(text: str) -> str:
    """What stands in a comment may come from a stranger's file, and must stay in it."""
    return "".join(c if c.isprintable() else " " for c in text)


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def flow(value: Any) -> str:
    """A value on one line.

    >>> flow({"role": "no", "size": [1, 2e-5, None]})
    '{role: "no", size: [1, 2e-5, null]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    """A text or number as YAML takes it, also inside brackets."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return f"{value}".replace("inf", ".inf").replace("nan", ".nan")
        return _number(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not re.match(r"[.~][\dinIN]|~$", text):
        return text
    escaped = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escaped.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def _number(value: float) -> str:
    text = re.sub(r"e([+-])0*", r"e\1", f"{value:.6g}")
    text = text if float(text) == value else repr(value)
    return text if re.search(r"[.e]", text) else f"{text}.0"
