"""Fixtures of the tests of the Hub: finished runs, a small model, waits that are short."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.hub import commit

RECIPE = """
model:
  {start}
data:
  datasets: [{{name: quickstart, rows: 40}}]
  template: instruction
  max_length: 64
  splits: {{validation: 0.1}}
train:
  {{max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, save_steps: 1, use_cpu: true, report_to: none}}
output_dir: {out}
"""


START = "config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 64}\n  tokenizer: quickstart"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full run, a LoRA run on it, and the merge of both, each in a folder whose path is easy to find again."""
    top = tmp_path_factory.mktemp("canary-place")
    runs = {}
    for kind, start in (("full", START), ("lora", f"name_or_path: {top / 'full'}")):
        path = top / f"{kind}.yaml"
        adapter = "adapter: {type: lora, r: 2}\n" if kind == "lora" else ""
        path.write_text(RECIPE.format(start=start, out=top / kind) + adapter)
        instructft.train(instructft.load_recipe(path), console=Console(quiet=True))
        runs[kind] = top / kind
    instructft.merge_adapter(runs["lora"], top / "merged", verify=False)
    return {**runs, "merged": top / "merged"}


@pytest.fixture
def model(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> Path:
    """A small model folder, in shards."""
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are short, ours and the library's."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(commit, "WAIT", 0.001)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
