"""The head that training takes computes what the model's own logits say, whatever the model does to make them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import instructft
from instructft.training.rehearsal.head import (
    ROUNDED,
    TOLERANCE,
    Head,
    OwnPass,
    choose_head,
    compare,
    precision_of,
    tolerance,
)
from instructft.training.rehearsal.rehearse import short_batch
from tests.helpers.device import near, on
from tests.helpers.rehearsal import trainer_of
from tests.training.rehearsal.conftest import GPT2

SIZES = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48"
DENSE_HEAD = f"{{model_type: modernbert-decoder, {SIZES}, global_attn_every_n_layers: 1}}"
SOFT_CAP = (
    "{model_type: recurrent_gemma, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 96, lru_width: 32, attention_window_size: 16, block_types: [recurrent, attention], "
    "logits_soft_cap: 8.0}"
)
MIXTURE = f"{{model_type: granitemoe, {SIZES}, num_key_value_heads: 2, num_local_experts: 4, num_experts_per_tok: 2}}"
NO_EXPERTS = (
    "{model_type: jamba, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48, "
)
NO_EXPERTS += (
    "num_key_value_heads: 2, num_experts: 1, use_mamba_kernels: false, attn_layer_offset: 1, attn_layer_period: 2}"
)


def chosen(trainer: Any) -> tuple[Head, dict[str, torch.Tensor]]:
    batch = on(trainer.model, short_batch(trainer, trainer.train_dataset[0]))
    trainer.model.eval()
    head, _ = choose_head(trainer, batch)
    return head, batch


def apart(trainer: Any, batch: dict[str, torch.Tensor]) -> float:
    return compare(trainer, batch, OwnPass.of(trainer, batch))


def test_a_plain_head_stays_fused(recipe_of: Callable[..., Any]) -> None:
    head, _ = chosen(trainer_of(recipe_of()))
    assert (head.kind, head.why) == ("fused", "")
    assert head.difference is not None
    assert head.difference < TOLERANCE


@pytest.mark.parametrize("kind", ["bloom", "biogpt"])
def test_a_plain_head_stays_fused_where_one_token_is_all_but_certain(recipe_of: Callable[..., Any], kind: str) -> None:
    sizes = SIZES.replace("hidden_size: 32", "hidden_size: 64")
    trainer = trainer_of(recipe_of(f"{{model_type: {kind}, {sizes}}}"))
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.mul_(3.0 if weight.dim() > 1 else 1.0)
    head, _ = chosen(trainer)
    assert (head.kind, head.why) == ("fused", "")


def test_the_head_is_asked_in_the_precision_of_the_run(recipe_of: Callable[..., Any]) -> None:
    """Before training accelerate has wrapped nothing in autocast: float32 would be compared where bfloat16 trains."""
    trainer = trainer_of(recipe_of(GPT2, "train.bf16=true"))
    seen = []
    trainer.model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    layers = trainer.model.transformer.h[0].mlp.c_fc
    layers.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    head, batch = chosen(trainer)
    assert head.kind == "fused"
    assert set(seen) == {torch.bfloat16}
    assert 1e-6 < apart(trainer, batch) < tolerance(trainer) == ROUNDED
    assert precision_of(trainer) == torch.bfloat16


@pytest.mark.parametrize("config", [DENSE_HEAD, SOFT_CAP], ids=["dense", "soft cap"])
def test_logits_that_are_more_than_a_product_are_trained_as_they_are(
    recipe_of: Callable[..., Any], config: str
) -> None:
    trainer = trainer_of(recipe_of(config))
    batch = on(trainer.model, short_batch(trainer, trainer.train_dataset[0]))
    trainer.model.eval()
    assert apart(trainer, batch) > TOLERANCE
    head, _ = choose_head(trainer, batch)
    assert head.kind == "logits"
    assert "differ by" in head.why
    assert apart(trainer, batch) < near(1e-6)


def test_a_cap_shows_where_logits_are_far_below_it(recipe_of: Callable[..., Any]) -> None:
    """As in a model that is not trained yet: at their own size the states tell nothing."""
    trainer = trainer_of(recipe_of(SOFT_CAP))
    batch = on(trainer.model, short_batch(trainer, trainer.train_dataset[0]))
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(1e-2)
        assert float(trainer.model(**batch).logits.abs().max()) < 0.1
    trainer.model.eval()
    assert apart(trainer, batch) > TOLERANCE


class Doubled(torch.autograd.Function):
    """The same values, and twice the gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


def test_a_head_of_the_right_loss_and_another_gradient_is_found(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of())
    fused = trainer.model.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = fused(*args, **kwargs)
        for name in ("log_probs", "nll") if kwargs.get("fused_lm_head") else ():
            if isinstance(value := getattr(out, name, None), torch.Tensor):
                setattr(out, name, Doubled.apply(value))
        return out

    trainer.model.forward = wrong
    head, _ = chosen(trainer)
    assert head.kind == "logits"
    assert head.difference == pytest.approx(1.0, abs=0.01)


