"""Activations in one kernel: the same function, gradient, weights and configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from instructft.models.kernels.activations import fuse_activations


def model_of(activation: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    config = AutoConfig.for_model("gpt2", activation_function=activation, attn_pdrop=0.0, resid_pdrop=0.0,
                                  embd_pdrop=0.0, **shape)  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def bloom() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **shape))


def look(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of a step."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh", "bloom"])
@pytest.mark.parametrize("training", [True, False])
def test_same_function(kind: str, training: bool) -> None:
    plain = (bloom() if kind == "bloom" else model_of(kind)).train(training)
    # large hidden states too, where the curves of a GELU and of another one lie apart
    for name, weight in plain.named_parameters():
        if "mlp" in name:
            weight.data *= 20
    fused = copy.deepcopy(plain)
    assert fuse_activations(fused) == 2
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    (logits, grads), (found, found_grads) = look(plain, ids), look(fused, ids)
    assert not any(type(module).__module__ == "transformers.activations" for module in fused.modules())
    torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6 * float(logits.abs().max()))
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-4, atol=2e-6 * float(grad.abs().max()), msg=name)
    assert fused.training == plain.training
    assert all(module.training == training for module in fused.modules())


def test_weights_and_configuration_stay(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = model_of("gelu_new")
    fused = copy.deepcopy(plain)
    fuse_activations(fused)
    assert fused.config.to_dict() == plain.config.to_dict()
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.transformer.h[0].mlp.act).__name__ == "NewGELUActivation"
    ids = torch.arange(16)[None]
    torch.testing.assert_close(again.eval()(ids).logits, fused.eval()(ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "gelu_10", "relu2", "silu", "laplace"])
def test_what_is_another_function_or_one_kernel_stays(kind: str) -> None:
    model = model_of(kind)
    before = [type(module) for module in model.modules()]
    assert fuse_activations(model) == 0
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("adapter_first", [True, False])
def test_below_an_adapter(adapter_first: bool) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(model: Any) -> Any:
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False))

    ids = torch.arange(16)[None]
    wanted, grads = look(adapted(model_of("gelu_new")).eval(), ids)
    model = model_of("gelu_new")
    if adapter_first:
        model = adapted(model)
        assert fuse_activations(model) == 2
    else:
        assert fuse_activations(model) == 2
        model = adapted(model)
    found, found_grads = look(model.eval(), ids)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert found_grads.keys() == grads.keys()


def test_somebody_elses_hook_is_kept() -> None:
    model = model_of("gelu_new")
    seen: list[int] = []
    model.transformer.h[1].mlp.act.register_forward_hook(lambda *_: seen.append(1))
    assert fuse_activations(model) == 1
    model(torch.arange(4)[None])
    assert seen


def test_training_and_inference_load_it(write_recipe: Any, tmp_path: Path) -> None:
    from instructft import load_model, load_recipe, load_tokenizer
    from instructft.models.load_for_inference import load_for_inference

    recipe = load_recipe(write_recipe())
    tokenizer = load_tokenizer(recipe)
    trained = load_model(recipe, tokenizer)
    assert [type(block.mlp.act) for block in trained.transformer.h] == [torch.nn.GELU] * 2
    trained.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    answering, _ = load_for_inference(str(tmp_path / "model"))
    assert [type(block.mlp.act) for block in answering.transformer.h] == [torch.nn.GELU] * 2
    assert answering.config.activation_function == "gelu_new"
