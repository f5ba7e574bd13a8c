"""`check --rehearse` does before step 1 what `train` does there, and keeps nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from instructft.cli import app
from tests.conftest import TINY

GPT2 = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128}"
LEAKING = "{model_type: opt, hidden_size: 32, ffn_dim: 32, num_hidden_layers: 2, num_attention_heads: 2}"


@pytest.fixture
def checked(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    def checked(config: str, *overrides: str) -> tuple[int, dict[str, Any], str]:
        path = write_recipe(TINY.replace(GPT2, config).replace("rows: 120", "rows: 30"))
        result = CliRunner().invoke(app, ["check", str(path), "--rehearse", "--json", *overrides])
        assert not (tmp_path / "run").exists()
        return result.exit_code, json.loads(result.stdout), result.stderr

    return checked


def test_what_train_would_find_is_in_the_report(checked: Any) -> None:
    code, report, said = checked(GPT2)
    found = report["rehearsal"]
    assert (code, report["ok"], found["head"], found["said"]) == (0, True, "fused", [])
    assert found["precision"] == "float32"
    assert found["head_difference"] < 1e-3
    assert found["padding_difference"] < 1e-3
    assert found["loading_seconds"] > 0
    assert "rehearsed in" in said


def test_packs_that_leak_are_a_problem_before_any_step(checked: Any) -> None:
    code, report, _ = checked(LEAKING, "data.packing=true")
    assert (code, report["ok"]) == (2, False)
    assert "pack" in " ".join(report["problems"])


def test_for_people(write_recipe: Callable[..., Path]) -> None:
    path = write_recipe(TINY.replace("rows: 120", "rows: 30"))
    result = CliRunner().invoke(app, ["check", str(path), "--rehearse"])
    assert "rehearsed on one short batch" in result.stdout
    assert "all is right: head, gradients, answers, what is saved" in result.stdout


@pytest.mark.parametrize("other", [["--device", "cuda"], ["--processes", "2"], ["--devices", "8"]])
def test_what_is_not_here_cannot_be_rehearsed(other: list[str], write_recipe: Callable[..., Path]) -> None:
    result = CliRunner().invoke(app, ["check", str(write_recipe()), "--rehearse", *other])
    assert "--rehearse loads the model on this machine" in str(result.exception)
