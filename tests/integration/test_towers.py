"""Checkpoints that see or hear are trained on text, adapted, merged and saved whole, as they lay on the disk."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText

import instructft
from instructft.inference.chat import as_generator, generate
from instructft.merging.merge import merge_adapter
from instructft.weights.base_manifest import places
from instructft.weights.model_class import inside, towers
from tests.conftest import BATTERY
from tests.helpers.towers import SECTIONS, make, weights

FULL = list(SECTIONS) if BATTERY else ["gemma3"]
LORA = list(SECTIONS) if BATTERY else ["qwen3_5"]


def run(base: Path, tmp_path: Path, *overrides: str) -> tuple[Any, str]:
    path = tmp_path / "towers.yaml"
    path.write_text(f"""
model: {{name_or_path: {base}}}
data: {{datasets: [{{name: quickstart, rows: 12}}], template: instruction, max_length: 96, splits: {{validation: 0.2}}}}
train: {{max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, warmup_steps: 0, learning_rate: 1e-2,
         use_cpu: true, save_strategy: "no", report_to: none}}
samples: []
output_dir: {tmp_path / "run"}
""")
    printed = io.StringIO()
    result = instructft.train(instructft.load_recipe(path, overrides), console=Console(file=printed, width=250))
    return result, printed.getvalue()


def tower_tensors(folder: Path) -> tuple[set[str], dict[str, torch.Tensor]]:
    """Names of the tensors that text does not reach, and all tensors, of a folder that loads whole."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    names = tuple(tower.name for tower in towers(model))
    held = weights(folder)
    return {name for name, (place, _) in places(model, held).items() if place and inside(place, names)}, held


@pytest.mark.parametrize("kind", FULL)
def test_full_training_leaves_the_checkpoint_that_it_began_from(kind: str, tmp_path: Path) -> None:
    base = make(kind, tmp_path / "base", "bfloat16")
    result, printed = run(base, tmp_path)
    aside, before = tower_tensors(base)
    _, after = tower_tensors(result.output_dir)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert aside <= same
    assert len(same) < len(before)
    assert "frozen" in printed
    assert "vision tower" in printed
    told = [AutoConfig.from_pretrained(folder) for folder in (base, result.output_dir)]
    assert told[0].architectures == told[1].architectures
    assert told[0].dtype == told[1].dtype == torch.bfloat16
    held = json.loads((result.output_dir / "preprocessor_config.json").read_text())
    assert held == json.loads((base / "preprocessor_config.json").read_text())
    assert "chat_template" not in json.loads((result.output_dir / "processor_config.json").read_text())
    assert result.facts["like_base"]["dtype"] == "bfloat16"
    for page in ("README.md", "report.html"):
        assert result.facts["model_class"] in (result.output_dir / page).read_text()
    asked = ["What is a cat?", "Tell me of ships, and of the sea that they go over."]
    together = generate(str(result.output_dir), asked, max_new_tokens=6)
    assert together == [generate(str(result.output_dir), [one], max_new_tokens=6)[0] for one in asked]


@pytest.mark.parametrize("kind", LORA)
def test_an_adapter_stays_out_of_the_towers_and_merges(kind: str, tmp_path: Path) -> None:
    base = make(kind, tmp_path / "base")
    result, _ = run(base, tmp_path, "adapter.type=lora", "data.template=chatml")
    aside, before = tower_tensors(base)
    adapted = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in _adapter(result.output_dir)}
    model = AutoModelForImageTextToText.from_pretrained(base)
    names = tuple(tower.name for tower in towers(model))
    assert adapted
    assert not [name for name in adapted if inside(name, names)]
    if result.facts["model_class"] != "AutoModelForCausalLM":  # which has Gemma's classes too
        assert "PeftModel.from_pretrained(AutoModelForImageTextToText" in (result.output_dir / "README.md").read_text()
    merged = merge_adapter(result.output_dir, tmp_path / "merged", console=Console(quiet=True))
    _, after = tower_tensors(tmp_path / "merged")
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in aside)
    assert merged.facts["proof"]["equal_tokens"] == merged.facts["proof"]["tokens"]
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    assert as_generator(str(result.output_dir)).answers_together


def _adapter(folder: Path) -> list[str]:
    from instructft.weights.weight_files import read_header

    return list(read_header(folder / "adapter_model.safetensors"))
