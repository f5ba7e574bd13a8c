"""All checkpoints of a run in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import instructft
from instructft.errors import UsageError
from instructft.evaluation import compare as checkpoints
from instructft.evaluation.compare import compare_checkpoints
from instructft.models.load_for_inference import load_for_inference
from instructft.prompt.loss_mask import encode_conversation
from tests.helpers.device import near
from tests.helpers.evaluation import plain_loss


@pytest.fixture
def run(write_recipe: Callable[..., Path]) -> Path:
    """A run with three checkpoints, the second of them broken."""
    text = write_recipe().read_text(encoding="utf-8").replace("max_steps: 4", "max_steps: 12\n  save_steps: 4")
    folder = instructft.train(instructft.load_recipe(write_recipe(text)), console=Console(quiet=True)).output_dir
    (folder / "checkpoint-8" / "model.safetensors").write_bytes(b"broken")
    return folder


def test_checkpoints_in_one_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MAX_NEW_TOKENS", 12)
    compare_checkpoints(str(run), json_file=tmp_path / "c.json")
    results = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    found = results["checkpoints"]
    assert list(found) == ["checkpoint-4", "checkpoint-12", "final"]
    losses = {name: figures["loss"] for name, figures in found.items()}
    assert results["best"] == min(losses, key=lambda name: losses[name])
    assert losses["final"] == losses["checkpoint-12"] < losses["checkpoint-4"]
    assert results["tuned"] == found["final"]
    recipe = instructft.load_recipe(run / "recipe.yaml")
    model, tokenizer = load_for_inference(str(run / "checkpoint-4"))
    rows = instructft.data.load.conversations(recipe, "validation")  # test rows stay untouched by the choice
    encoded = [encode_conversation(row["messages"], tokenizer) for row in rows]
    assert losses["checkpoint-4"] == pytest.approx(plain_loss(model, encoded), abs=near(1e-5))
    out = capsys.readouterr().out
    assert "12 rows: the validation split" in out
    assert "skipped: " in out
    (best,) = [line for line in out.splitlines() if line.rstrip().endswith(" best")]
    assert best.startswith(results["best"])
    with pytest.raises(UsageError, match="holds no checkpoint that verifies"):
        compare_checkpoints(str(tmp_path / "none"))
