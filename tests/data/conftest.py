"""Recipes over small data sets, for the tests of this folder."""

from __future__ import annotations

import json

import pytest

import instructft

RECIPE = """
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128}}, tokenizer: quickstart}}
data:
  datasets: {datasets}
  template: instruction
  max_length: 128
  splits: {{validation: 0.1, test: 0.2}}
"""


@pytest.fixture
def recipe(tmp_path):
    """Makes a recipe over data sets that are given as rows (written to a file) or as recipe entries."""

    def recipe(*datasets, overrides=(), name="rows"):
        entries = []
        for i, entry in enumerate(datasets):
            if isinstance(entry, list):
                path = tmp_path / f"{name}{i}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in entry), encoding="utf-8")
                entry = {"path": str(path)}
            entries.append(entry)
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(datasets=json.dumps(entries)), encoding="utf-8")
        return instructft.load_recipe(path, overrides)

    return recipe
