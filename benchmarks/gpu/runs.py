"""Small runs of ours for the other parts: models of random weights, rows, recipes, and training without a word."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from contestants import source_and_tokenizer
from data_prep import build_rows
from gpu.jobs import Settings

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# architecture -> a shape of real proportions, and the same for a CPU
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": (
        {"model_type": "gpt2", "n_layer": 6, "n_embd": 512, "n_head": 8, "n_positions": 2048, **NO_DROPOUT},
        {"n_layer": 1, "n_embd": 32, "n_head": 2},
    ),
    "llama": (
        {
            "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2816,
            "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False,
        },
        {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
         "num_key_value_heads": 1},
    ),
}  # fmt: skip


def shape(settings: Settings, architecture: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a model of random weights."""
    whole, small = SHAPES[architecture]
    return {**whole, **changes, **(small if settings.tiny else {})}


def content(settings: Settings, folder: Path, rows: int = 600, **sections: Any) -> dict[str, Any]:
    """A recipe on rows in Alpaca's shape: packs, nothing held out, no checkpoints; sections change it."""
    source, tokenizer = source_and_tokenizer(folder, bundled=settings.tiny)
    if not (folder / "rows.json").exists():
        build_rows(source, folder / "rows.json", min(rows, 60) if settings.tiny else rows)
    base: dict[str, Any] = {
        "model": {"tokenizer": tokenizer},
        "data": {"datasets": [{"path": str(folder / "rows.json")}], "template": "instruction",
                 "max_length": 64 if settings.tiny else 1024, "packing": True, "splits": {"validation": 0.0}},
        "train": {"max_steps": 4 if settings.tiny else 10, "per_device_train_batch_size": 2 if settings.tiny else 8,
                  "logging_steps": 1, "save_strategy": "no", "report_to": [], "learning_rate": 5e-4,
                  **({"use_cpu": True} if settings.tiny else {})},
    }  # fmt: skip
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(base.get(name), dict) else section
    return base


def recipe(folder: Path, name: str, content: dict[str, Any]) -> Any:
    """The recipe, read from a file of this name; its run folder is `run-NAME`. JSON is YAML."""
    from instructft.recipe.load import load_recipe

    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"output_dir": str(folder / f"run-{name}"), **content}), encoding="utf-8")
    return load_recipe(path)


def train(recipe: Any, **how: Any) -> Any:
    """`instructft.train`, with what it says going nowhere."""
    from rich.console import Console

    import instructft.training.run as road

    with open(os.devnull, "w") as nowhere:
        return road.train(recipe, console=Console(file=nowhere), **how)


def losses(run: Path) -> list[float]:
    """The loss of each line in `metrics.jsonl`."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def save_model(settings: Settings, folder: Path, config: dict[str, Any], low: bool) -> Path:
    """A model of random weights in a folder, once, in bfloat16 where it is to be frozen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source_and_tokenizer(folder, bundled=settings.tiny)[1])
    path = folder / "model"
    if not path.exists():
        torch.manual_seed(0)
        with torch.device(settings.device):
            made = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**{"vocab_size": len(tokenizer), **config}),
                dtype=torch.bfloat16 if low and not settings.tiny else torch.float32,
            )
        made.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def apart(first: Path, second: Path) -> dict[str, Any]:
    """How far the weights of two run folders are apart, bit for bit and at most."""
    from safetensors.torch import load_file

    largest, other, weights = 0.0, 0, 0
    for path in sorted(first.glob("*.safetensors")):
        there = load_file(second / path.name)
        for name, tensor in load_file(path).items():
            largest = max(largest, float((tensor.double() - there[name].double()).abs().max()))
            other += int((tensor != there[name]).sum())
            weights += tensor.numel()
    if not weights:
        raise FileNotFoundError(f"no weights in {first}")
    return {"weights": weights, "different": other, "largest difference": largest, "same bits": not other}
