"""The gate on a real model: one that was trained gently passes, one at thirty times the learning rate does not.

Every 25th question of the suites that ship, under a margin that so few can hold; in `make battery` every one, and
with `INSTRUCTFT_GATE=5` every fifth.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.evaluation import gate as module
from instructft.evaluation.gate import gate
from instructft.evaluation.suites import FOLDER, shipped
from tests.conftest import BATTERY

EVERY = int(os.environ.get("INSTRUCTFT_GATE", "1" if BATTERY else "25"))
QUIET = Console(quiet=True)
MARGIN = 0.05 if EVERY == 1 else 0.1 if EVERY <= 5 else 0.25


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every `EVERY`th question of all suites, in one file."""
    lines = [line for name in shipped() for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()[::EVERY]]
    path = tmp_path_factory.mktemp("gate") / "some.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.timeout(7200)
def test_a_gentle_adapter_passes(
    tuned: Path, suite: Path, tmp_path: Path, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_TOKENS", 16)
    run = Path(shutil.copytree(tuned, tmp_path / "run"))  # the gate writes into it
    said = gate(str(run), suites=[str(suite)], margin=MARGIN)
    found = json.loads((run / "gate.json").read_text(encoding="utf-8"))
    rest = found["rest"]
    shares = f"{rest['questions']} questions, {rest['before']:.1%} to {rest['after']:.1%} right"
    low, high = rest["interval"]
    note("the gate", "LoRA, 8 steps of 4 rows", f"{said}: {shares} ({low:+.1%} to {high:+.1%})")
    assert said == "passed", found["reasons"]
    assert f"**{said.capitalize()}**" in (run / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not BATTERY, reason="trains for minutes: make battery")
@pytest.mark.timeout(7200)
def test_an_adapter_that_forgets_does_not_pass(
    recipe_of: Any, tmp_path: Path, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate thirty times too high its loss on the task still falls, and it can no longer write JSON."""
    monkeypatch.setattr(module, "ANSWER_TOKENS", 16)
    lines = (FOLDER / "json.jsonl").read_text("utf-8").splitlines()[::4]
    (tmp_path / "json.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = recipe_of("forgets", "train.learning_rate=6e-3", "train.max_steps=40")
    run = Path(instructft.train(recipe, console=QUIET).output_dir)
    said = gate(str(run), suites=[str(tmp_path / "json.jsonl")], margin=0.25, limit=12)
    found = json.loads((run / "gate.json").read_text(encoding="utf-8"))
    reason = next(reason for reason in found["reasons"] if "the rest is down" in reason)
    note("the gate", "LoRA, learning rate 6e-3, 30 times too high", f"{said}: {reason}")
    assert said == "not passed"
    assert "json" in found["rest"]["lost"]
    assert found["task"]["loss"]["after"] < found["task"]["loss"]["before"]
