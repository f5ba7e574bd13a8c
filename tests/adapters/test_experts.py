"""Experts get an adapter that trains, is saved and merges; what PEFT takes for experts and is none gets one too."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import instructft
from instructft.adapters.experts import expert_parameters, said_of_reach, share_reached
from instructft.adapters.lora import add_lora
from instructft.errors import RecipeError, UsageError
from instructft.merging import comparison
from tests.conftest import BATTERY
from tests.helpers.adapters import QUIET, recipe
from tests.helpers.mixtures import MIXTURES, make_mixture
from tests.helpers.quickstart import tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def make(kind: str) -> Path:
        tokenizer().save_pretrained(tmp_path / kind)
        return make_mixture(tmp_path / kind, kind)

    return make


def adapted(folder: Path, tmp_path: Path, *overrides: str) -> Any:
    return add_lora(AutoModelForCausalLM.from_pretrained(folder), recipe(folder, tmp_path, *overrides))


@pytest.mark.parametrize("kind", MIXTURES if BATTERY else ["deepseek_v3"])
def test_experts_train_the_base_does_not_and_the_merge_is_proved(
    kind: str, folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(comparison, "ANSWER", 2)
    monkeypatch.setattr(comparison, "FIXED", comparison.FIXED[:2])
    base, printed = folder(kind), io.StringIO()
    settings = recipe(base, tmp_path, "adapter.dropout=0.05", "train.max_steps=2")
    result = instructft.train(settings, console=Console(file=printed, width=200))
    assert "adapter    reaches" in printed.getvalue()
    reached = result.facts["adapter"]["reaches"]
    assert sum(part for part, _ in reached.values()) >= 0.8 * sum(whole for _, whole in reached.values())
    assert reached["experts"][0] >= 0.97 * reached["experts"][1]  # those of gpt-oss have biases
    assert result.facts["adapter"]["moved"]
    assert result.facts["adapter"]["base_unchanged"]
    weights = load_file(result.output_dir / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert any("experts.base_layer.lora_B" in name for name in weights)
    assert not any("router" in name or ".gate." in name for name in weights)

    facts = instructft.merge_adapter(result.output_dir, tmp_path / "merged", console=QUIET).facts
    assert facts["proof"]["exact"] < 1e-5 < facts["proof"]["effect"]
    ids = torch.arange(5, 1485, 37).reshape(2, -1)
    with torch.inference_mode():
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.output_dir))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert (merged(ids).logits - plain(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_reaches_every_matrix_but_router_and_embeddings(kind: str, folder: Any, tmp_path: Path) -> None:
    model = adapted(folder(kind), tmp_path)
    reached = share_reached(model)
    assert "experts" in reached
    some = {kind: part / whole for kind, (part, whole) in reached.items()}
    assert all(share == 1 for name, share in some.items() if name in ("attention", "dense MLP", "shared experts"))
    assert (some["router"], some["embeddings"]) == (0, 0)
    assert said_of_reach(reached).endswith("not router, embeddings")
    assert model.peft_config["default"].lora_dropout == 0


def test_without_experts_nothing_of_them_is_reached_and_the_dense_layers_of_their_names_are(
    folder: Any, tmp_path: Path
) -> None:
    reached = share_reached(adapted(folder("deepseek_v3"), tmp_path, "adapter.experts=false"))
    assert reached["experts"][0] == 0
    assert reached["dense MLP"][0] == reached["dense MLP"][1] > 0


def test_what_an_adapter_cannot_do_to_experts_is_said_or_refused(
    folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = folder("mixtral")
    assert share_reached(adapted(base, tmp_path, "adapter.use_dora=true"))["experts"][0] == 0
    assert "the experts are left out, PEFT has no use_dora for their weights" in capsys.readouterr().err
    with pytest.raises(UsageError, match="experts: true, but PEFT has no use_dora"):
        adapted(base, tmp_path, "adapter.use_dora=true", "adapter.experts=true")
    listed = adapted(base, tmp_path, "adapter.target_modules=[q_proj]")
    assert share_reached(listed)["experts"][0] == 0
    assert share_reached(adapted(base, tmp_path, "adapter.target_modules=[q_proj]", "adapter.experts=true"))["experts"][
        0
    ]
    with pytest.raises(UsageError, match=r"w1, w3: PEFT takes these names for the experts of MixtralForCausalLM"):
        adapted(base, tmp_path, "adapter.target_modules=[q_proj, w1, w3]", "adapter.experts=false")


def test_a_model_without_experts_has_none_to_ask_for(base: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base("llama"))
    assert expert_parameters(model) == {}
    with pytest.raises(UsageError, match="LlamaForCausalLM has no experts that are one weight of a layer"):
        add_lora(model, recipe(base("llama"), tmp_path, "adapter.experts=true"))


def test_the_words_of_the_key(base: Any, tmp_path: Path) -> None:
    for word, value in (("auto", "auto"), ("true", True), ("false", False)):
        assert recipe(base("llama"), tmp_path, f"adapter.experts={word}").adapter.experts is value
    with pytest.raises(RecipeError, match=r"adapter\.experts: found .*expected true or false or auto"):
        recipe(base("llama"), tmp_path, "adapter.experts=some")
    json.dumps(recipe(base("llama"), tmp_path).to_dict())


def test_experts_of_the_layers_that_were_chosen(folder: Any, tmp_path: Path) -> None:
    base = folder("mixtral")
    for settings in (["adapter.layers_to_transform=[1]"], ["adapter.exclude_modules=.*layers.0.*"]):
        model = adapted(base, tmp_path, *settings)
        names = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
        assert any(name.endswith("layers.1.mlp.experts.base_layer") for name in names)
        assert not [name for name in names if ".layers.0." in name]
