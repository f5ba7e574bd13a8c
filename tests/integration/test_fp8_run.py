"""A whole run with FP8 products, emulated: said, near the run without, resumed, and saved as any model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import instructft
from instructft.errors import RecipeError, UsageError


def trained(path: Path, folder: Path, *overrides: str) -> tuple[Any, list[float], str]:
    printed = io.StringIO()
    options = ("samples=[Hello]", "train.report_to=none", "train.save_steps=2", "train.lr_scheduler_type=constant")
    recipe = instructft.load_recipe(path, [*options, f"output_dir={folder}", *overrides])
    result = instructft.train(recipe, console=Console(file=printed, width=200))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, [line["loss"] for line in lines if "loss" in line], printed.getvalue()


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao")


@pytest.mark.usefixtures("torchao")
def test_a_run_resumed_and_saved(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe()
    plain, expected, _ = trained(path, tmp_path / "plain")
    result, found, printed = trained(path, tmp_path / "fp8", "train.fp8=true", "data.packing=true")
    assert "FP8: 8 of 8 linear layers of the blocks" in printed
    assert result.facts["fp8"] == {"layers": 8, "of": 8, "emulated": True}
    assert plain.facts["fp8"] is None
    result, found, _ = trained(path, tmp_path / "whole", "train.fp8=true")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.01)

    trained(path, tmp_path / "part", "train.fp8=true", "train.max_steps=2")
    _, _, printed = trained(path, tmp_path / "part", "train.fp8=true")
    assert "resuming from" in printed
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("plain", "whole", "part")}
    shapes = [{name: value.shape for name, value in found.items()} for found in weights.values()]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(torch.equal(value, weights["part"][name]) for name, value in weights["whole"].items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for name, value in model.state_dict().items():
        assert torch.allclose(value, weights["whole"].get(name, value)), name


@pytest.mark.usefixtures("torchao")
def test_fp8_is_fixed_for_a_runs_life(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe()
    trained(path, tmp_path / "run", "train.max_steps=2")
    with pytest.raises(instructft.InstructftError, match=r"train\.fp8: false when checkpoint-2 was written, now true"):
        trained(path, tmp_path / "run", "train.fp8=true")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["adapter.type=lora"], "train.fp8: trains all weights, and lora leaves those of the products frozen"),
        (["train.fp16=true", "train.use_cpu=false"], "fp8 is made for bfloat16 around it; take fp16 out"),
    ],
)
def test_what_it_cannot_be_meant_with(write_recipe: Callable[..., Path], overrides: list[str], says: str) -> None:
    text = write_recipe().read_text()
    config = text[text.index("  config:") : text.index("data:")]
    path = write_recipe(text.replace(config, "  name_or_path: gpt2\n"))
    with pytest.raises(RecipeError) as caught:
        instructft.load_recipe(path, ["train.fp8=true", *overrides])
    assert says in str(caught.value)


def test_accelerates_own_fp8_is_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UsageError, match=r"converts no layer of a GPT-2.*train\.fp8=true"):
        trained(write_recipe(), tmp_path / "run")
