"""Packs: nothing lost, nothing leaks, and the same loss and gradients as without them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

import instructft
from instructft.data.collator import CompletionOnlyCollator
from instructft.data.packing import best_fit, pack, position_ids, probe
from instructft.data.prepare import prepare
from instructft.errors import ModelError
from tests.helpers.plain_batches import loss_and_gradients

VOCABULARY = 97
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32},
    "llama": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
    "qwen2": {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "mistral": {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "sliding_window": 4,
    },
    "gpt_neox": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
}  # fmt: skip


def tiny(kind: str, attention: str) -> Any:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **special, **SHAPES[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # larger weights than a fresh model's, so that a leak would show
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def documents(n: int, seed: int = 0, longest: int = 12) -> Dataset:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        length = int(rng.integers(3, longest))
        ids = rng.integers(1, VOCABULARY, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return Dataset.from_list(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Assignment
# ---------------------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 40), max_size=80), seed=st.integers(0, 9))
def test_every_document_is_in_one_pack_and_every_pack_fits(lengths: list[int], seed: int) -> None:
    packs = best_fit(lengths, 40, seed)
    assert sorted(d for documents in packs for d in documents) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in documents) <= 40 for documents in packs)
    # best fit never opens a pack while another has room: at most one pack is half empty or less
    assert sum(2 * sum(lengths[d] for d in documents) <= 40 for documents in packs) <= 1


def test_it_is_best_fit_not_first_fit() -> None:
    # after 6 and 5 stand alone, 4 belongs to the 6 (which it fills), and 5 to the 5
    packs = best_fit([6, 5, 4, 5], 10)
    assert sorted(map(sorted, packs)) in ([[0, 2], [1, 3]],)


def test_fill_rate_on_lengths_like_those_of_chat_data() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.7, 5000).astype(int), 5, 1024)
    assert lengths.sum() / (len(best_fit(lengths, 1024)) * 1024) > 0.99


def test_a_document_that_is_too_long_is_refused_not_cut() -> None:
    with pytest.raises(ValueError, match="11 tokens does not fit a pack of 10"):
        best_fit([3, 11], 10)


def test_the_seed_changes_who_shares_a_pack_and_nothing_else() -> None:
    rows = documents(60)
    one, same, other = pack(rows, 24, 0), pack(rows, 24, 0), pack(rows, 24, 1)
    assert one[:] == same[:]
    assert one[:] != other[:]
    assert unpacked(one) == unpacked(other)


def unpacked(packs: Dataset) -> Counter:
    found: Counter = Counter()
    for row in packs:
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            found[tuple(row["input_ids"][part]), tuple(row["labels"][part])] += 1
            start += length
        assert start == len(row["input_ids"]) == len(row["labels"])
    return found


def test_documents_come_out_as_they_went_in() -> None:
    rows = documents(100)
    packs = pack(rows, 32)
    assert unpacked(packs) == Counter((tuple(r["input_ids"]), tuple(r["labels"])) for r in rows)
    assert max(len(r["input_ids"]) for r in packs) <= 32


def test_a_first_token_is_never_predicted_from_the_neighbours_last() -> None:
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4)  # train_on: everything
    for row in pack(rows, 9):
        start = 0
        for length in row["seq_lengths"]:
            assert row["labels"][start] == -100
            assert row["labels"][start + 1 : start + length] == [2, 3]
            start += length


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", SHAPES)
def test_packed_and_unpacked_have_the_same_loss_and_gradients(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    rows = documents(12)
    packs = pack(rows, 30)
    assert len(packs) < 5  # several documents a pack, several packs a batch, packs of unequal length
    collate = CompletionOnlyCollator(0)
    alone = loss_and_gradients(model, [collate([row]) for row in rows])
    together = loss_and_gradients(model, [collate(list(packs))])
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    for a, b in zip(alone[1], together[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", SHAPES)
def test_changing_one_document_leaves_its_neighbours_logits(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    lengths = [5, 4, 6]
    ids = torch.randint(1, VOCABULARY, (1, 15), generator=torch.Generator().manual_seed(3))
    positions = torch.from_numpy(position_ids(lengths, 15))[None]
    changed = ids.clone()
    changed[0, 5:9] = torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        one, two = (model(input_ids=x, position_ids=positions, use_cache=False).logits[0] for x in (ids, changed))
    outside = [*range(5), *range(9, 15)]
    torch.testing.assert_close(one[outside], two[outside], atol=1e-6, rtol=0)
    assert (one[5:9] - two[5:9]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The probe
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_probe_lets_clean_models_through(kind: str, attention: str) -> None:
    assert probe(tiny(kind, attention), "cpu") < 1e-5
    assert probe(tiny(kind, attention).to(torch.bfloat16), "cpu") < 5e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_probe_stops_opt(attention: str) -> None:
    config = AutoConfig.for_model(
        "opt", vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=32, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    with pytest.raises(ModelError) as caught:
        probe(model, "cpu")
    assert "OPTForCausalLM" in str(caught.value)
    assert "data.packing=false" in str(caught.value)
    assert model.training  # given back as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lfm2", "bloom"])
def test_a_small_leak_hides_behind_no_rounding(kind: str, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 2, "n_head": 2}
    more = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2} if kind == "lfm2" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, **sizes, **more)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with pytest.raises(ModelError, match="their gradient at its neighbour's tokens is"):
        probe(model, "cpu")


def test_a_mixture_of_experts_is_clean() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = AutoConfig.for_model("mixtral", vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    assert probe(AutoModelForCausalLM.from_config(config).to(torch.bfloat16), "cpu") < 5e-2


def test_a_packed_run_of_opt_stops_before_its_first_step(write_recipe: Any) -> None:
    text = """
