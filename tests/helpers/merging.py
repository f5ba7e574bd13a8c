"""Tiny bases and adapters to merge: random in every weight, since with zeros in it a wrong merge could pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from instructft import merge_adapter
from instructft.adapters.adapter_folder import read_adapter
from instructft.errors import InstructftError
from instructft.merging.plan import make_plan
from instructft.weights import tensor_io
from tests.helpers.adapters import record_base
from tests.helpers.device import on

QUIET = Console(quiet=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"0.*attn.*proj": 2}, "alpha_pattern": {"1.mlp.*": 5}},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [3, 7, 1480]},
    "saved": {"modules_to_save": ["norm", "ln_f"]},
    "biases": {"bias": "all"},
}


def make_base(
    folder: Path, kind: str, dtype: str = "float32", tied: bool = True, shards: str = "5GB", width: int = 32
) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=1490, tie_word_embeddings=tied, **sizes))
    else:
        sizes = {
            "hidden_size": width,
            "intermediate_size": width * 3 // 2,
            "num_hidden_layers": 2,
            "max_position_embeddings": 128,
        }
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "bos_token_id": 0}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1490, tie_word_embeddings=tied, eos_token_id=0, **sizes))
    for parameter in model.parameters():  # biases that are zero would hide a mistake
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shards)
    return folder


def make_adapter(folder: Path, base: Path, rows: int = 1490, **options: Any) -> Path:
    """Every weight of the adapter is random: with zeros in it a wrong merge could pass."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from instructft.adapters.lora import fit_embeddings

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fit_embeddings(model, rows)
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    source = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            size = 0.02 if "magnitude" in name else 0.1
            parameter.data += torch.randn(parameter.shape, generator=source) * size
    adapted.save_pretrained(folder, save_embedding_layers=False)
    record_base(folder, str(base), rows)
    return folder


def with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def logits_of(model: Any) -> Any:
    import torch

    ids = torch.arange(5, 1485, 37).reshape(2, -1)  # (2, 20)
    with torch.inference_mode():
        return model.eval()(input_ids=on(model, ids)).logits.cpu()


def live(adapter: Path, base: Path) -> Any:
    """The adapter on its base in float32, as it is used without a merge."""
    import torch
    from transformers import AutoModelForCausalLM

    from instructft.adapters.attach import attach

    return attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), read_adapter(adapter))


def load_whole(folder: Path) -> Any:
    """The merged model in float32, as anybody loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def plan_of(adapter: Path, base: Path) -> Any:
    from instructft.adapters.adapter_folder import read_adapter

    return make_plan(base, tensor_io.read_checkpoint(base), adapter, read_adapter(adapter).shapes, 0, None)


def refused(adapter: Path, match: str, error: type[InstructftError] = InstructftError, **options: Any) -> None:
    out = adapter.parent / "out"
    with pytest.raises(error, match=match) as caught:
        merge_adapter(adapter, out, console=QUIET, **options)
    assert caught.value.exit_code == 2
    assert files_in(adapter.parent) == {"base", "adapter"}


def rewrite(adapter: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    found = load_file(adapter / "adapter_model.safetensors")
    change(found)
    save_file(found, adapter / "adapter_model.safetensors")


def free_memory(found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    little = psutil.virtual_memory()._replace(available=found)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
