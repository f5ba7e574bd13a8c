"""A model that starts from random weights is the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from instructft import load_model, load_recipe, load_tokenizer


def test_random_weights_depend_on_the_seed_alone(write_recipe: Any) -> None:
    asked = load_recipe(write_recipe())
    tokenizer = load_tokenizer(asked)
    torch.manual_seed(123)
    one = load_model(asked, tokenizer)
    torch.rand(7)
    two = load_model(asked, tokenizer)
    other = load_model(load_recipe(asked.source, ["train.seed=1"]), tokenizer)
    assert torch.equal(one.transformer.wte.weight, two.transformer.wte.weight)
    assert not torch.equal(one.transformer.wte.weight, other.transformer.wte.weight)
    assert one.config.vocab_size == len(tokenizer)


def test_settings_of_generation_that_cannot_be_saved_are_taken_out(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from instructft.models.load import fit_special_tokens

    generation = tiny_model.generation_config
    generation.early_stopping, generation.length_penalty, generation.max_length = True, 0.8, 77
    fit_special_tokens(tiny_model, tokenizer)
    tiny_model.save_pretrained(tmp_path)
    assert (generation.max_length, bool(generation.do_sample)) == (77, False)
    said = capsys.readouterr().err
    assert "generation_config.early_stopping: found True" in said
    assert "generation_config.length_penalty: found 0.8" in said


def test_the_pad_token_that_positions_are_counted_from_stays(tokenizer: Any) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForCausalLM

    from instructft.models.load import fit_special_tokens

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    pad = tokenizer.pad_token_id
    config = RobertaConfig(vocab_size=len(tokenizer), is_decoder=True, pad_token_id=pad + 7, **sizes)
    model = RobertaForCausalLM(config).eval()
    fit_special_tokens(model, tokenizer)
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (pad + 7, pad)
    again = RobertaForCausalLM(model.config).eval()
    again.load_state_dict(model.state_dict())
    ids = torch.arange(20, 30)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=len(tokenizer), pad_token_id=pad + 7))
    fit_special_tokens(other, tokenizer)
    assert other.config.pad_token_id == pad
