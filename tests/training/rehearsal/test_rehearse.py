"""A rehearsal leaves no trace in a run, and what training sets in a model's configuration is none of what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

import instructft
import instructft.training.rehearsal.rehearse as module
from instructft.training.rehearsal.rehearse import rehearse, short_batch
from tests.helpers.rehearsal import trainer_of

MIXTURE = (
    "{model_type: qwen2_moe, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, "
    "intermediate_size: 48, moe_intermediate_size: 16, shared_expert_intermediate_size: 16, num_experts: 4, "
    "num_experts_per_tok: 2}"
)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_run_is_the_same_with_a_rehearsal_and_without(recipe_of: Callable[..., Any], packing: str) -> None:
    found = []
    for rehearsal in (True, False):
        recipe = recipe_of(
            "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128}",
            f"data.packing={packing}",
            f"output_dir={recipe_of().output_dir}-{rehearsal}",
        )
        result = instructft.train(recipe, rehearsal=rehearsal, console=Console(quiet=True))
        lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            for clock in [key for key in line if "second" in key or "runtime" in key]:
                del line[clock]
        found.append((lines, (result.output_dir / "model.safetensors").read_bytes()))
        assert (result.facts["rehearsal"] is not None) == rehearsal
    assert found[0] == found[1]


def test_all_that_is_right_takes_one_line(recipe_of: Callable[..., Any]) -> None:
    said: list[str] = []
    trainer = trainer_of(recipe_of())
    rehearse(trainer, trainer.train_dataset[0], said.append)
    assert len(said) == 1
    assert "rehearsed in" in said[0]


def test_answers_that_are_others_beside_a_prompt_or_that_fail_are_said(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of RWKV, which reads its padding, and of a model that fails as it answers."""

    def fails(generator: Any) -> float:
        raise IndexError("no such state")

    trainer = trainer_of(recipe_of())
    for difference, line in (
        (lambda generator: 0.25, "answers are made one prompt at a time: padding changes logits by 2.5e-01"),
        (fails, "GPT2LMHeadModel cannot answer (IndexError: no such state)"),
    ):
        said: list[str] = []
        monkeypatch.setattr(module, "padding_difference", difference)
        found = rehearse(trainer, trainer.train_dataset[0], said.append)
        assert len(said) == 2
        assert said[0].startswith(line)
        assert said[1].endswith("as said above")
        assert found.facts["said"] == said[:1]


def test_the_batch_holds_what_carries_loss(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of())
    row = {"input_ids": list(range(3, 100)), "labels": [-100] * 90 + list(range(93, 100))}
    batch = short_batch(trainer, row)
    assert batch["input_ids"].shape == (2, 12)
    assert bool((batch["labels"] != -100).any(dim=1).all())


def test_the_saved_configuration_is_that_of_the_base(recipe_of: Callable[..., Any]) -> None:
    result = instructft.train(
        recipe_of(MIXTURE, "samples=[Hi, What is the capital of Norway?]"), console=Console(quiet=True)
    )
    assert json.loads((result.output_dir / "config.json").read_text())["output_router_logits"] is False
