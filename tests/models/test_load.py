"""A model that starts from random weights is the same again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def test_settings_of_generation_are_left_out_of_what_is_saved(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A server answers by them unasked, and some of them cannot be saved at all (`early_stopping` without beams)."""
    from transformers import GenerationConfig

    from instructft.models.load import answer_plainly, fit_special_tokens

    generation = tiny_model.generation_config
    brought = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    brought |= {"early_stopping": True, "length_penalty": 0.8, "max_new_tokens": 20, "suppress_tokens": [5]}
    for name, value in brought.items():
        setattr(generation, name, value)
    stop = tokenizer.eos_token_id
    generation.eos_token_id = [stop, 7]
    assert answer_plainly(GenerationConfig(**brought)) == brought
    fit_special_tokens(tiny_model, tokenizer)
    tiny_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    assert saved.items() >= {"bos_token_id": bos, "pad_token_id": pad}.items()
    assert saved["eos_token_id"] == [stop, 7]
    assert not saved.get("do_sample")
    assert not saved.keys() & (brought.keys() - {"do_sample"})


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
