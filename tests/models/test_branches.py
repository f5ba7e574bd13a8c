"""Folded turns and turns in rows of their own have the same loss and gradients; a model that leaks is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from instructft.data.batches import branches as layout
from instructft.data.batches.branches import fold, last_readers
from instructft.data.collator import CompletionOnlyCollator
from instructft.data.packing import pack
from instructft.errors import ModelError
from instructft.models import branches
from instructft.models.branches import masks_for, probe
from tests.helpers.plain_batches import loss_and_gradients

WORDS = 97
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32},
    "llama": SIZES,
    "qwen3": GROUPED,
    "gpt_neox": SIZES,
    "mistral": {**GROUPED, "sliding_window": 6},
    "gemma3_text": {**GROUPED, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}


def tiny(kind: str, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{"vocab_size": WORDS, **special, **FAMILIES.get(kind, SIZES)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # larger weights than a fresh model's, so that a leak would show
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def conversations(count: int) -> list[list[dict[str, list[int]]]]:
    """Turns as a template serves them that takes thoughts out of earlier answers."""
    rng = np.random.default_rng(3)

    def text() -> list[int]:
        return rng.integers(1, WORDS, int(rng.integers(2, 6))).tolist()

    found = []
    for _ in range(count):
        trunk, turns = text(), []
        for _ in range(int(rng.integers(2, 5))):
            trunk = trunk + text()
            thought, answer = text(), text()
            ids = [*trunk, *thought, *answer]
            turns.append({"input_ids": ids, "labels": [*[-100] * len(trunk), *thought, *answer]})
            trunk = trunk + answer
        found.append(turns)
    return found


def folded(turns: list[dict[str, list[int]]], most: int = 200) -> list[dict[str, Any]]:
    rows = fold([(np.array(t["input_ids"]), np.array(t["labels"])) for t in turns], most)
    names = ("input_ids", "labels", "seq_lengths", "seq_starts")
    return [dict(zip(names, (row[0].tolist(), row[1].tolist(), *row[2:]), strict=True)) for row in rows]


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_folded_and_unrolled_have_the_same_loss_and_gradients(kind: str, attention: str, packing: bool) -> None:
    model = tiny(kind, attention)
    talks = conversations(4)
    rows = [row for turns in talks for row in folded(turns)]
    assert len(rows) == 4
    assert all(any(row["seq_starts"]) for row in rows)
    if packing:
        rows = list(pack(Dataset.from_list(rows), 130))
        assert len(rows) < 4
    alone = loss_and_gradients(model, [CompletionOnlyCollator(0)([turn]) for turns in talks for turn in turns])
    collate = CompletionOnlyCollator(0, masks=masks_for(model.config))
    together = loss_and_gradients(model, [collate(rows)])
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    for a, b in zip(alone[1], together[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_probe_lets_clean_models_through(kind: str, attention: str) -> None:
    assert probe(tiny(kind, attention), "cpu") < 1e-5


def siblings(lengths: Any, starts: Any, width: int) -> np.ndarray:
    """As `last_readers`, but a branch is read by the branches behind it."""
    last = last_readers(lengths, starts, width)
    last[: sum(lengths)] = sum(lengths) - 1
    return last


def one_short(lengths: Any, starts: Any, width: int) -> np.ndarray:
    """As `last_readers`, but the last token does not read the first."""
    last = last_readers(lengths, starts, width)
    last[0] = sum(lengths) - 2
    return last


@pytest.mark.parametrize("wrong", [siblings, one_short])
def test_the_probe_stops_a_mask_that_is_wrong(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    """A branch that sees another has a gradient there; one that sees too little has other logits."""
    real = layout.Masks.__call__

    def call(self: Any, positions: np.ndarray, last: np.ndarray) -> Any:
        lengths, starts = given[0]
        return real(self, positions, wrong(lengths, starts, positions.shape[1])[None])

    given: list[Any] = []
    monkeypatch.setattr(layout.Masks, "__call__", call)
    monkeypatch.setattr(branches, "last_readers", lambda *args: given.append(args[:2]) or last_readers(*args))
    model = tiny("llama", "sdpa").train()
    with pytest.raises(ModelError, match=r"data\.fold_turns: LlamaForCausalLM .* does not keep the turns"):
        probe(model, "cpu")
    assert model.training


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "bloom"])
def test_a_model_that_takes_no_mask_is_not_asked_to(recipe_of: Any, kind: str) -> None:
    more = {"lfm2": {"layer_types": ["conv", "full_attention"]}}.get(kind, {})
    config = AutoConfig.for_model(kind, vocab_size=WORDS, n_head=2, **{**SIZES, **more})
    assert kind in branches.why_not(recipe_of("auto"), config)


@pytest.fixture
def recipe_of(write_recipe: Any) -> Any:
    import instructft

    def made(attention: str) -> Any:
        text = """
model:
  config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128}
  tokenizer: quickstart
data: {datasets: [{name: quickstart, rows: 60}], template: instruction, max_length: 96}
train: {max_steps: 2, use_cpu: true}
"""
        return instructft.load_recipe(write_recipe(text), [f"model.attn_implementation={attention}"])

    return made


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_a_small_model_answers_for_a_large_one(recipe_of: Any, kind: str) -> None:
    """Also one of many layers and words; random numbers of the run stay where they are."""
    sizes = {"num_hidden_layers": 40, "layer_types": None} if kind == "gemma3_text" else {"num_hidden_layers": 40}
    config = AutoConfig.for_model(kind, **{**FAMILIES[kind], "vocab_size": 50_000, "pad_token_id": 49_000, **sizes})
    state = torch.get_rng_state()
    assert branches.why_not(recipe_of("auto"), config) == ""
    assert branches.why_not(recipe_of("eager"), config) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert config.num_hidden_layers == 40


def test_attention_by_borders_is_told_as_the_reason(recipe_of: Any) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    assert "flash_attention_2 takes no mask slot by slot" in branches.why_not(recipe_of("flash_attention_2"), config)
