"""Whole runs whose packs are attended to by the borders of documents: the figures are those of packs under a mask."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft

PACKED = """
model:
  config: MODEL
  tokenizer: quickstart
data:
  datasets: [{name: quickstart, rows: 90}]
  template: instruction
  max_length: 128
  packing: true
  splits: {validation: 0.15}
samples: [Hello]
train:
  max_steps: 6
  per_device_train_batch_size: 2
  per_device_eval_batch_size: 3
  learning_rate: 2e-3
  logging_steps: 1
  eval_steps: 3
  save_steps: 3
  report_to: none
  use_cpu: true
"""
GPT2 = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}"  # noqa: E501
QWEN3 = ("{model_type: qwen3, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64, num_attention_heads: 4, "
         "num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 128}")  # fmt: skip
LORA = ["adapter={type: lora, r: 4, target_modules: all-linear, dropout: 0.0}"]


def run(tmp_path: Path, name: str, *overrides: str, model: str = GPT2, text: str = PACKED, **how: Any) -> Any:
    """The result of a run, its log lines, and what was printed."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.replace("MODEL", model) + f"output_dir: {tmp_path / name}\n", encoding="utf-8")
    printed = io.StringIO()
    recipe = instructft.load_recipe(path, list(overrides))
    result = instructft.train(recipe, console=Console(file=printed, width=200), **how)
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return result, lines, printed.getvalue()


def same_figures(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    names = ("loss", "eval_loss", "eval_entropy", "eval_mean_token_accuracy", "grad_norm", "num_tokens")
    found = [[{k: line[k] for k in names if k in line} for line in lines] for lines in (one, other)]
    assert len(found[0]) == len(found[1])
    assert sum("loss" in line for line in found[0]) >= 3
    assert sum("eval_loss" in line for line in found[0]) >= 1
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)


def base_of(tmp_path: Path, model: str) -> str:
    """A folder with random weights, under an adapter."""
    recipe_file = tmp_path / "base.yaml"
    recipe_file.write_text(PACKED.replace("MODEL", model), encoding="utf-8")
    recipe = instructft.load_recipe(recipe_file)
    tokenizer = instructft.load_tokenizer(recipe)
    instructft.load_model(recipe, tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return PACKED.replace("  config: MODEL\n  tokenizer: quickstart", f"  name_or_path: {tmp_path / 'base'}")


WAYS = {
    "full": [],
    "two micro-batches": ["train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=1"],
    "gradient checkpointing": ["train.gradient_checkpointing=true"],
    "LoRA": LORA,
    "LoRA and gradient checkpointing": [*LORA, "train.gradient_checkpointing=true"],
}


@pytest.mark.parametrize(
    ("model", "way"),
    [*((GPT2, way) for way in WAYS if way != "LoRA"), (QWEN3, "full"), (QWEN3, "LoRA")],
    ids=lambda value: value.partition(",")[0].removeprefix("{model_type: "),
)
def test_the_figures_are_those_of_masked_packs(tmp_path: Path, model: str, way: str) -> None:
    text = base_of(tmp_path, model) if "LoRA" in way else PACKED
    _, wanted, _ = run(tmp_path, "sdpa", *WAYS[way], model=model, text=text)
    result, found, printed = run(
        tmp_path, "varlen", *WAYS[way], "model.attn_implementation=varlen", model=model, text=text
    )
    same_figures(found, wanted)
    assert result.facts["attention"] == {"name": "varlen"}
    assert "attention  varlen, by the borders of documents, without a mask" in printed
    assert "packs are clean: no gradient from a document to its neighbour in a pack of 128 tokens" in printed
    assert (tmp_path / "varlen" / "samples.jsonl").read_text().count("Hello") >= 2  # answered under sdpa
    configs = list((tmp_path / "varlen").rglob("*config.json"))
    assert len(configs) >= 2
    assert not any('varlen"' in path.read_text(encoding="utf-8") for path in configs)


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    varlen = "model.attn_implementation=varlen"
    whole, wanted, _ = run(tmp_path, "whole", varlen)
    (tmp_path / "part").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    for name in (".instructft", "metrics.jsonl"):
        if (tmp_path / "whole" / name).exists():
            shutil.copy(tmp_path / "whole" / name, tmp_path / "part" / name)
    part, _, _ = run(tmp_path, "part", varlen)
    assert len(part.facts["train"]["resumed"]) == 1
    one, other = (load_file(result.output_dir / "model.safetensors") for result in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert part.metrics["eval_loss"] == whole.metrics["eval_loss"]
    assert wanted


def test_auto_on_a_cpu_says_why_it_takes_a_mask(tmp_path: Path) -> None:
    result, _, printed = run(tmp_path, "run", "train.max_steps=1", "train.eval_strategy=no", "samples=[]")
    assert "attention  sdpa (not varlen: it is taken on CUDA)" in printed
    assert result.facts["attention"] == {"name": "sdpa", "why": "not varlen: it is taken on CUDA"}


def test_padded_rows_are_evaluated_under_a_mask(tmp_path: Path) -> None:
    from instructft.data.prepare import prepare
    from instructft.models.kernels import varlen
    from tests.helpers.rehearsal import trainer_of

    path = tmp_path / "rows.yaml"
    path.write_text(PACKED.replace("MODEL", GPT2) + f"output_dir: {tmp_path / 'run'}\n", encoding="utf-8")
    recipe = instructft.load_recipe(path)
    trainer = trainer_of(recipe)
    padded = instructft.load_recipe(path, ["data.packing=false"])
    rows = prepare(padded, instructft.load_tokenizer(padded)).splits["validation"]

    def loss() -> float:
        return float(trainer.evaluation_loop(trainer.get_eval_dataloader(rows), "eval").metrics["eval_loss"])

    wanted = loss()
    assert varlen.switch_on(trainer.model)
    assert loss() == pytest.approx(wanted, abs=1e-6)
    assert varlen.takes_borders(trainer.model)
