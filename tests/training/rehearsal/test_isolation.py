"""Packs are proved clean under the attention that trains them; one chosen here gives way, one that is named stops."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

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


def test_a_model_that_fails_on_a_pack_is_refused_with_the_way_out(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of(GPT2, "data.packing=true", "model.attn_implementation=sdpa"))

    def fails(*_: Any) -> None:
        raise RuntimeError("split_with_sizes expects split_sizes to sum exactly to 160\nand so on")

    trainer.model.transformer.register_forward_pre_hook(fails)
    with pytest.raises(ModelError, match=r"cannot be asked.*sum exactly to 160\); set data.packing=false"):
        prove_isolation(trainer, Attention("sdpa"), 96, Console(quiet=True))
