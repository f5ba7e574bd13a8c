"""Pairs that stay beside those that are trained: two adapters in memory, one plain adapter of the base on the disk."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import instructft
from instructft.adapters.adapter_folder import read_adapter
from instructft.adapters.frozen_pairs import BENEATH
from instructft.errors import UsageError
from instructft.merging.merge import merge_adapter
from instructft.models.starting_point import starting_point
from tests.helpers.adapters import QUIET, logits, recipe, reloaded
from tests.helpers.mixtures import make_mixture
from tests.helpers.quickstart import tokenizer


def plain(base: Path, adapter: Path | None = None) -> Any:
    """Plain transformers and PEFT; as wide as the adapter was trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is None:
        return model
    return PeftModel.from_pretrained(model, str(adapter))


def bits_of_base(model: Any, base: Path) -> bool:
    own = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in model.named_parameters()
        if "lora_" not in name
    }
    there = dict(plain(base).named_parameters())
    return own.keys() == there.keys() and all(torch.equal(weight, there[name]) for name, weight in own.items())


STACKS = {
    # a wider adapter by another scale, whose layers are some of the other's
    "llama": ["adapter.r=6", "adapter.alpha=3", "adapter.target_modules=[q_proj, v_proj]", "adapter.dropout=0.1"],
    "gpt2": ["adapter.r=2", "adapter.alpha=4"],  # Conv1D
    "qwen3_moe": ["adapter.r=3", "adapter.alpha=6"],  # experts, a part of one weight each
}


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.battery) for kind in ("gpt2", "qwen3_moe"))]
)
def test_an_adapter_on_an_adapter(kind: str, base: Any, tmp_path: Path, train: Any) -> None:
    folder = make_mixture(tmp_path / "base", kind) if kind == "qwen3_moe" else base(kind)
    if kind == "qwen3_moe":
        tokenizer().save_pretrained(folder)
    first = train(recipe(folder, tmp_path, f"output_dir={tmp_path / 'first'}", "train.max_steps=1"))[0].output_dir
    below = load_file(first / "adapter_model.safetensors")
    start = logits(plain(folder, first))
    over = [*STACKS[kind], "adapter.stack=true", "train.lr_scheduler_type=constant"]
    stopped = [*over, f"output_dir={tmp_path / 'stopped'}", "train.save_strategy=steps", "train.save_steps=1"]

    result, model, _ = train(recipe(first, tmp_path, *over, "train.max_steps=2"))
    assert result.facts["adapter"]["moved"] is result.facts["adapter"]["base_unchanged"] is True
    assert result.facts["base"]["stacked_on"] == str(first)
    assert bits_of_base(model, folder)
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-3
    torch.testing.assert_close(logits(plain(folder, result.output_dir)), trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(reloaded(result.output_dir)), trained, atol=1e-5, rtol=0)
    assert read_adapter(result.output_dir).base.name_or_path == str(folder)

    # on the disk the first one's A, bit by bit, over the new one's
    saved = load_file(result.output_dir / "adapter_model.safetensors")
    config = json.loads((result.output_dir / "adapter_config.json").read_text())
    rank = config["r"] - 4
    assert {len(saved[name]) // 4 for name in saved if "experts.lora_A" in name} <= {config["r"]}
    for name in (name for name in below if "lora_A" in name and "experts" not in name):
        assert torch.equal(saved[name][:4], below[name])
    # without what was trained it is the first one
    for name in (name for name in saved if "lora_B" in name):
        experts = 4 if "experts" in name else 1
        saved[name].view(len(saved[name]), -1, experts)[:, 4:] = 0
    save_file(saved, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(plain(folder, tmp_path)), start, atol=1e-5, rtol=0)
    assert rank in (2, 3, 6)

    merged = merge_adapter(result.output_dir, tmp_path / "merged", console=QUIET)
    assert merged.facts["proof"]["kl"] < 1e-9
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), trained, atol=1e-5, rtol=0)

    train(recipe(first, tmp_path, *stopped, "train.max_steps=1"))
    resumed = train(recipe(first, tmp_path, *stopped, "train.max_steps=2"))[0]
    assert len(resumed.facts["train"]["resumed"]) == 1
    there = load_file(resumed.output_dir / "adapter_model.safetensors")
    once = load_file(result.output_dir / "adapter_model.safetensors")
    assert all(torch.equal(tensor, there[name]) for name, tensor in once.items())


