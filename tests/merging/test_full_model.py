"""A model that was trained whole is stored in less with what it learned, and what that costs is measured and said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import instructft
from instructft import merge_adapter
from instructft.errors import ModelError, UsageError
from instructft.merging import merge
from instructft.merging.arithmetic import merged
from tests.helpers.merging import QUIET, make_base, with_tokenizer


@pytest.fixture
def run(tmp_path: Path, tokenizer: Any) -> Path:
    """A run folder: every matrix of a bfloat16 base moved by about a thousandth, in float32."""
    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False)
    run = with_tokenizer(make_base(tmp_path / "run", "llama", tied=False), tokenizer)
    source = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        weights[name] = tensor.float()
        if tensor.dim() == 2:
            left, right = (torch.randn(n, generator=source) for n in tensor.shape)
            weights[name] += 1e-3 * weights[name].std() * torch.outer(left, right)
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    (run / "run.json").write_text(json.dumps({"base": {"name_or_path": str(base), "commit": None}}))
    return run


@pytest.mark.usefixtures("short_answers")
def test_it_keeps_what_training_did_and_says_what_that_costs(run: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    console = Console(file=said, soft_wrap=True)
    facts = merge_adapter(run, tmp_path / "out", dtype="bfloat16", rounding="stochastic", console=console).facts
    proof = facts["proof"]
    assert (facts["dtype"], facts["rounding"], facts["full"]) == ("bfloat16", "stochastic", str(run))
    assert proof["exact"] <= proof["tolerance"] < proof["effect"]
    costs = {(row["dtype"], row["rounding"]): row for row in proof["costs"]}
    assert costs["bfloat16", "nearest"]["vanished"] > 0.5 > costs["float16", "nearest"]["vanished"]
    assert costs["float32", "nearest"]["vanished"] == 0
    assert proof["weights"]["applied"] == pytest.approx(1, abs=0.1)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    text = said.getvalue()
    assert "trained whole" in text
    assert f"{proof['weights']['tensors']} tensors are the trained ones, rounded" in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A model trained whole from base, stored by" in card
    assert "training's own effect" in card
    assert "adapter" not in card.partition("## Stored in less")[2].partition("## Use")[0]


@pytest.mark.usefixtures("short_answers")
def test_a_checkpoint_of_a_run_that_goes_on_knows_its_base_by_the_recipe(
    run: Path, tmp_path: Path, write_recipe: Any
) -> None:
    (run / "run.json").unlink()
    run.rename(tmp_path / "checkpoint-4")
    (tmp_path / "run").mkdir()
    checkpoint = (tmp_path / "checkpoint-4").rename(tmp_path / "run" / "checkpoint-4")
    text = (
        f"model: {{name_or_path: {tmp_path / 'base'}}}\ndata: {{datasets: [{{name: quickstart}}]}}\noutput_dir: {run}\n"
    )
    (run / "recipe.yaml").write_text(instructft.load_recipe(write_recipe(text)).to_yaml())
    proof = merge_adapter(checkpoint, tmp_path / "out", dtype="bfloat16", console=QUIET).facts["proof"]
    assert proof["effect_kl"] > 0


@pytest.mark.usefixtures("short_answers")
def test_without_its_base_it_is_stored_all_the_same(run: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    (run / "run.json").write_text("{}")
    facts = merge_adapter(run, tmp_path / "out", dtype="float16", console=Console(file=said, soft_wrap=True)).facts
    assert facts["proof"]["effect_kl"] == 0
    assert facts["proof"]["kl"] > 0
    assert "base    not here" in said.getvalue()


def test_a_value_that_is_no_rounding_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "merged", lambda *asked: (piece * 1.02 for piece in merged(*asked)))
    with pytest.raises(ModelError, match="is not the rounding of its merged value"):
        merge_adapter(run, tmp_path / "out", dtype="bfloat16", console=QUIET)
    assert not (tmp_path / "out").exists()


def test_what_would_not_be_narrower_is_refused(run: Path, tmp_path: Path) -> None:
    for dtype, why in (("auto", r"holds a full model already.*--dtype bfloat16 stores it in less"),
                       ("float32", "--dtype float32 is no narrower than what it is stored in")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            merge_adapter(run, tmp_path / "out", dtype=dtype, console=QUIET)
    assert not (tmp_path / "out").exists()
