"""What tests of the rehearsal share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instructft
from tests.conftest import TINY
from tests.helpers.device import here, in_float32

GPT2 = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128}"


@pytest.fixture
def recipe_of(write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    """A tiny recipe around a model's configuration, with overrides; for an adapter the model lies in a folder."""

    def make(config: str = GPT2, *overrides: str) -> Any:
        text = TINY.replace(GPT2, config).replace("rows: 120", "rows: 40")
        path = write_recipe(text)
        settings = ["train.report_to=[]", "train.save_strategy=no", f"output_dir={path.parent / 'run'}", *overrides]
        if any(setting.startswith("adapter") for setting in overrides):
            settings = [*in_float32(), *settings]
            base = path.parent / "base"
            if not base.exists():
                plain = instructft.load_recipe(path)
                tokenizer = instructft.load_tokenizer(plain)
                instructft.load_model(plain, tokenizer).save_pretrained(base)
                tokenizer.save_pretrained(base)
            path.write_text(here(text).replace(f"config: {config}\n  tokenizer: quickstart", f"name_or_path: {base}"))
        return instructft.load_recipe(path, settings)

    return make