@pytest.mark.parametrize(
    ("first", "over"),
    [
        (["adapter.layers_to_transform=[1]"], []),  # each of them on layers where the other is not
        (["adapter.exclude_modules=[v_proj]"], ["adapter.layers_to_transform=[0]", "adapter.use_rslora=true"]),
        (["adapter.use_rslora=true"], ["adapter.target_modules=[embed_tokens]"]),
    ],
)
def test_both_are_where_they_were_put(first: list[str], over: list[str], base: Any, tmp_path: Path) -> None:
    asked = recipe(base("llama"), tmp_path, *first)
    below = random_pairs(instructft.load_model(asked, instructft.load_tokenizer(asked)))
    below.save_pretrained(tmp_path / "first")
    tokenizer().save_pretrained(tmp_path / "first")
    asked = recipe(tmp_path / "first", tmp_path, "adapter.stack=true", "adapter.r=3", *over)
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    torch.testing.assert_close(logits(model), logits(below), atol=1e-5, rtol=0)
    random_pairs(model).save_pretrained(tmp_path / "both")
    assert (logits(model) - logits(below)).abs().max() > 1e-3
    torch.testing.assert_close(logits(plain(base("llama"), tmp_path / "both")), logits(model), atol=1e-5, rtol=0)


def random_pairs(model: Any) -> Any:
    """Pairs that do something, in the place of those that were begun; what is frozen stays."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


@pytest.mark.battery
def test_rows_of_new_tokens_go_on_in_a_stack(base: Any, tmp_path: Path, train: Any) -> None:
    folder = base("llama")
    out = f"output_dir={tmp_path / 'first'}"
    first = train(recipe(folder, tmp_path, "data.template=chatml", out))[0].output_dir
    over = ["adapter.stack=true", "data.template=tokenizer", "model.new_tokens=[<plan>]"]
    asked = recipe(first, tmp_path, *over)
    tokens = instructft.load_tokenizer(asked)
    model = instructft.load_model(asked, tokens)
    assert len(tokens) == 1493
    begun = logits(model, 1492)[..., :1492]
    torch.testing.assert_close(begun, logits(reloaded(first), 1492), atol=1e-5, rtol=0)
    result, model, _ = train(asked)
    trained = logits(model, 1493)
    torch.testing.assert_close(logits(reloaded(result.output_dir), 1493), trained, atol=1e-5, rtol=0)
    merge_adapter(result.output_dir, tmp_path / "merged", console=QUIET)
    torch.testing.assert_close(logits(plain(tmp_path / "merged"), 1493), trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("first", "over", "words"),
    [
        (["adapter.use_dora=true"], [], "adapter in .* has use_dora: .* Merge what is there into a model first"),
        ([], ["adapter.use_dora=true"], "the new adapter has use_dora"),
        ([], ["adapter.rank_pattern={q_proj: 2}"], "the new adapter has rank_pattern"),
        ([], ["adapter.init_lora_weights=pissa"], "pissa and adapter.stack: each puts pairs"),
        (None, [], "adapter.stack: true, but .* is no adapter folder"),
    ],
)
def test_what_cannot_be_stacked_is_refused(
    first: list[str] | None, over: list[str], words: str, base: Any, tmp_path: Path
) -> None:
    begin = base("llama")
    if first is not None:
        asked = recipe(begin, tmp_path, *first)
        instructft.load_model(asked, instructft.load_tokenizer(asked)).save_pretrained(tmp_path / "first")
        tokenizer().save_pretrained(tmp_path / "first")
        begin = tmp_path / "first"
    asked = recipe(begin, tmp_path, "adapter.stack=true", *over)
    with pytest.raises(UsageError, match=words):
        starting_point(asked, instructft.load_tokenizer(asked))


FACTORS = [(kind, how) for kind in ("llama", "gpt2") for how in ("pissa", "pissa_niter_4", "olora")]
LIGHT = [("llama", "pissa")]


@pytest.mark.parametrize(
    ("kind", "how"),
    [*LIGHT, *(pytest.param(*case, marks=pytest.mark.battery) for case in FACTORS if case not in LIGHT)],
)
def test_pairs_that_begin_as_factors_of_the_base(kind: str, how: str, base: Any, tmp_path: Path, train: Any) -> None:
    folder = base(kind)
    asked = recipe(folder, tmp_path, f"adapter.init_lora_weights={how}", "train.max_steps=1")
    model = instructft.load_model(asked, instructft.load_tokenizer(asked))
    torch.testing.assert_close(logits(model), logits(plain(folder)), atol=1e-5, rtol=0)  # it begins as its base
    layer = next(m for name, m in model.named_modules() if name.endswith(("q_proj", "c_attn")))
    weight = layer.get_base_layer().weight.T if layer.fan_in_fan_out else layer.get_base_layer().weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(layer.lora_A[BENEATH].weight, a)
    assert torch.equal(layer.lora_B[BENEATH].weight, -b)
    if how == "pissa":  # the nearest weight of this rank
        nearest = torch.linalg.svdvals(weight)[4:].square().sum().sqrt()
        torch.testing.assert_close((weight - 2 * b @ a).norm(), nearest, rtol=1e-4, atol=0)
    elif how == "olora":
        torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)

    result, model, _ = train(asked)
    trained = logits(model)
    assert (trained - logits(plain(folder))).abs().max() > 1e-3
    assert bits_of_base(model, folder)
    torch.testing.assert_close(logits(plain(folder, result.output_dir)), trained, atol=1e-5, rtol=0)
    merged = merge_adapter(result.output_dir, tmp_path / "merged", console=QUIET)
    assert merged.facts["proof"]["kl"] < 1e-9
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), trained, atol=1e-5, rtol=0)


def test_more_factors_than_a_layer_has(base: Any, tmp_path: Path) -> None:
    asked = recipe(base("llama"), tmp_path, "adapter.init_lora_weights=pissa", "adapter.r=20")
    words = r"20 factors of .*[kv]_proj, which has the shape \(16, 32\); set adapter.r to 16"
    with pytest.raises(UsageError, match=words):
        starting_point(asked, instructft.load_tokenizer(asked))


# How an adapter may begin -> the reason why not; "": it may.
BEGINNINGS = {
    "true": "", "false": "", "gaussian": "", "orthogonal": "", "pissa": "", "pissa_niter_4": "", "olora": "",
    "eva": "activations over the data", "corda": "activations over the data", "lora_ga": "gradients over the data",
    "loftq": "puts other weights in the place of the base's", "mica": "no merge of that is proved", "foo": "is no way",
}  # fmt: skip


def test_every_beginning_that_peft_knows_is_taken_or_refused_with_its_reason(base: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    kinds = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    known = {name for kind in kinds if kind is not bool for name in typing.get_args(kind)}
    known = {re.sub(r"\[.*\]", "4", name) for name in known}
    assert len(known) > 7
    assert known <= BEGINNINGS.keys()  # one that is new in PEFT is to be decided on
    for how, why in BEGINNINGS.items():
        asked = recipe(base("llama"), tmp_path, f"adapter.init_lora_weights={how}")
        if not why:
            starting_point(asked, instructft.load_tokenizer(asked))
            continue
        with pytest.raises(UsageError, match=why):
            starting_point(asked, instructft.load_tokenizer(asked))