model:
  config: {model_type: opt, hidden_size: 32, ffn_dim: 64, num_hidden_layers: 1, num_attention_heads: 2,
           word_embed_proj_dim: 32, max_position_embeddings: 128}
  tokenizer: quickstart
data: {datasets: [{name: quickstart, rows: 60}], template: instruction, max_length: 96, packing: true}
train: {max_steps: 2, use_cpu: true}
"""
    recipe = instructft.load_recipe(write_recipe(text))
    with pytest.raises(ModelError, match="OPTForCausalLM"):
        instructft.train(recipe, console=Console(quiet=True))
    unpacked_run = instructft.load_recipe(recipe.source, ["data.packing=false", f"output_dir={recipe.output_dir}-2"])
    assert instructft.train(unpacked_run, console=Console(quiet=True)).facts["train"]["steps"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# A whole run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_packed_run_counts_its_tokens(write_recipe: Any) -> None:
    recipe = instructft.load_recipe(
        write_recipe(), ["data.packing=true", "train.max_steps=-1", "train.num_train_epochs=2", "train.logging_steps=1"]
    )
    result = instructft.train(recipe, console=Console(quiet=True))
    data = prepare(recipe, instructft.load_tokenizer(recipe))
    assert "seq_lengths" in data.splits["train"].column_names
    facts = result.facts
    assert facts["train"]["tokens"] == 2 * data.tokens["train"] == 2 * facts["data"]["tokens"]
    assert facts["train"]["supervised_tokens"] == 2 * data.supervised_tokens["train"]
    assert facts["data"]["padding_share"] < 0.1
    records = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["num_tokens"] == facts["train"]["tokens"]


def test_packing_leaves_the_validation_loss_as_it_is(write_recipe: Any) -> None:
    losses = []
    for i, packing in enumerate(("true", "false")):
        overrides = [f"data.packing={packing}", "train.max_steps=1", "train.learning_rate=0.0"]
        recipe = instructft.load_recipe(write_recipe(), overrides)
        recipe = recipe.model_copy(update={"output_dir": f"{recipe.output_dir}-{i}"})
        losses.append(instructft.train(recipe, console=Console(quiet=True)).metrics["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_rows_with_branches_are_packed_with_them() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 2, 4], "labels": [-100, 2, 3, -100, 4], "seq_lengths": [3, 2], "seq_starts": [0, 1]},
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [3], "seq_starts": [0]},
        {"input_ids": [8, 9, 9], "labels": [-100, 9, 9], "seq_lengths": [3], "seq_starts": [0]},
    ]
    packs = {len(row["input_ids"]): row for row in pack(Dataset.from_list(rows), 8)}
    assert sorted(packs) == [3, 8]
    full = packs[8]
    assert full["seq_lengths"] == [3, 2, 3]
    assert full["seq_starts"] == [0, 1, 0]
    assert full["input_ids"][:5] == [1, 2, 3, 2, 4]
    assert full["labels"][5] == -100
    assert position_ids(full["seq_lengths"], 9, full["seq_starts"]).tolist() == [0, 1, 2, 1, 2, 0, 1, 2, 0]
