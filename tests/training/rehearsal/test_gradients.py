"""What the loss does not reach is left out before the first step, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

import instructft
from instructft.errors import InstructftError
from instructft.training.rehearsal import gradients
from instructft.training.rehearsal.gradients import leave_out_unreached
from instructft.training.rehearsal.rehearse import short_batch
from tests.helpers.device import on
from tests.helpers.rehearsal import trainer_of

JAMBA = (
    "{model_type: jamba, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48, "
    "num_key_value_heads: 2, num_experts: 2, num_experts_per_tok: 1, use_mamba_kernels: false, attn_layer_offset: 1, "
    "attn_layer_period: 2, expert_layer_period: 2, expert_layer_offset: 1}"
)
GPT2 = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128}"
UNTIED = GPT2.replace("}", ", tie_word_embeddings: false}")
LORA = ("adapter.type=lora", "adapter.dropout=0", "train.learning_rate=1e-2")


def looked(trainer: Any) -> Any:
    return leave_out_unreached(trainer, on(trainer.model, short_batch(trainer, trainer.train_dataset[0])))


def test_all_of_a_plain_model_is_reached(recipe_of: Callable[..., Any]) -> None:
    for overrides in ((), LORA):
        trainer = trainer_of(recipe_of(GPT2, *overrides))
        trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
        found = looked(trainer)
        assert (found.left_out, found.absent) == ([], [])
        assert [name for name, weight in trainer.model.named_parameters() if weight.requires_grad] == trained


def test_a_target_that_is_read_past_its_adapter_is_left_out_and_the_rest_is_trained(
    recipe_of: Callable[..., Any],
) -> None:
    recipe = recipe_of(JAMBA, *LORA)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    result = instructft.train(recipe, console=Console(quiet=True))
    assert result.facts["rehearsal"]["left_out"] == ["model.layers.0.mamba.dt_proj"]
    assert result.facts["adapter"]["moved"]
    adapted = PeftModel.from_pretrained(base, str(result.output_dir))
    names = {name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert names
    assert not [name for name in names if name.endswith("dt_proj")]


def test_a_weight_that_takes_no_part_is_frozen(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of())
    trainer.model.transformer.tower = torch.nn.Linear(4, 4)
    found = looked(trainer)
    assert found.left_out == ["transformer.tower.bias", "transformer.tower.weight"]
    assert not trainer.model.transformer.tower.weight.requires_grad
    assert "2 weights, which are not trained: transformer.tower.bias" in found.lines(str)[0]


def test_an_expert_without_a_token_is_still_trained(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of())
    experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))
    layer = trainer.model.transformer.h[0]
    layer.experts, inner = experts, layer.mlp.forward
    layer.mlp.forward = lambda x: inner(x) + experts[1](x)
    found = looked(trainer)
    assert found.left_out == []
    assert "transformer.h.0.experts.0.weight" in found.may_stay


SIZES = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48"
LLAMA = f"{{model_type: llama, {SIZES}, tie_word_embeddings: TIED}}"
MIXTURE = f"{{model_type: phimoe, {SIZES}, num_key_value_heads: 2, num_local_experts: 4, num_experts_per_tok: 2}}"


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (LLAMA.replace("TIED", "true"), ()),
        (LLAMA.replace("TIED", "false"), ("train.gradient_checkpointing=true",)),
        (LLAMA.replace("TIED", "false"), (*LORA, "adapter.modules_to_save=[lm_head]")),
        (LLAMA.replace("TIED", "false"), ("train.bf16=true",)),
        (JAMBA, ()),
        (MIXTURE, ()),
    ],
    ids=["tied", "checkpointing", "adapter", "bfloat16", "jamba", "mixture"],
)
def test_a_product_with_a_gradient_tells_of_a_weight_what_the_gradient_does(
    recipe_of: Callable[..., Any], config: str, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(recipe_of(config, *overrides))
    named = dict(trainer.model.named_modules())
    up = next(layer for name, layer in named.items() if name.endswith(("up_proj", "out_proj", "k_proj")))
    getattr(up, "base_layer", up).register_forward_hook(lambda layer, args, out: out.detach())  # no gradient
    inner = [layer for name, layer in named.items() if ".layers." in name and type(layer) is torch.nn.Linear]
    inner[-1].register_forward_hook(lambda layer, args, out: out * 0.0)  # a gradient of zeros
    batch = on(trainer.model, short_batch(trainer, trainer.train_dataset[0]))
    wanted = [weight.requires_grad for weight in trainer.model.parameters()]
    found = []
    for large in (1, 1 << 30):
        monkeypatch.setattr(gradients, "LARGE", large)
        torch.manual_seed(0)
        found.append(gradients._gradients(trainer, batch, training=True))
        assert [weight.requires_grad for weight in trainer.model.parameters()] == wanted
    assert found[0] == found[1]
    reached, moving = found[0]
    assert moving < reached


def test_a_large_weight_that_is_read_past_its_layer_is_reached(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "LARGE", 1)
    trainer = trainer_of(recipe_of())
    layer = trainer.model.transformer.h[0]
    layer.past, inner = torch.nn.Linear(32, 32), layer.mlp.forward
    layer.mlp.forward = lambda x: inner(x) @ layer.past.weight
    found = looked(trainer)
    assert found.left_out == ["transformer.h.0.past.bias"]


def test_rows_of_tokens_that_do_not_occur_are_said_and_the_run_is_kept(recipe_of: Callable[..., Any]) -> None:
    recipe = recipe_of(UNTIED, *LORA)
    rows = instructft.prepare_dataset(recipe, instructft.load_tokenizer(recipe))["train"]
    there = {token for row in rows for token in row["input_ids"]}
    absent = sorted(set(range(300)) - there)[:2]
    recipe = recipe_of(UNTIED, *LORA, f"adapter.trainable_token_indices={absent}")
    result = instructft.train(recipe, console=Console(quiet=True))
    assert any("2 tokens are trained that no training row holds" in line for line in result.facts["rehearsal"]["said"])
    assert len(result.facts["adapter"]["stayed"]) == 1


def test_a_model_that_learns_nothing_is_refused(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of())
    for weight in trainer.model.parameters():
        weight.requires_grad_(False)
    trainer.model.transformer.tower = torch.nn.Linear(4, 4)
    with pytest.raises((InstructftError, RuntimeError)):
        looked(trainer)


def test_the_saved_model_loads(recipe_of: Callable[..., Any]) -> None:
    result = instructft.train(recipe_of(JAMBA), console=Console(quiet=True))
    assert AutoModelForCausalLM.from_pretrained(result.output_dir).config.model_type == "jamba"
