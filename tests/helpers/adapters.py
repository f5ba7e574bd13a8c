"""Bases, adapters and recipes of LoRA runs as the tests of adapters want them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import instructft
from instructft.adapters.adapter_folder import read_adapter
from instructft.adapters.attach import attach, locate_base
from instructft.adapters.lora import fit_embeddings
from instructft.models.kernels.activations import fuse_activations
from instructft.prompt.templates import TEMPLATES
from instructft.weights.base_record import BaseModelRecord, base_folder, commit_of
from instructft.weights.weight_files import fingerprint
from tests.helpers.device import here, in_float32, on

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128},  # Conv1D, tied
    "llama": {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "qwen2": {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True},  # biases
    "mistral": {**SMALL, "num_key_value_heads": 1},
    "phi": {**SMALL, "resid_pdrop": 0.0},  # a head with a bias
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
}


# Rows of whole blocks, as 4-bit weights have them on a CPU, and sides that kernels take.
WIDE: dict[str, dict[str, Any]] = {
    "gpt2": {**SHAPES["gpt2"], "n_embd": 128},
    "llama": {**SHAPES["llama"], "hidden_size": 128, "intermediate_size": 256},
}


LINEAR = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}


LINEAR["qwen2"] = LINEAR["mistral"] = LINEAR["llama"]


QUIET = Console(quiet=True)


def recipe(base: Path, tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "lora.yaml"
    path.write_text(
        here(f"""
model: {{name_or_path: {base}}}
data: {{datasets: [{{name: quickstart, rows: 12}}], template: instruction, max_length: 128, splits: {{validation: 0}}}}
adapter: {{type: lora, r: 4, alpha: 8, dropout: 0.0}}
train: {{max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1, warmup_steps: 0, learning_rate: 1e-2,
         use_cpu: true, save_strategy: "no", report_to: none}}
output_dir: {tmp_path / "run"}
""")
    )
    return instructft.load_recipe(path, in_float32(*overrides))


def reloaded(folder: Path, trainable: bool = False, **kwargs: Any) -> Any:
    adapter = read_adapter(folder)
    model = AutoModelForCausalLM.from_pretrained(locate_base(adapter), dtype=torch.float32, **kwargs)
    return attach(model, adapter, trainable=trainable)


def logits(model: Any, rows: int = 1400) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.cat([torch.randint(0, 1400, (2, 15)), torch.tensor([[rows - 1], [rows - 2]])], dim=1)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(on(model, ids)).logits.cpu()
    return result


def batch(rows: int) -> dict[str, torch.Tensor]:
    """(3, 20), its last `rows` - 1490 ids new tokens, which are input and label."""
    torch.manual_seed(1)
    ids = torch.randint(0, 1490, (3, 20))
    if rows > 1490:
        ids[:, 9::5] = torch.randint(1490, rows, ids[:, 9::5].shape)
    labels = ids.clone()
    labels[:, :6] = -100
    labels[1, 14:] = -100
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


NEW = ["<|im_start|>", "<|im_end|>"]


PREFIX = "base_model.model."


A = f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight"


def make_base(kind: str, folder: Path) -> Path:
    """A random base with clear choices: GPT-2 (Conv1D, tied head) or Llama (untied head). No tokenizer."""
    from tests.helpers.quickstart import tokenizer

    torch.manual_seed(0)
    rows = len(tokenizer())
    if kind == "gpt2":
        shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
        ids = {"bos_token_id": 0, "eos_token_id": tokenizer().eos_token_id}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=rows, **shape, **ids))
    else:
        width = 128 if kind == "wide" else 32  # rows of whole blocks, as 4-bit weights have them on a CPU
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
        shape["num_attention_heads"] = 2
        shape |= {"max_position_embeddings": 128, "tie_word_embeddings": False}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


def make_adapter(
    base: Path, folder: Path, new: bool = False, ours: bool = True, **lora: Any
) -> tuple[Path, Any, torch.Tensor]:
    """An adapter folder, the live model that it was saved from, and a batch of ids: (2, 9), new tokens among them."""
    from tests.helpers.quickstart import tokenizer as bundled

    tokenizer = bundled()
    tokenizer.chat_template = TEMPLATES["instruction"].text()
    model = AutoModelForCausalLM.from_pretrained(base)
    fuse_activations(model)  # as it is trained and loaded; written out, it rounds in another way
    conv1d = model.config.model_type == "gpt2"
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": NEW})
        rows = [len(tokenizer) - 2, len(tokenizer) - 1]
        fit_embeddings(model, len(tokenizer))
        lora["trainable_token_indices"] = rows if conv1d else {"embed_tokens": rows, "lm_head": rows}
    lora = {"target_modules": "all-linear", "fan_in_fan_out": conv1d, **lora}
    live = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **lora))
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in live.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    live.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    live.generation_config.pad_token_id = 7  # not the base's
    live.generation_config.save_pretrained(folder)
    if ours:
        record_base(folder, str(base), len(tokenizer) if new else model.config.vocab_size)
    ids = torch.randint(0, len(tokenizer), (2, 9))
    ids[0, 3:5] = torch.tensor([len(tokenizer) - 2, len(tokenizer) - 1])
    return folder, live.eval(), ids


def tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Save the adapter's tensors again, changed."""
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")


def config(folder: Path, **changed: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def base_json(folder: Path, **changed: Any) -> None:
    path = folder / "base.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def pair_gone(state: dict[str, Any]) -> None:
    del state[A], state[A.replace("lora_A", "lora_B")]


def record_base(
    folder: Path, name: str, vocab_size: int, revision: str | None = None, quantization: str = "none"
) -> None:
    """Write `base.json` as a run in float32 would have done."""
    found = base_folder(name, revision)
    assert found is not None
    about = (commit_of(found), fingerprint(found), vocab_size, quantization)
    BaseModelRecord(name, revision, None, *about).write(folder)
