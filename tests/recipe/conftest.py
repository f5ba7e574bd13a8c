"""Recipes written into an empty current directory, and their problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from instructft.errors import RecipeError
from instructft.recipe.load import load_recipe
from tests.helpers.recipes import GOOD


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe into an empty current directory; its path comes back."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "mine.yaml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


@pytest.fixture
def load(write):
    return lambda text=GOOD, *overrides: load_recipe(write(text), overrides)


@pytest.fixture
def problems(load):
    """The problem lines of a recipe that must not load."""

    def problems(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        assert str(caught.value).startswith("mine.yaml: ")
        return caught.value.problems

    return problems
