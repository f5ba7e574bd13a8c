"""Evaluation has one road: the same figures for rows, packs, flattened packs, uneven batches, several processes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.data.collator import CompletionOnlyCollator
from instructft.evaluation.compare import compare
from instructft.models.load_for_inference import load_for_inference
from tests.conftest import BATTERY
from tests.helpers.evaluation import plain_loss
from tests.integration.test_resume_distributed import DRIVER, launched, rows

RECIPE = """
model:
  config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128}}
  tokenizer: quickstart
data: {{datasets: [{{path: rows.jsonl}}], template: instruction, max_length: 128, splits: {{validation: 0.4}}}}
train:
  {{max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1, eval_steps: 1, save_strategy: 'no',
   load_best_model_at_end: false, use_cpu: true, learning_rate: 0, report_to: none}}
output_dir: {out}
"""
KINDS = {
    "rows": ["train.per_device_eval_batch_size=8"],
    "alone": ["train.per_device_eval_batch_size=1"],
    "uneven": ["train.per_device_eval_batch_size=7"],
    "dropping": ["train.per_device_eval_batch_size=7", "train.dataloader_drop_last=true"],
    "packs": ["data.packing=true", "train.per_device_eval_batch_size=2"],
    "flattened": ["data.packing=true", "train.per_device_eval_batch_size=2"],
    "flattened-alone": ["data.packing=true", "train.per_device_eval_batch_size=1"],
}
ONE = ("rows", "alone", "packs", "flattened")  # `make battery` takes all; uneven ones are taken by two processes
FIGURES = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
# As flash-attention wants packs, whatever this machine has.
FLATTENING = """
from instructft.data.collator import CompletionOnlyCollator as Collator
made = Collator.__init__
def flattening(self, pad, multiple=None, *_, **__):
    made(self, pad, multiple, "flattened" in recipe)
Collator.__init__ = flattening
"""


def _flattening(self: Any, made: Any, flatten: bool, pad: int, multiple: int | None = None, *_: Any, **__: Any) -> None:
    made(self, pad, multiple, flatten)


def figures(run: Path) -> dict[str, float]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["metrics"]
    return {name: found[name] for name in FIGURES}


def recipe_of(folder: Path, kind: str, processes: int) -> Any:
    path = folder / f"{kind}-{processes}.yaml"
    path.write_text(RECIPE.format(out=f"{kind}-{processes}"))
    return instructft.load_recipe(path, KINDS[kind])


@pytest.mark.timeout(400)
def test_the_figures_are_the_same_on_every_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-6 of each other; and to 1e-5 of `evaluate`, and of a plain loop over the model's logits."""
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "rows.jsonl")
    made = CompletionOnlyCollator.__init__
    found = {}
    for kind in KINDS if BATTERY else ONE:
        flatten = "flattened" in kind
        with monkeypatch.context() as patch:
            flattening = functools.partialmethod(_flattening, made, flatten)
            patch.setattr(CompletionOnlyCollator, "__init__", flattening)
            run = instructft.train(recipe_of(tmp_path, kind, 1), console=Console(quiet=True)).output_dir
        found[kind] = figures(run)
    several = []
    for kind in ("uneven", "dropping", "packs", "flattened") if BATTERY else ("dropping", "flattened"):
        resolved = tmp_path / f"{kind}-2.yaml"
        resolved.write_text(recipe_of(tmp_path, kind, 2).to_yaml())
        several.append((str(resolved), []))
    done = launched(tmp_path, several, DRIVER.replace("for recipe, stops", f"{FLATTENING}for recipe, stops"))
    assert done.returncode == 0, done.stderr[-3000:]
    found |= {f"{Path(path).stem}": figures(tmp_path / Path(path).stem) for path, _ in several}
    wrong = {kind: values for kind, values in found.items() if values != pytest.approx(found["rows"], abs=1e-6)}
    assert wrong == {}, found["rows"]

    recipe = instructft.load_recipe(tmp_path / "rows-1.yaml")
    compare("rows-1", data="rows-1.yaml", split="validation", json_file=tmp_path / "judged.json", show=0)
    judged = json.loads((tmp_path / "judged.json").read_text())["tuned"]["loss"]
    model, tokenizer = load_for_inference("rows-1")
    held_out = list(instructft.prepare_dataset(recipe, tokenizer)["validation"])
    assert len(held_out) == 24
    assert judged == pytest.approx(found["rows"]["eval_loss"], abs=1e-5)
    assert plain_loss(model, held_out) == pytest.approx(found["rows"]["eval_loss"], abs=1e-5)
