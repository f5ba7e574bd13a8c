"""Tiny bases and runs that the tests of adapters share."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

import instructft
from tests.helpers.adapters import SHAPES, WIDE, make_adapter, make_base
from tests.helpers.device import ON_GPU


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a tiny base with the bundled tokenizer, once each."""
    from tests.helpers.quickstart import tokenizer

    made: dict[str, Path] = {}

    def make(kind: str, spare_rows: int = 0, wide: bool = False) -> Path:
        key = f"{kind}-{spare_rows}-{wide}"
        if key not in made:
            tok, folder = tokenizer(), tmp_path_factory.mktemp(key)
            ids = {f"{name}_token_id": getattr(tok, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                kind, vocab_size=len(tok) + spare_rows, initializer_range=0.1, **ids, **(WIDE if wide else SHAPES)[kind]
            )
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tok.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any, str]]:
    """Trains and gives (result, the model that was trained, what was printed)."""
    module = import_module("instructft.training.run")
    kept: list[Any] = []
    load = module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **k: kept.append(load(*a, **k)) or kept[-1])

    def run(recipe: Any) -> tuple[Any, Any, str]:
        printed = io.StringIO()
        result = instructft.train(recipe, console=Console(file=printed, width=200))
        model = kept[-1].eval()
        if ON_GPU and getattr(model.config, "quantization_config", None) is None:
            model = model.cpu()  # where the models are that it is held against
        return result, model, printed.getvalue()

    return run


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {kind: make_base(kind, place / kind) for kind in ("gpt2", "llama", "wide")}


@pytest.fixture
def sound(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A whole adapter over a base of its own, both in `tmp_path`, for a test to break."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    return make_adapter(base, tmp_path / "adapter")[0]
