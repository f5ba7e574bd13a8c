"""The class that a config names builds its checkpoint, and what text does not reach is told apart from what it does."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config, LlamaConfig

from instructft.errors import UsageError
from instructft.weights.model_class import (
    auto_class,
    backbone,
    freeze_named,
    freeze_towers,
    name_blocks_that_are_there,
    refuse_what_does_not_answer,
    text_module,
    towers,
    towers_in_words,
)
from tests.helpers.towers import SECTIONS, config_of

# Its own forward asks its text model for `image_outputs`, which that does not give; nothing of this package takes part.
BROKEN = pytest.mark.xfail(version("transformers") == "5.24.0", raises=AttributeError, reason="transformers 5.24.0")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=BROKEN) if k == "llama4" else k for k in SECTIONS])
def test_what_text_does_not_reach_is_frozen_and_nothing_else(kind: str) -> None:
    config = config_of(kind, 100)
    assert auto_class(config) is AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_config(config).train()
    ids = torch.randint(0, 80, (2, 20))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum().backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    found = freeze_towers(model)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == reached
    assert found
    assert sum(tower.parameters for tower in found) == sum(
        weight.numel() for weight in model.parameters() if not weight.requires_grad
    )
    assert "vision tower" in {tower.kind for tower in found}
    assert found[0].name in towers_in_words(found)
    assert torch.is_tensor(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_the_blocks_that_are_divided_among_processes_are_those_that_are_there(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(kind, 1490))
    there = {type(module).__name__ for module in model.modules()}
    assert not set(model._no_split_modules) <= there  # what accelerate stops at, whatever else is right
    name_blocks_that_are_there(model)
    assert set(model._no_split_modules) <= there
    assert any("DecoderLayer" in name for name in model._no_split_modules)


def test_a_model_of_text_alone_has_no_towers() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    model = AutoModelForCausalLM.from_config(config)
    assert auto_class(config) is AutoModelForCausalLM
    assert towers(model) == []
    assert text_module(model) is model
    assert backbone(model) is model.transformer


@pytest.mark.parametrize(
    ("kind", "named", "wanted"),
    [
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], "AutoModelForImageTextToText"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        ("qwen3_5", None, "AutoModelForImageTextToText"),
        ("qwen3_5_text", ["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        ("llama4", ["Llama4ForConditionalGeneration"], "AutoModelForImageTextToText"),
        ("voxtral", ["VoxtralForConditionalGeneration"], "AutoModelForMultimodalLM"),
        ("t5gemma2", ["T5Gemma2ForConditionalGeneration"], "AutoModelForCausalLM"),  # which refuses it
    ],
)
def test_the_class_is_the_one_that_the_config_names(kind: str, named: list[str] | None, wanted: str) -> None:
    assert auto_class(AutoConfig.for_model(kind, architectures=named)).__name__ == wanted


def test_a_class_of_the_checkpoints_own_code_is_taken_as_it_is_registered() -> None:
    config = LlamaConfig()
    config.auto_map = {"AutoModelForImageTextToText": "modeling_own.OwnModel"}
    assert auto_class(config) is AutoModelForImageTextToText


def test_a_pattern_freezes_what_it_names_and_what_lies_in_it() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=12, n_embd=8, n_head=1, vocab_size=10))
    found = freeze_named(model, [r"transformer\.h\.1", r"lm_head"])
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == {
        *(name for name, _ in model.named_parameters() if name.startswith("transformer.h.1.")),
        "transformer.wte.weight",  # it is the head too
    }
    assert "lm_head.weight" in found


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([r"transformer\.h\.7"], r"model\.freeze: nothing in GPT2LMHeadModel is called transformer\\.h\\.7"),
        (["transformer"], "leave nothing of GPT2LMHeadModel to be trained"),
    ],
)
def test_a_pattern_without_a_meaning_is_refused(patterns: list[str], message: str) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(UsageError, match=message):
        freeze_named(model, patterns)


def test_what_has_the_form_of_a_language_model_and_is_none_is_refused_by_its_config() -> None:
    refuse_what_does_not_answer(LlamaConfig())
    for kind, why in {"moshi": "it speaks", "musicgen": "makes music", "xlm": "puts a mask behind"}.items():
        with pytest.raises(UsageError, match=f"of type {kind} cannot be trained to answer: .*{why}"):
            refuse_what_does_not_answer(AutoConfig.for_model(kind))
