"""Adapter folders as PEFT and its users leave them: merged and proved, or refused in one sentence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from instructft import merge_adapter
from instructft.errors import AdapterError, InstructftError, UsageError
from instructft.merging import comparison
from tests.conftest import BATTERY
from tests.helpers.merging import QUIET, live, load_whole, logits_of, make_base, rewrite

LAYERS = {"gpt2": ("c_attn", "wte", "lm_head"), "llama": ("q_proj", "embed_tokens", "lm_head")}
BASES = {"tied-gpt2": ("gpt2", True), "untied-llama": ("llama", False), "tied-llama": ("llama", True)}
# "layer", "embedding" and "head" stand for the modules of that name in the family
KINDS: dict[str, dict[str, Any]] = {
    "whole embeddings beside LoRA": {"save": True},
    "LoRA on the embedding, saved whole": {"save": True, "target_modules": ["layer", "embedding"]},
    "LoRA on the embedding": {"target_modules": ["layer", "embedding"]},
    "LoRA on both, saved whole": {"save": True, "target_modules": ["layer", "embedding", "head"]},
    "LoRA on an embedding that grew": {"rows": 1500, "target_modules": ["layer", "embedding"]},
    "LoRA on both, which grew": {"rows": 1500, "save": True, "target_modules": ["layer", "embedding", "head"]},
    "both trained whole, with their originals": {"save": True, "modules_to_save": ["embedding", "head"]},
    "both trained whole": {"modules_to_save": ["embedding", "head"]},
    "the embedding trained whole, with its original": {"save": True, "modules_to_save": ["embedding"]},
    "the head trained whole, with its original": {"save": True, "modules_to_save": ["head"]},
    "both trained whole, which grew": {"rows": 1500, "modules_to_save": ["embedding", "head"]},
    "embeddings that grew": {"rows": 1500},
    "trained rows of embeddings that grew": {"rows": 1500, "save": True, "trainable_token_indices": [1, 1495]},
}
SOME = [  # the others by `make battery`
    ("tied-gpt2", "LoRA on the embedding, saved whole"),
    ("tied-gpt2", "both trained whole, with their originals"),
    ("tied-gpt2", "trained rows of embeddings that grew"),
    ("untied-llama", "LoRA on an embedding that grew"),
]


def peft_folder(
    folder: Path, base: Path, kind: str, rows: int = 0, save: Any = "auto", **options: Any
) -> tuple[Path, Any]:
    """An adapter of PEFT's own, without `base.json`, and the model that it was saved from."""
    names = dict(zip(("layer", "embedding", "head"), LAYERS[kind], strict=True))
    options = {k: [names.get(n, n) for n in v] if isinstance(v, list) else v for k, v in options.items()}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        torch.manual_seed(2)
        model.resize_token_embeddings(rows, mean_resizing=False)
    config = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=source) * 0.1
    adapted.save_pretrained(folder, save_embedding_layers=save)
    return folder, adapted.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {name: make_base(place / name, kind, tied=tied) for name, (kind, tied) in BASES.items()}


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(("base", "kind"), itertools.product(BASES, KINDS) if BATTERY else SOME)
def test_what_peft_saves_is_merged_and_proved(base: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter, adapted = peft_folder(tmp_path / "adapter", bases[base], BASES[base][0], **KINDS[kind])
    proof = merge_adapter(adapter, tmp_path / "out", console=QUIET).facts["proof"]
    assert proof["exact"] <= proof["tolerance"] < proof["effect"] / 5
    merged = logits_of(load_whole(tmp_path / "out"))
    assert (merged - logits_of(live(adapter, bases[base]))).abs().max() < 1e-5
    # PEFT saves the head's new rows only where it saves the head
    known = 1490 if base == "untied-llama" and kind == "LoRA on an embedding that grew" else None
    assert (merged - logits_of(adapted))[..., :known].abs().max() < 1e-5


def test_copies_that_differ_are_refused_by_both(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of one weight under two names PEFT would take either."""
    base = bases["tied-gpt2"]
    kind = "both trained whole, with their originals"
    adapter, _ = peft_folder(tmp_path / "adapter", base, "gpt2", **KINDS[kind])
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {f"base_model.model.lm_head.{part}weight" for part in ("", "modules_to_save.", "original_module.")} <= names
    rewrite(adapter, lambda found: found["base_model.model.lm_head.modules_to_save.weight"].add_(1))
    with pytest.raises(InstructftError, match="stand for one weight, and their values differ"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)
    with pytest.raises(AdapterError, match="stand for one weight, and their values differ"):
        live(adapter, base)


@pytest.mark.parametrize("modules", ["all-linear", ["gate_proj"]])
def test_a_bias_that_the_base_has_no_place_for_is_refused(modules: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter, _ = peft_folder(
        tmp_path / "adapter", bases["untied-llama"], "llama", lora_bias=True, target_modules=modules
    )
    with pytest.raises(UsageError, match=r"gate_proj.*these layers of the base have no bias.*use the adapter as it is"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)


@pytest.mark.usefixtures("short_answers")
def test_a_base_without_a_tokenizer_is_asked_in_token_ids(bases: dict[str, Path], tmp_path: Path) -> None:
    """transformers makes a GPT-2 tokenizer that knows no token where no file of one lies."""
    adapter, _ = peft_folder(tmp_path / "adapter", bases["tied-gpt2"], "gpt2")
    proof = merge_adapter(adapter, tmp_path / "out", console=QUIET).facts["proof"]
    assert proof["source"] == "random token ids"
    assert proof["tokens"] > 0


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "template"])
def test_a_tokenizer_with_more_ids_than_the_base_has_rows(
    chat: bool, bases: dict[str, Path], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = peft_folder(tmp_path / "adapter", bases["tied-gpt2"], "gpt2")
    tokenizer.add_tokens([f"<new{i}>" for i in range(20)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = (
        "{% for m in messages %}<new3>{{ m['content'] }}<end>{% endfor %}"
        if chat
        else "{% for m in messages %}{{ m['content'] }}<new4>{% endfor %}"  # never stops: no run would train it
    )
    tokenizer.save_pretrained(adapter)
    found = merge_adapter(adapter, tmp_path / "out", console=Console(soft_wrap=True)).facts["proof"]
    assert found["source"] == ("random token ids" if chat else "fixed texts")
    said = capsys.readouterr().out
    assert f"the tokenizer has {len(tokenizer):,} tokens and the model 1,490 rows" in said


def test_texts_that_the_model_has_no_rows_for_are_left_out(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    ids = [max(tokenizer(text)["input_ids"]) for text in comparison.FIXED]
    assert len({*ids}) > 2
    texts = comparison.choose_texts(None, tokenizer, 128, sorted(ids)[len(ids) // 2])
    assert 0 < len(texts.rows) < len(ids)
    assert max(max(row) for row in texts.rows) < sorted(ids)[len(ids) // 2]
