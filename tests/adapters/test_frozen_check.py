"""A run that trains an adapter proves that the base stayed as it was, and that the adapter moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import instructft
from instructft.adapters import lora as lora_module
from instructft.adapters.adapter_folder import read_adapter
from instructft.adapters.frozen_check import AdapterProof, FrozenProof, digest
from instructft.errors import InstructftError
from tests.helpers.adapters import (
    recipe,
)


def test_a_run_that_changes_the_base_is_an_error(base: Any, tmp_path: Path, train: Any, monkeypatch: Any) -> None:
    from instructft.training.trainer import Trainer

    step = Trainer.training_step

    def sabotage(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            weight = next(p for p in model.parameters() if not p.requires_grad)
            weight.view(-1)[7] *= 1 + 2e-7  # the last bit of one number
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", sabotage)
    with pytest.raises(InstructftError, match=r"base changed .*: 1 weights, the first .*wte"):
        train(recipe(base("gpt2"), tmp_path))
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert read_adapter(tmp_path / "run" / "unproved").base.name_or_path == str(base("gpt2"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_base_that_is_trained_by_mistake_is_an_error(base: Any, tmp_path: Path, train: Any, monkeypatch: Any) -> None:
    lora = lora_module.ADAPTERS["lora"]

    def careless(*args: Any, **kwargs: Any) -> Any:
        model = lora(*args, **kwargs)
        model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
        return model

    monkeypatch.setitem(lora_module.ADAPTERS, "lora", careless)
    with pytest.raises(InstructftError, match=r"base changed .*embed_tokens"):
        train(recipe(base("llama"), tmp_path))


def test_an_adapter_that_does_not_move_is_an_error(base: Any, tmp_path: Path, train: Any, monkeypatch: Any) -> None:
    from instructft.training.trainer import Trainer

    loss = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda *a, **k: 0 * loss(*a, **k))
    with pytest.raises(InstructftError, match=r"did not move: 8 of 8 tensors .*lora_B"):
        train(recipe(base("gpt2"), tmp_path))
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert read_adapter(tmp_path / "run" / "unproved").base.name_or_path == str(base("gpt2"))
    assert not (tmp_path / "run" / "run.json").exists()


def test_without_a_learning_rate_it_is_a_message(base: Any, tmp_path: Path, train: Any) -> None:
    result, _, printed = train(recipe(base("gpt2"), tmp_path, "train.warmup_steps=1", "train.max_steps=1"))
    assert result.facts["adapter"]["moved"] is False
    assert "the learning rate was 0 in every step" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.float64])
def test_the_digest_sees_every_change(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import instructft.adapters.frozen_check as proof

    monkeypatch.setattr(proof, "_CHUNK", 1000)
    torch.manual_seed(0)
    x = (torch.randn(64, 64) * 50).to(dtype)
    y = x.clone()
    assert digest(x) == digest(y)
    y[3, 5] = x[3, 5] + 1
    assert digest(x) != digest(y)
    flat = x.flatten()
    swapped = torch.cat([flat[1000:2000], flat[:1000], flat[2000:]])  # two whole chunks
    assert digest(flat) != digest(swapped)
    ones = torch.ones(64, 64).to(dtype)  # as in a norm: all change alike, which an exclusive or would not see
    assert digest(ones) != digest(ones + 1)


def test_scales_of_packed_weights_are_part_of_the_proof(base: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    asked = recipe(base("llama", wide=True), tmp_path, "model.quantization=4bit")
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    proof = AdapterProof(model)
    assert proof.verdict(model)["base_unchanged"]
    packed = next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    scales = {"absmax": packed.quant_state, "code": packed.quant_state, "offset": packed.quant_state}
    for name, state in {**scales, "absmax2": packed.quant_state.state2, "code2": packed.quant_state.state2}.items():
        scale = getattr(state, name.rstrip("2"))
        right = scale.clone()
        scale += 1
        with pytest.raises(InstructftError, match=rf"base changed .*: 1 weights, the first .*weight:{name}\."):
            proof.verdict(model)
        scale.copy_(right)
    assert proof.verdict(model)["base_unchanged"]


def test_layers_that_are_frozen_by_name_stay_to_the_bit(tmp_path: Path) -> None:
    import io

    from rich.console import Console
    from safetensors.torch import load_file

    import instructft
    from tests.helpers.adapters import make_base, recipe
    from tests.helpers.quickstart import tokenizer

    base = make_base("llama", tmp_path / "base")
    tokenizer().save_pretrained(base)
    full = ("adapter.type=none", "adapter.r=16", "adapter.alpha=32", "adapter.dropout=0.05")
    printed = io.StringIO()
    asked = recipe(base, tmp_path, *full, "model.freeze=[model.embed_tokens, model.layers.0]")
    result = instructft.train(asked, console=Console(file=printed, width=200))
    assert "10 tensors" in printed.getvalue()
    assert result.facts["frozen"] == {"tensors": 10, "unchanged": True}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, result.output_dir))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("model.embed_tokens.", "model.layers.0."))}


def test_a_frozen_weight_that_moved_ends_the_run() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    proof = FrozenProof(model)
    with torch.no_grad():
        model.bias.add_(1)
    assert proof.verdict(model) == {"tensors": 1, "unchanged": True}
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    with pytest.raises(InstructftError, match="1 of 1, the first weight"):
        proof.verdict(model)
