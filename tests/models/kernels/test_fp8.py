"""FP8 products, emulated on a CPU: layers counted, losses near float32's, weights saved as transformers knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from instructft.errors import ModelError
from instructft.models.kernels.compiled_blocks import CompiledBlocks
from instructft.models.kernels.fp8 import Converted, fp8_products

pytest.importorskip("torchao")

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
SHAPES = {"GPT-2": (GPT2, 8), "Llama": (LLAMA, 14)}  # layers in its blocks


def make(shape: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).train()


def trained(model: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(0))  # 42 tokens, no multiple of 16
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", SHAPES)
def test_every_linear_layer_of_the_blocks_and_nothing_else(name: str) -> None:
    shape, count = SHAPES[name]
    model = make(shape)
    expected = trained(make(shape), 30)
    with fp8_products(model, emulate=True) as converted:
        kinds = [type(module).__name__ for module in model.modules()]
        assert (converted.layers, converted.of, kinds.count("Float8Linear")) == (count, count, count)
        assert type(model.get_output_embeddings()) is nn.Linear
        found = trained(model, 30)
    assert found != expected  # something was rounded
    assert found == pytest.approx(expected, rel=0.05)
    assert found[-1] < found[0] / 2


@pytest.mark.parametrize("name", SHAPES)
def test_weights_have_transformers_names_and_layout_all_along(name: str, tmp_path: Path) -> None:
    plain, model = make(SHAPES[name][0]), make(SHAPES[name][0])
    expected = plain.state_dict()
    with fp8_products(model, emulate=True):
        assert list(model.state_dict()) == list(expected)
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key
        trained(model, 2)
        during = {key: value.clone() for key, value in model.state_dict().items()}
        model.save_pretrained(tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").state_dict()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, during[key]), key
        assert torch.equal(value, loaded[key]), key
        assert not torch.equal(value, expected[key]) or "bias" in key or value.unique().numel() == 1, key


def test_a_checkpoint_is_read_back_while_it_trains() -> None:
    model, other = make(GPT2), make(GPT2)
    trained(other, 2)
    with fp8_products(model, emulate=True):
        model.load_state_dict(other.state_dict())
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_what_is_frozen_stays_frozen() -> None:
    model = make(GPT2)
    frozen = model.transformer.h[0].mlp.c_fc
    frozen.weight.requires_grad_(False)
    with fp8_products(model, emulate=True):
        assert not model.transformer.h[0].mlp.c_fc.weight.requires_grad
        assert model.transformer.h[1].mlp.c_fc.weight.requires_grad
    assert model.transformer.h[0].mlp.c_fc is frozen
    assert isinstance(frozen, Conv1D)
    assert not frozen.weight.requires_grad


def test_odd_sizes_are_left_out_and_counted() -> None:
    with fp8_products(make({**LLAMA, "intermediate_size": 50}), emulate=True) as converted:
        assert (converted.layers, converted.of) == (8, 14)  # attention alone


def test_a_model_without_a_layer_to_convert_is_refused() -> None:
    narrow = {**GPT2, "n_embd": 20}
    with pytest.raises(ModelError, match=r"train\.fp8: no layer of GPT2LMHeadModel's blocks .* 20×20.*multiples of 16"):
        fp8_products(make(narrow), emulate=True).__enter__()


def test_compiled_blocks_take_it() -> None:
    torch._dynamo.reset()
    model, said = make(GPT2), list[str]()
    with fp8_products(make(GPT2), emulate=True):
        pass
    with fp8_products(model, emulate=True):
        compiled = CompiledBlocks(model, backend="aot_eager", say=said.append)
        found = trained(model, 4)
    compiled.undo()
    assert compiled.facts()["blocks"] == 2, said
    with fp8_products(eager := make(GPT2), emulate=True):
        assert trained(eager, 4) == pytest.approx(found, abs=1e-4)


def test_what_is_said() -> None:
    assert "48 of 48 linear layers" in Converted(48, 48, 24, False).line()
    assert "24 of them are narrower than 2,048" in Converted(48, 48, 24, False).line()
    assert "emulated" in Converted(48, 48, 48, True).line()
