"""Models that read what stands behind a token, or the pads beside a row, are found before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from instructft.errors import ModelError
from instructft.training.rehearsal.head import OwnPass
from instructft.training.rehearsal.padding import refuse_rows_that_see_padding, refuse_what_looks_ahead, shorter_row
from instructft.training.rehearsal.rehearse import as_it_was, short_batch
from tests.helpers.device import on
from tests.helpers.rehearsal import trainer_of

BERT = (
    "{model_type: bert, is_decoder: true, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 48, max_position_embeddings: 128}"
)


def asked(question: Callable[..., Any], trainer: Any) -> Any:
    """A question of a model before its first step, on the batch of a rehearsal."""
    with as_it_was(trainer):
        batch = on(trainer.model, short_batch(trainer, trainer.train_dataset[0]))
        own, short = OwnPass.of(trainer, batch), shorter_row(batch)
        return question(trainer, batch, own, OwnPass.of(trainer, short[0]) if short else own)


def looked(trainer: Any) -> float | None:
    found: float | None = asked(refuse_rows_that_see_padding, trainer)
    return found


def reads_pads(trainer: Any) -> Any:
    """Let the model take the mean of all positions into each, pads included."""
    trainer.model.bert.embeddings.register_forward_hook(lambda module, args, out: out + out.mean(dim=1, keepdim=True))
    return trainer


def test_a_model_that_passes_over_padding_is_let_through(recipe_of: Callable[..., Any]) -> None:
    found = looked(trainer_of(recipe_of(BERT)))
    assert found is not None
    assert found < 1e-5


def test_one_that_reads_it_is_refused_unless_rows_are_alone(recipe_of: Callable[..., Any]) -> None:
    recipe = recipe_of(BERT)
    with pytest.raises(ModelError, match=r"does not pass over padding.*per_device_train_batch_size=1"):
        looked(reads_pads(trainer_of(recipe)))
    alone = ("train.per_device_train_batch_size=1", "train.per_device_eval_batch_size=1")
    assert looked(reads_pads(trainer_of(recipe_of(BERT, *alone)))) is None


def test_packs_are_not_asked(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of("{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32}"))
    batch = {"input_ids": torch.ones(2, 4), "position_ids": torch.ones(2, 4), "attention_mask": torch.zeros(2, 4)}
    nothing: Any = None
    assert refuse_rows_that_see_padding(trainer, batch, nothing, nothing) is None


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_that_reads_both_ways_is_refused(recipe_of: Callable[..., Any], packing: bool) -> None:
    def ask(config: str) -> None:
        trainer = trainer_of(recipe_of(config, f"data.packing={packing}".lower(), "model.attn_implementation=eager"))
        asked(refuse_what_looks_ahead, trainer)

    ask(BERT)
    with pytest.raises(ModelError, match=r"BertLMHeadModel \(bert\) reads both ways.*is_decoder: true"):
        ask(BERT.replace("is_decoder: true", "is_decoder: false"))


CPM_ANT = (
    "{model_type: cpmant, hidden_size: 32, num_attention_heads: 2, dim_head: 16, dim_ff: 48, num_hidden_layers: 2, "
    "prompt_length: 4}"
)


def test_one_that_puts_a_prompt_of_its_own_before_the_text_is_asked_too(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of(CPM_ANT))
    with pytest.raises(ModelError, match=r"CpmAntForCausalLM \(cpmant\) reads both ways"):
        asked(refuse_what_looks_ahead, trainer)


GEMMA = (
    "{model_type: gemma, use_bidirectional_attention: true, hidden_size: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16, intermediate_size: 48}"
)


def test_one_that_reads_both_ways_only_where_no_row_is_padded_is_refused(recipe_of: Callable[..., Any]) -> None:
    def ask(config: str) -> None:
        asked(refuse_what_looks_ahead, trainer_of(recipe_of(config, "model.attn_implementation=sdpa")))

    with pytest.raises(ModelError, match=r"reads both ways.*overrides=\{use_bidirectional_attention: false\}"):
        ask(GEMMA)
    ask(GEMMA.replace("true", "false"))


def test_one_that_reads_both_ways_only_beside_another_row_is_refused(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of(BERT))

    def mixed(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + out.mean(dim=1, keepdim=True) if len(out) > 1 else out

    trainer.model.bert.embeddings.register_forward_hook(mixed)
    with pytest.raises(ModelError, match="reads both ways"):
        asked(refuse_what_looks_ahead, trainer)
