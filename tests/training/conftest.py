"""What tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instructft
from tests.helpers.out_of_memory import RECIPE


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    path = write_recipe(RECIPE)

    def load(*overrides: str) -> Any:
        if any("tokens_per_step" in override for override in overrides):  # it sets the accumulation
            path.write_text(path.read_text().replace("gradient_accumulation_steps: 2, ", ""))
        return instructft.load_recipe(path, list(overrides))

    return load
