"""A finished run is told at a glance, and only where nothing has changed since."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from instructft import load_recipe
from instructft.checkpoints.finished import finished_at_a_glance

RECIPE = """
model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 64}, tokenizer: quickstart}
data: {datasets: [{path: rows.jsonl}], template: instruction, max_length: 64}
train: {use_cpu: true, max_steps: 4}
output_dir: run
"""


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run folder as one that ended at step 4 leaves it, as far as is looked at."""
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(RECIPE, encoding="utf-8")
    Path("rows.jsonl").write_text('{"instruction": "1 + 1?", "output": "2"}\n', encoding="utf-8")
    Path("run/checkpoint-4").mkdir(parents=True)
    Path("run/checkpoint-4/manifest.json").write_text("{}", encoding="utf-8")
    Path("run/recipe.yaml").write_text(load_recipe("my.yaml").to_yaml(), encoding="utf-8")
    Path("run/run.json").write_text(json.dumps({"train": {"steps": 4}}), encoding="utf-8")
    Path("run/config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("instructft.checkpoints.finished.require_as_saved", lambda run, whole: None)
    return load_recipe("my.yaml")


def test_told(finished):
    assert finished_at_a_glance(finished) == 4


def younger(path):
    after = Path("run/run.json").stat().st_mtime + 5
    os.utime(path, (after, after))


@pytest.mark.parametrize(
    "change",
    [
        lambda: younger("rows.jsonl"),
        lambda: Path("run/run.json").unlink(),
        lambda: Path("run/run.json").write_text("{", encoding="utf-8"),
        lambda: Path("run/checkpoint-4").rename("run/checkpoint-2"),
        lambda: Path("run/checkpoint-4/manifest.json").unlink(),
    ],
    ids=["rows have changed", "no run.json", "damaged", "another last step", "not sealed"],
)
def test_left_to_who_trains(finished, change):
    change()
    assert finished_at_a_glance(finished) is None


@pytest.mark.parametrize(
    "override", ["train.max_steps=8", "data.max_length=32", "data.template=chatml", "train.seed=1"]
)
def test_another_recipe_is_left_to_who_trains(finished, override):
    assert finished_at_a_glance(load_recipe("my.yaml", [override])) is None
