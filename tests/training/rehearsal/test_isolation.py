"""Packs are proved clean under the attention that trains them; one chosen here gives way, one that is named stops."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers.models.lfm2 import modeling_lfm2

import instructft
from instructft.errors import ModelError
from instructft.models.attention import Attention, switch_attention
from instructft.models.kernels import varlen
from instructft.training.rehearsal.isolation import prove_isolation
from tests.helpers.rehearsal import trainer_of

GPT2 = ("{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128, resid_pdrop: 0.0, embd_pdrop: 0.0, "
        "attn_pdrop: 0.0}")  # fmt: skip
OPT = ("{model_type: opt, hidden_size: 32, num_hidden_layers: 2, ffn_dim: 64, num_attention_heads: 2, "
       "word_embed_proj_dim: 32, max_position_embeddings: 128, dropout: 0.0, attention_dropout: 0.0}")  # fmt: skip


@pytest.fixture
def proved(recipe_of: Callable[..., Any]) -> Callable[..., tuple[Any, Attention, str]]:
    """A trainer with the attention `varlen`, the attention that was proved, and what was said."""

    def prove(config: str, may_change: bool, broken: Callable[[Any], Any] = lambda trainer: None) -> Any:
        trainer = trainer_of(recipe_of(config, "data.packing=true", "model.attn_implementation=varlen"))
        attention = switch_attention(trainer.model, Attention("varlen", may_change=may_change))
        trainer.data_collator.flatten = True
        broken(trainer)
        said = io.StringIO()
        return trainer, prove_isolation(trainer, attention, 96, Console(file=said, width=400)), said.getvalue()

    return prove


@pytest.mark.parametrize("config", [GPT2, OPT], ids=["gpt2", "opt"])
def test_borders_keep_documents_apart(proved: Any, config: str) -> None:
    trainer, attention, said = proved(config, may_change=True)
    assert attention.name == "varlen"
    assert "packs are clean: no gradient from a document to its neighbour in a pack of 96 tokens" in said
    assert trainer.data_collator.flatten
    assert trainer.model.training  # as it was


@pytest.mark.parametrize(("attention", "dtype"), [("varlen", torch.bfloat16), ("sdpa", torch.float32)])
def test_a_kernel_is_proved_in_the_precision_of_a_step(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, attention: str, dtype: torch.dtype
) -> None:
    trainer = trainer_of(recipe_of(GPT2, "data.packing=true", "train.bf16=true"))
    found = switch_attention(trainer.model, Attention(attention))
    seen: set[torch.dtype] = set()
    trainer.model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    real = varlen.by_document

    def watch(q: Any, *rest: Any) -> Any:
        seen.add(q.dtype)
        return real(q, *rest)

    monkeypatch.setattr(varlen, "by_document", watch)
    said = io.StringIO()
    assert prove_isolation(trainer, found, 96, Console(file=said, width=400)) == found
    assert "packs are clean" in said.getvalue()
    assert seen == {dtype}


def unseen_dropout(trainer: Any) -> None:
    for block in trainer.model.transformer.h:
        block.attn.attn_dropout.p = 0.3


def one_key_short(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """A kernel that sees one key less than it should: documents stay apart, and are not what they are alone."""
    real = varlen.by_document

    def wrong(q: Any, k: Any, v: Any, borders: Any, scale: float, left: int) -> Any:
        return real(q, k, v, borders, scale, 10)

    return lambda trainer: monkeypatch.setattr(varlen, "by_document", wrong)


def across_a_border(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    real = varlen.by_document

    def wrong(q: Any, k: Any, v: Any, borders: Any, scale: float, left: int) -> Any:
        return real(q, k, v, borders[[0, -1]], scale, left)

    return lambda trainer: monkeypatch.setattr(varlen, "by_document", wrong)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (unseen_dropout, "attention varlen cannot compute dropout in attention"),
        (one_key_short, "lets documents of a pack see each other"),
        (across_a_border, "lets documents of a pack see each other"),
    ],
)
def test_what_fails_gives_way_to_a_mask_or_stops(
    proved: Any, monkeypatch: pytest.MonkeyPatch, fault: Any, words: str
) -> None:
    broken = fault if fault is unseen_dropout else fault(monkeypatch)
    trainer, attention, said = proved(GPT2, may_change=True, broken=broken)
    assert attention.name == "sdpa"
    assert words in attention.why
    assert "attention: sdpa (not varlen: " in said
    assert "packs are clean" in said
    assert not trainer.data_collator.flatten
    with pytest.raises(ModelError, match=words):
        proved(GPT2, may_change=False, broken=broken)


LFM2 = (
    "{model_type: lfm2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, "
    "layer_types: [conv, full_attention], block_ff_dim: 48, max_position_embeddings: 128}"
)


def convolution(states: Any, weight: Any, bias: Any = None, seq_idx: Any = None, **_: Any) -> Any:
    """What the kernel computes: states (B, D, T), weight (D, K), and nothing of another document, seq_idx (B, T)."""
    out = torch.zeros_like(states)
    for back in range(weight.shape[-1]):
        moved = torch.nn.functional.pad(states, (back, 0))[..., : states.shape[-1]]
        if seq_idx is not None and back:
            before = torch.nn.functional.pad(seq_idx, (back, 0), value=-1)[..., : states.shape[-1]]
            moved = moved * (before == seq_idx)[:, None]
        out = out + moved * weight[:, -1 - back, None]
    return out if bias is None else out + bias[:, None]


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """Rows of very unlike lengths, of which packs save much."""
    rows = [{"instruction": f"Say {i}.", "output": f"{i} " * (30 if i % 4 == 0 else 2)} for i in range(24)]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.datasets=[{{path: {path}}}]"


def ran(recipe: Any) -> tuple[Any, list[float], str]:
    """The facts of a run, its losses step by step with that of its validation, and what it printed."""
    said = io.StringIO()
    result = instructft.train(recipe, console=Console(file=said, width=400))
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    return result, [row[key] for row in rows for key in ("loss", "eval_loss") if key in row], said.getvalue()


def test_a_kernel_that_wants_the_numbers_of_documents_gets_them(
    recipe_of: Callable[..., Any], uneven: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of what is held out is the same in packs and alone, where the kernel is there."""
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", convolution)
    settings = [uneven, "data.splits={validation: 0.4}", "train.learning_rate=0", "train.max_steps=1"]
    recipe = recipe_of(LFM2, *settings, "data.packing=auto")
    result, packed, said = ran(recipe)
    assert "packs are clean by the numbers of their documents (seq_idx)" in said
    assert instructft.load_recipe(result.output_dir / "recipe.yaml").data.packing is True
    _, plain, _ = ran(recipe_of(LFM2, *settings, f"output_dir={result.output_dir}-plain"))
    assert packed[-1] == pytest.approx(plain[-1], abs=1e-5)


