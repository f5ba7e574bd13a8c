"""What PEFT would not find again of an adapter is left out before the first step, or the run is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from instructft.errors import ModelError
from instructft.training.rehearsal.adapter_loads import leave_out_what_does_not_load
from tests.helpers.rehearsal import trainer_of

GPT2 = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32}"


def test_layers_that_peft_does_not_find_again_get_no_adapter(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(recipe_of(GPT2, "adapter.type=lora"))
    save = trainer.model.save_pretrained

    def renamed(folder: str) -> None:
        save(folder)
        weights = load_file(f"{folder}/adapter_model.safetensors")
        own = {k.replace(".h.1.attn.c_proj.", ".h.1.attn.other."): v for k, v in weights.items()}
        save_file(own, f"{folder}/adapter_model.safetensors")

    monkeypatch.setattr(trainer.model, "save_pretrained", renamed)
    assert leave_out_what_does_not_load(trainer) == ["transformer.h.1.attn.c_proj"]
    adapted = {name.partition(".lora_")[0] for name, _ in trainer.model.named_parameters() if ".lora_" in name}
    assert not [name for name in adapted if name.endswith("h.1.attn.c_proj")]
    assert [name for name in adapted if name.endswith("h.0.attn.c_proj")]
    assert leave_out_what_does_not_load(trainer) == []


def test_an_adapter_of_which_nothing_is_found_again_is_refused(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(recipe_of(GPT2, "adapter.type=lora"))
    assert leave_out_what_does_not_load(trainer) == []
    save = trainer.model.save_pretrained

    def renamed(folder: str) -> None:
        save(folder)
        weights = load_file(f"{folder}/adapter_model.safetensors")
        save_file({k.replace(".h.", ".g."): v for k, v in weights.items()}, f"{folder}/adapter_model.safetensors")

    monkeypatch.setattr(trainer.model, "save_pretrained", renamed)
    with pytest.raises(ModelError, match="cannot be loaded again by PEFT") as refused:
        leave_out_what_does_not_load(trainer)
    assert "nothing is saved of transformer.h.0.attn.c_attn, transformer.h.0.attn.c_proj," in str(refused.value)
    assert "base_model" not in str(refused.value)
