"""Rows that a vocabulary gains are trained with an adapter, they and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

import instructft
from instructft.adapters.adapter_folder import read_adapter
from instructft.models.kernels.fused_loss import add_supervised_head
from instructft.models.tokenizer import new_tokens
from tests.helpers.adapters import (
    batch,
    logits,
    recipe,
    reloaded,
)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_exactly_the_rows_of_new_tokens_are_trained_and_saved(kind: str, base: Any, tmp_path: Path, train: Any) -> None:
    from peft import AutoPeftModelForCausalLM

    asked = recipe(base(kind), tmp_path, "data.template=chatml")
    result, model, _ = train(asked)
    tied = kind != "llama"
    adapter = read_adapter(result.output_dir)
    beside = {name: shape for name, shape in adapter.shapes.items() if "lora_" not in name}
    assert len(beside) == (1 if tied else 2)
    assert all(name.endswith("trainable_tokens_delta") and shape == (2, 32) for name, shape in beside.items())
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    new = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert new == [1490, 1491]

    again = reloaded(result.output_dir)
    assert adapter.base.vocab_size == len(tokenizer) == again.config.vocab_size == 1492
    old = AutoModelForCausalLM.from_pretrained(base(kind))
    mean = old.get_input_embeddings().weight.mean(0)
    for mine, before in (
        (again.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (again.get_output_embeddings().weight, old.get_output_embeddings().weight),
    ):
        assert mine.shape == (1492, 32)
        assert torch.equal(mine[:1490], before)
    assert (again.get_input_embeddings().weight[1490:] - mean).abs().amax(1).min() > 1e-3
    same = torch.equal(again.get_input_embeddings().weight[new], again.get_output_embeddings().weight[new])
    assert same == tied
    torch.testing.assert_close(logits(again, 1492), logits(model, 1492), atol=1e-6, rtol=0)
    plain = AutoPeftModelForCausalLM.from_pretrained(result.output_dir)
    torch.testing.assert_close(logits(plain, 1492), logits(model, 1492), atol=1e-6, rtol=0)


def test_a_new_token_in_a_spare_row_grows_nothing_and_is_trained(base: Any, tmp_path: Path, train: Any) -> None:
    asked = recipe(base("llama", spare_rows=22), tmp_path, "data.template=chatml")
    result, _, _ = train(asked)
    adapter = read_adapter(result.output_dir)
    assert adapter.base.vocab_size == 1512
    assert set(map(tuple, adapter.config["trainable_token_indices"].values())) == {(1490, 1491)}


def test_known_tokens_are_not_new(base: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base("llama"))
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base("llama", spare_rows=22)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    asked = recipe(folder, tmp_path, "data.template=chatml")
    assert new_tokens(asked, instructft.load_tokenizer(asked), 1512) == [1491]
    plain = recipe(folder, tmp_path)
    assert new_tokens(plain, instructft.load_tokenizer(plain), 1512) == []


def tokens_model(base: Path, tmp_path: Path, *more: str) -> Any:
    """A model with new tokens, moved away from where it starts, so that stale rows would show."""
    asked = recipe(base, tmp_path, "data.template=chatml", *more)
    model = instructft.load_model(asked, instructft.load_tokenizer(asked)).eval()  # no dropout
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


def unfused(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of the plain logits."""
    scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("which", ["instructft", "trl"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [("gpt2", []), ("llama", []), ("llama", ["adapter.modules_to_save=[lm_head]"]), ("gpt_neox", [])],
)
def test_the_loss_and_its_gradient_are_those_of_the_plain_logits(
    kind: str, more: list[str], which: str, base: Any, tmp_path: Path
) -> None:
    model = tokens_model(base(kind), tmp_path, *more)
    inputs = batch(1492)
    wanted = unfused(model, inputs)
    expected = gradients(model, wanted)
    inner = model.get_base_model()
    add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
    if which == "instructft":
        assert add_supervised_head(inner) == (not more)  # a copy of the head stays TRL's business
    loss = model(**inputs, fused_lm_head=True).loss
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)
    rows = [name for name in expected if "trainable_tokens_delta" in name]
    assert len(rows) == {"gpt2": 1, "llama": 1 if more else 2, "gpt_neox": 2}[kind]
    assert all(expected[name].abs().amax(1).min() > 1e-4 for name in rows)


