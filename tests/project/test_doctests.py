"""The examples in docstrings are true: each `>>>` runs, offline, and gives what is written below it.

An example may use the names in `known`. One that needs a model, a run folder or the Hub is written as an indented
block without `>>>`.
"""

from __future__ import annotations

import doctest
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest

from instructft.weights import remote_code

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "instructft"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def with_examples() -> list[str]:
    """The modules of the package that hold a `>>>`, by their dotted names."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@functools.cache
def known() -> dict[str, Any]:
    """Names that every example may use: they are what a reader of the documentation has at hand."""
    import numpy

    from instructft.prompt.templates import TEMPLATES
    from instructft.recipe.load import load_recipe
    from tests.helpers.quickstart import tokenizer

    made = tokenizer()
    made.chat_template = TEMPLATES["instruction"].text()
    at_hand: dict[str, Any] = {"np": numpy, "Path": Path, "load_recipe": load_recipe, "tokenizer": made}
    return at_hand | {"recipe": load_recipe("quickstart")}


def failures(name: str) -> list[str]:
    """What is wrong with the examples of a module, one text for each docstring."""
    said: list[str] = []
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for example in doctest.DocTestFinder().find(module, name, globs={**known(), **vars(module)}):
        runner.run(example, out=said.append)
    return said


@pytest.mark.parametrize("name", with_examples())
def test_examples_give_what_is_written_below_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    monkeypatch.setitem(remote_code._state, "allowed", False)  # put back what an example allows
    monkeypatch.chdir(tmp_path)  # what an example writes never lies in the checkout
    found = failures(name)
    assert not found, "\n".join(found)


def test_a_wrong_example_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_example.py").write_text('"""Sums.\n\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert "Expected:" in "".join(failures("wrong_example"))
