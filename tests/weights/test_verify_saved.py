"""A saved model is compared with the one in memory: what is missing or has a part's shape ends the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from trl import SFTTrainer

import instructft
from instructft.errors import ModelError
from instructft.training.run import train
from instructft.weights.weight_files import require_whole, tensors

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def made(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, "num_key_value_heads": 1, **more}))


MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: made("llama", tie_word_embeddings=True),
    "untied": lambda: made("llama", tie_word_embeddings=False),
    "mixture": lambda: made("mixtral", num_local_experts=2),  # experts are one tensor in memory, many on the disk
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", ["50GB", "10KB"])
def test_what_save_pretrained_writes_is_whole(name: str, shards: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "10KB")
    assert require_whole(model, tmp_path) == sum(len(load_file(file)) for file in files)


@pytest.mark.parametrize("name", MODELS)
def test_every_missing_or_cut_tensor_is_found(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = load_file(path)
    for key, tensor in content.items():
        rest = {other: value for other, value in content.items() if other != key}
        save_file(rest, path)
        with pytest.raises(ModelError, match=rf"not the whole model: {key} missing \(1 of {len(content)} tensors\)"):
            require_whole(model, tmp_path)
        save_file({**rest, key: tensor[: len(tensor) // 2].contiguous()}, path)
        with pytest.raises(ModelError, match=rf"{key} has the shape \[{len(tensor) // 2}"):
            require_whole(model, tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        require_whole(model, tmp_path)


def test_names_of_tied_weights_are_free(tmp_path: Path) -> None:
    model = MODELS["tied"]()
    found = tensors(model, {"lm_head.weight": None})
    assert "lm_head.weight" in found
    assert "model.embed_tokens.weight" not in found
    assert "model.embed_tokens.weight" in tensors(model, {})


TINY = """
model: {{{model}}}
data: {{datasets: [{{name: quickstart, rows: 40}}], template: {template}, max_length: 64, splits: {{validation: 0}}}}
{adapter}
train: {{max_steps: 1, per_device_train_batch_size: 2, save_strategy: "no", use_cpu: true, report_to: none}}
"""
GPT2 = "config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 64}, tokenizer: quickstart"


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("harm", ["missing", "part"])
def test_a_run_whose_model_is_not_whole_fails(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapter: bool, harm: str
) -> None:
    """What one process of several would write: its part of a weight, or not every weight."""
    recipe = instructft.load_recipe(write_recipe(TINY.format(model=GPT2, template="instruction", adapter="")))
    if adapter:
        tokenizer = instructft.load_tokenizer(recipe)
        instructft.load_model(recipe, tokenizer).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        text = TINY.format(
            model=f"name_or_path: {tmp_path / 'base'}", template="chatml", adapter="adapter: {type: lora}"
        )
        recipe = instructft.load_recipe(write_recipe(text))
    real = SFTTrainer._save

    def harmed(self: Any, output_dir: Any = None, state_dict: Any = None) -> None:
        real(self, output_dir, state_dict)
        path = next(Path(output_dir).glob("*model.safetensors"))
        content = load_file(path)
        name = max(content, key=lambda name: content[name].numel())
        tensor = content.pop(name)
        if harm == "part":
            content[name] = tensor[: len(tensor) // 2].contiguous()
        save_file(content, path, metadata={"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "_save", harmed)
        with pytest.raises(ModelError, match="is not the whole model"):
            train(recipe, console=Console(quiet=True))
    run = Path(recipe.output_dir)
    assert not list(run.glob("*.safetensors"))
    assert not (run / "run.json").exists()
    assert not (run / "config.json").exists()
    assert not (run / "adapter_config.json").exists()
    if harm == "part":
        shutil.rmtree(run / "unproved")
        train(recipe, console=Console(quiet=True))  # the same command, unharmed
        assert torch.isfinite(next(iter(load_file(next(run.glob("*model.safetensors"))).values()))).all()