def test_auto_trains_rows_where_packs_are_not_clean_and_says_what_that_costs(
    recipe_of: Callable[..., Any], uneven: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("instructft.training.run")
    made: list[str] = []  # what the run is made of is told once, of what is trained
    whole = module.identity
    monkeypatch.setattr(
        module, "identity", lambda recipe, *rest: made.append(recipe.data.packing) or whole(recipe, *rest)
    )
    result, found, said = ran(recipe_of(LFM2, uneven, "data.packing=auto", "train.max_steps=2"))
    assert made == [False]
    assert "lets documents of a pack see each other" in said
    assert "Install `causal_conv1d` to train on packed sequences" in said
    assert "auto takes batches of rows of like length in place of packs: 3 micro-batches of 4 rows a step" in said
    kept = instructft.load_recipe(result.output_dir / "recipe.yaml")
    assert (kept.data.packing, kept.train["gradient_accumulation_steps"]) == (False, 3)
    settings = ["train.gradient_accumulation_steps=3", f"output_dir={result.output_dir}-plain"]
    _, plain, _ = ran(recipe_of(LFM2, uneven, *settings, "train.max_steps=2"))
    assert found == pytest.approx(plain, abs=1e-5)
    with pytest.raises(ModelError, match=r"data\.packing=false \(.*auto takes them by itself"):
        ran(recipe_of(LFM2, uneven, "data.packing=true", f"output_dir={result.output_dir}-packed"))


def test_auto_resumes_as_it_began(recipe_of: Callable[..., Any], uneven: str) -> None:
    settings = [uneven, "data.packing=auto", "train.save_strategy=steps", "train.save_steps=1"]
    settings.append("train.lr_scheduler_type=constant")
    first, _, _ = ran(recipe_of(LFM2, *settings, "train.max_steps=1"))
    again, _, said = ran(recipe_of(LFM2, *settings, "train.max_steps=2"))
    assert "see each other" not in said
    assert again.facts["train"]["steps"] == 2
    assert again.output_dir == first.output_dir


def test_auto_packs_where_it_saves_a_tenth(recipe_of: Callable[..., Any], uneven: str) -> None:
    trainer = trainer_of(recipe_of(GPT2, uneven, "data.packing=auto"))
    assert "seq_lengths" in trainer.train_dataset.column_names
    trainer = trainer_of(recipe_of(GPT2, uneven, "data.packing=auto", "data.max_length=16"))
    assert "seq_lengths" not in trainer.train_dataset.column_names


GPT_OSS = (
    "{model_type: gpt_oss, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, "
    "head_dim: 16, intermediate_size: 48, num_local_experts: 4, num_experts_per_tok: 2, sliding_window: 16, "
    "layer_types: [sliding_attention, full_attention], max_position_embeddings: 128}"
)


def test_a_model_that_makes_no_mask_from_positions_is_given_one(recipe_of: Callable[..., Any], uneven: str) -> None:
    """gpt-oss builds its masks without `position_ids` (transformers 5.23)."""
    settings = [uneven, "data.splits={validation: 0.4}", "train.learning_rate=0", "train.max_steps=1"]
    result, packed, said = ran(recipe_of(GPT_OSS, *settings, "data.packing=true"))
    assert "packs are clean" in said
    _, plain, _ = ran(recipe_of(GPT_OSS, *settings, f"output_dir={result.output_dir}-plain"))
    assert packed[-1] == pytest.approx(plain[-1], abs=1e-5)


def test_a_model_that_fails_on_a_pack_is_refused_with_the_way_out(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of(GPT2, "data.packing=true", "model.attn_implementation=sdpa"))

    def fails(*_: Any) -> None:
        raise RuntimeError("split_with_sizes expects split_sizes to sum exactly to 160\nand so on")

    trainer.model.transformer.register_forward_pre_hook(fails)
    with pytest.raises(ModelError, match=r"cannot be asked.*sum exactly to 160\); set data.packing=false"):
        prove_isolation(trainer, Attention("sdpa"), 96, Console(quiet=True))
