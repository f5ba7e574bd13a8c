"""A run folder with the history of its rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import instructft
from instructft.data.batches.row_history import Seen
from instructft.data.prepare import prepare
from instructft.report.row_file import write_rows

RECIPE = """
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128}}, tokenizer: quickstart}}
data: {{datasets: [{{path: {data}}}], template: instruction, max_length: 128, splits: {{validation: 0.0}}}}
"""
ROWS = [
    {"instruction": "What is the name?", "output": "It is Ada."},
    {"instruction": "Which colour?", "output": "Red."},
    {"instruction": "Which colour?", "output": "Blue, and \u202egreen\u202c with it."},
    {"instruction": "Say it twice.", "output": "It. It."},
    {"instruction": "Say it twice.", "output": "It. It."},
    {"instruction": "How much is it?", "output": "It is five."},
]
FIRST = [4.0, 3.0, 3.0, 0.1, 2.0, 5.0]
LAST = [4.1, 2.0, 2.5, 0.1, 0.5, np.nan]


@pytest.fixture
def rows_run(tmp_path: Path) -> Path:
    """A run folder whose rows were seen twice, but for the last one, which was not seen."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    path = tmp_path / "rows.yaml"
    path.write_text(RECIPE.format(data=data))
    recipe = instructft.load_recipe(path)
    made = prepare(recipe, instructft.load_tokenizer(recipe))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    unseen = np.isnan(LAST)
    steps = np.arange(1, len(ROWS) + 1, dtype=np.int32)
    first, last = np.float32(FIRST), np.float32(np.nan_to_num(LAST))
    seen = Seen(first, last, np.where(unseen, -1, steps), np.where(unseen, -1, steps + 6))
    write_rows(folder, made, seen)
    return folder
