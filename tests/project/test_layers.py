"""The floor plan holds: imports run one way, folders stay small, nothing turns in a circle."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "instructft"

# From the bottom up. A module imports from its own folder and from lower lines, never from a neighbour or from above.
LAYERS = (
    ("version", "errors"),
    ("formatting", "whole_file"),
    ("progress",),
    ("redaction",),
    ("prompt",),
    ("data", "weights"),
    ("recipe", "adapters"),
    ("models",),
    ("checkpoints",),
    ("report",),
    ("hub", "inference"),
    ("evaluation",),
    ("training", "merging"),
    ("check", "extras"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MOST_FOLDERS, MOST_FILES = 16, 12


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module by its dotted name below the package, which itself imports nothing before it is asked."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        if name != "__init__":
            found[name] = path
    return found


@functools.cache
def named(text: str) -> list[tuple[str, int]]:
    """The modules that a text imports, each with its line; not what a type checker alone reads."""
    found = []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write imports out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, node.lineno) for name in names]
    return found


def imports(text: str, known: Collection[str]) -> Iterator[tuple[str, int]]:
    """The modules of ours among them."""
    for name, line in named(text):
        place = name.removeprefix("instructft.")
        if place == name:
            continue
        while place and place not in known:
            place = place.rpartition(".")[0]
        if place:
            yield place, line


def upward(texts: dict[str, str]) -> list[str]:
    """Imports that do not run downwards, each in a line."""
    wrong = []
    for name, text in texts.items():
        here = name.split(".")[0]
        for other, line in imports(text, texts):
            there = other.split(".")[0]
            if there != here and HEIGHT[there] >= HEIGHT[here]:
                wrong.append(f"{name}:{line} imports {other}")
    return wrong


def circles(texts: dict[str, str]) -> list[str]:
    """Modules that import each other, directly or over others."""
    graph = {name: {other for other, _ in imports(text, texts)} - {name} for name, text in texts.items()}
    left = dict(graph)
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    return sorted(left)  # what remains is in a circle, or above one


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    found = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    assert len(found) > 50
    return found


def test_imports_run_one_way(texts: dict[str, str]) -> None:
    assert upward(texts) == []


def test_no_modules_import_each_other(texts: dict[str, str]) -> None:
    assert circles(texts) == []


def test_an_import_upward_and_a_circle_are_seen(texts: dict[str, str]) -> None:
    broken = {**texts, "prompt.render": texts["prompt.render"] + "\ndef f():\n    from instructft.models import load\n"}
    assert len(upward(broken)) == 1
    assert "prompt.render" in upward(broken)[0]
    assert circles({**texts, "a": "from instructft import b", "b": "import instructft.a"}) == ["a", "b"]


def test_folders_stay_small() -> None:
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {path.name for path in folders} | {path.stem for path in PACKAGE.glob("*.py")} == {*HEIGHT, "__init__"}
    assert len(folders) <= MOST_FOLDERS
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder.name


def test_every_module_says_its_job_first() -> None:
    for name, path in modules().items():
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert said, name
        assert said.splitlines()[0].endswith((".", ":")), name
