"""What is saved has the loss that the run reports, or the run has failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import instructft
from instructft.errors import ModelError
from instructft.training.rehearsal import saved_loss
from instructft.weights import weight_files

GPT2 = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128}"


@pytest.mark.parametrize("adapter", [(), ("adapter.type=lora", "train.learning_rate=1e-2")], ids=["full", "lora"])
def test_the_saved_model_has_the_loss_of_the_run(recipe_of: Callable[..., Any], adapter: tuple[str, ...]) -> None:
    result = instructft.train(recipe_of(GPT2, *adapter), console=Console(quiet=True))
    saved = result.facts["saved"]
    assert saved["loss"] == pytest.approx(saved["saved_loss"], abs=1e-4)
    assert saved["rows"] == 4


def test_what_the_last_step_left_is_returned_before_a_second_model_is_there(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA run that had taken 3.2 GB all along ended with 3.9."""
    told: list[str] = []
    load = saved_loss._load
    monkeypatch.setattr(saved_loss, "return_freed", lambda: told.append("returned"))
    monkeypatch.setattr(saved_loss, "_load", lambda *asked: told.append("loaded") or load(*asked))
    instructft.train(recipe_of(GPT2), console=Console(quiet=True))
    assert told == ["returned", "loaded"]


def test_a_weight_that_is_another_when_it_is_loaded_is_found_where_no_loss_tells(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Youtu's code in transformers 5.23 has it: the row of its pad token is 0 each time that it is loaded."""

    def one_position(model: Any, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights["transformer.wpe.weight"][-1] = 0
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(weight_files, "require_whole", one_position)
    with pytest.raises(ModelError, match=r"transformer.wpe.weight \(1 in all\) of GPT2LMHeadModel are others"):
        instructft.train(recipe_of(), console=Console(quiet=True))


def test_a_model_that_is_saved_otherwise_than_trained_is_kept_aside(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: Any, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        torch.manual_seed(0)
        weights["transformer.wte.weight"] = torch.randn_like(weights["transformer.wte.weight"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(weight_files, "require_whole", spoil)
    recipe = recipe_of()
    with pytest.raises(ModelError, match="is not the one that was trained: on 4 validation rows"):
        instructft.train(recipe, console=Console(quiet=True))
    assert (Path(recipe.output_dir) / "unproved" / "model.safetensors").is_file()
    assert not (Path(recipe.output_dir) / "run.json").exists()
