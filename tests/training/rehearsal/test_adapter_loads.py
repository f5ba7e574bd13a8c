"""An adapter that PEFT would not find again is refused before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from instructft.errors import ModelError
from instructft.training.rehearsal.adapter_loads import refuse_adapter_that_does_not_load
from tests.helpers.rehearsal import trainer_of


def test_an_adapter_under_other_names_is_refused(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(recipe_of("{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32}", "adapter.type=lora"))
    refuse_adapter_that_does_not_load(trainer)
    save = trainer.model.save_pretrained

    def renamed(folder: str) -> None:
        save(folder)
        weights = load_file(f"{folder}/adapter_model.safetensors")
        save_file({k.replace(".h.1.", ".h.one."): v for k, v in weights.items()}, f"{folder}/adapter_model.safetensors")

    monkeypatch.setattr(trainer.model, "save_pretrained", renamed)
    with pytest.raises(ModelError, match="cannot be loaded again by PEFT"):
        refuse_adapter_that_does_not_load(trainer)