KINDS = [GPT2, f"{{model_type: llama, {SIZES}}}", f"{{model_type: gemma3_text, {SIZES}, num_key_value_heads: 2}}"]


@pytest.mark.parametrize("config", [*KINDS, MIXTURE])
def test_the_layers_are_gone_through_once(recipe_of: Callable[..., Any], config: str) -> None:
    trainer = trainer_of(recipe_of(config))
    calls = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda module, args, out: calls.append(1))
    assert chosen(trainer)[0].kind == "fused"
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["position_ids", "attention_mask"])
def test_a_loss_that_comes_from_other_inputs_is_found(recipe_of: Callable[..., Any], name: str) -> None:
    trainer = trainer_of(recipe_of())
    fused = trainer.model.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            places = torch.ones_like(kwargs["input_ids"]).cumsum(-1)
            kwargs[name] = places + 7 if name == "position_ids" else kwargs["attention_mask"] * (places > 3)
        return fused(*args, **kwargs)

    trainer.model.forward = wrong
    head, _ = chosen(trainer)
    assert head.kind == "logits"
    assert head.difference is not None
    assert head.difference > TOLERANCE


def test_a_router_is_trained_by_the_loss_that_the_model_makes(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of(MIXTURE))
    del trainer.model.config.num_experts
    head, _ = chosen(trainer)
    assert head.kind == "logits"
    assert "fails on GraniteMoeForCausalLM" in head.why
    assert trainer.aux_loss_enabled


def test_experts_of_another_name_leave_the_head_fused_with_the_routers_own_loss(
    recipe_of: Callable[..., Any],
) -> None:
    trainer = trainer_of(recipe_of(MIXTURE))
    head, batch = chosen(trainer)
    assert (head.kind, head.why) == ("fused", "")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        own = trainer.model(**inputs, output_router_logits=True, use_cache=False).aux_loss
        ours = trainer.model(**batch, output_router_logits=True, use_cache=False, fused_lm_head=True).aux_loss
    assert float(own) > 0
    torch.testing.assert_close(ours, own)


def test_a_router_that_is_none_has_no_loss(recipe_of: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe_of(NO_EXPERTS))
    head, _ = chosen(trainer)
    assert head.kind == "fused"
    assert "no loss of a router" in head.why
    assert not trainer.aux_loss_enabled
    asked = trainer_of(recipe_of(NO_EXPERTS, "train.router_aux_loss_coef=0.1"))
    with pytest.raises(instructft.InstructftError, match=r"router_aux_loss_coef: found 0\.1"):
        chosen(asked)


def test_the_validation_loss_of_a_run_is_that_of_the_saved_model(recipe_of: Callable[..., Any]) -> None:
    recipe = recipe_of(DENSE_HEAD, "train.learning_rate=1e-2")
    result = instructft.train(recipe, console=Console(quiet=True))
    model = AutoModelForCausalLM.from_pretrained(result.output_dir).eval()
    rows = instructft.prepare_dataset(recipe, instructft.load_tokenizer(recipe))["validation"]
    total = count = 0.0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits.detach()[0, :-1].log_softmax(-1)
        kept = labels != -100
        total -= float(log_p[kept, labels[kept]].sum())
        count += int(kept.sum())
    assert result.metrics["eval_loss"] == pytest.approx(total / count, abs=near(1e-5))
    assert result.facts["rehearsal"]["head"] == "logits"


OLMOE = f"{{model_type: olmoe, {SIZES}, num_key_value_heads: 2, num_experts: 4, num_experts_per_tok: 2}}"


def test_the_routers_loss_is_told_beside_the_loss_and_trained(recipe_of: Callable[..., Any]) -> None:
    """Two unlike samples, of which one is padded, and a configuration that is saved as it was loaded."""
    found = {}
    for coefficient in (0.5, 0.0):
        settings = [f"train.router_aux_loss_coef={coefficient}", "train.max_steps=2", "train.learning_rate=1e-2"]
        recipe = recipe_of(OLMOE, *settings, 'samples=["Hi", "What is the capital of France, and why?"]')
        recipe = recipe.model_copy(update={"output_dir": f"{recipe.output_dir}-{coefficient}"})
        result = instructft.train(recipe, console=Console(quiet=True))
        rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
        found[coefficient] = [row for row in rows if "loss" in row]
        assert not json.loads((result.output_dir / "config.json").read_text())["output_router_logits"]
    (first, second), (plain, other) = found[0.5], found[0.0]
    assert first["loss"] == pytest.approx(plain["loss"], abs=1e-5)  # of the same weights
    assert second["loss"] != pytest.approx(other["loss"], abs=1e-5)
    assert first["aux_loss"] > 1.9
    assert "aux_loss" not in plain