def test_new_tokens_of_unequal_weight(base: Any, tmp_path: Path) -> None:
    """loss_type: dft weighs each token by its own probability."""
    model, inputs = tokens_model(base("llama"), tmp_path), batch(1492)
    found = []
    for ours in (False, True):
        (add_supervised_head if ours else add_fused_lm_head)(model.get_base_model())
        log_probs = model(**inputs, fused_lm_head=True).log_probs
        found.append(gradients(model, -(log_probs * log_probs.exp().detach()).sum()))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("what", ["frozen", "rows", "trained"])
def test_no_gradient_is_made_for_a_frozen_head(
    what: str, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "rows":
        model = tokens_model(base("llama"), tmp_path)
    else:
        asked = recipe(base("llama"), tmp_path, f"adapter={'{type: lora}' if what == 'frozen' else 'none'}")
        model = instructft.load_model(asked, instructft.load_tokenizer(asked)).train()
    add_supervised_head(getattr(model, "get_base_model", lambda: model)())
    made: list[tuple[int, ...]] = []
    zeros = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, *a, **k: made.append(tuple(x.shape)) or zeros(x, *a, **k))
    calls: list[tuple[int, ...]] = []
    addmm = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda x, *a: calls.append(tuple(x.shape)) or addmm(x, *a))
    model(**batch(1490), fused_lm_head=True).loss.backward()
    matrix = {"frozen": [], "rows": [(2, 32)], "trained": [(1490, 32)]}[what]
    assert [shape for shape in made if shape[0] in (2, 1490, 1492) and len(shape) == 2] == matrix
    assert calls == matrix


def test_a_disabled_adapter_leaves_the_base(base: Any, tmp_path: Path) -> None:
    model, inputs = tokens_model(base("llama"), tmp_path), batch(1492)
    add_fused_lm_head(model.get_base_model())
    add_supervised_head(model.get_base_model())
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(**inputs, fused_lm_head=True).loss, unfused(model, inputs))


def test_tokens_of_ones_own_are_added_trained_and_merged(base: Any, tmp_path: Path, train: Any) -> None:
    from instructft.merging.merge import merge_adapter
    from tests.helpers.adapters import QUIET

    asked = recipe(base("llama"), tmp_path, "model.new_tokens=['<plan>', '</plan>']")
    result, model, _ = train(asked)
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    assert tokenizer.convert_tokens_to_ids(["<plan>", "</plan>"]) == [1490, 1491]
    assert tokenizer.decode([1490], skip_special_tokens=True) == "<plan>"  # it is text, and no end of anything
    shapes = read_adapter(result.output_dir).shapes
    assert sum(name.endswith("trainable_tokens_delta") and shape == (2, 32) for name, shape in shapes.items()) == 2
    merged = merge_adapter(result.output_dir, tmp_path / "merged", console=QUIET).output_dir
    again = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(again, 1492), logits(model, 1492), atol=1e-5, rtol=0)


def test_a_second_stage_has_a_template_of_its_own_and_keeps_the_tokens(base: Any, tmp_path: Path, train: Any) -> None:
    full = ("adapter.type=none", "adapter.r=16", "adapter.alpha=32", "adapter.dropout=0.05", "train.max_steps=1")
    first, _, _ = train(recipe(base("llama"), tmp_path, *full, "model.new_tokens=['<plan>']"))
    stage = recipe(first.output_dir, tmp_path, f"output_dir={tmp_path / 'second'}", "data.template=chatml")
    second, _, _ = train(stage)
    tokenizer = AutoTokenizer.from_pretrained(second.output_dir)
    assert tokenizer.convert_tokens_to_ids(["<plan>", "<|im_start|>", "<|im_end|>"]) == [1490, 1491, 1492]
    assert "<|im_start|>" in tokenizer.chat_template
    rows = [shape for name, shape in read_adapter(second.output_dir).shapes.items() if "tokens_delta" in name]
    assert set(rows) == {(2, 32)}  # the first stage trained its own


def test_embeddings_of_each_layer_grow_from_their_mean_too() -> None:
    from transformers import AutoModelForImageTextToText

    from instructft.adapters.lora import fit_embeddings
    from tests.helpers.towers import config_of

    model = AutoModelForImageTextToText.from_config(config_of("gemma4", 100))
    fit_embeddings(model, 102)
    rows = model.model.language_model.embed_tokens_per_layer.weight
    assert rows.shape[0] == 102
    torch.testing.assert_close(rows[100:], rows[:100].mean(0).expand(2, -1))
