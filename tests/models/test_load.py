"""A model that starts from random weights is the same again."""

from __future__ import annotations

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
