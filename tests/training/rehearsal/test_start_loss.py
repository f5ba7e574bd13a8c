"""What a run starts from is measured before its first step, and is what plain logits say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.errors import Stopped
from instructft.training.rehearsal.start_loss import NAME, StartLoss
from tests.helpers.device import near
from tests.helpers.evaluation import plain_loss
from tests.helpers.rehearsal import trainer_of
from tests.helpers.stops import SignalAt, interrupt
from tests.training.rehearsal.conftest import GPT2


@pytest.mark.parametrize("packing", ["false", "true"])
def test_it_is_that_of_the_untrained_model(recipe_of: Callable[..., Any], packing: str) -> None:
    recipe = recipe_of(GPT2, f"data.packing={packing}")
    said = Console(file=io.StringIO(), width=200)
    result = instructft.train(recipe, console=said)
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if NAME in line] == [1]
    tokenizer = instructft.load_tokenizer(recipe)
    whole = instructft.prepare_dataset(recipe_of(GPT2), tokenizer)["validation"]
    assert len(whole) == 4
    rows = whole if packing == "false" else [whole[0]]  # the first document of the only pack
    untrained = plain_loss(instructft.load_model(recipe, tokenizer).eval(), list(rows))
    if packing == "false":
        assert result.metrics[NAME] == pytest.approx(untrained, abs=near(1e-5))
    assert f"before the first step: loss {result.metrics[NAME]:.4f}, perplexity" in said.file.getvalue()
    assert "Before step 1" in (result.output_dir / "report.html").read_text()
    assert "| loss before the first step |" in (result.output_dir / "README.md").read_text()


def test_a_resumed_run_keeps_the_one_it_had(recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(GPT2, "train.save_strategy=steps", "train.save_steps=2")
    with monkeypatch.context() as patch:
        interrupt(patch, SignalAt("step", 2))
        with pytest.raises(Stopped):
            instructft.train(recipe, console=Console(quiet=True))
    result = instructft.train(recipe, console=Console(quiet=True))
    assert result.facts["train"]["resumed"]
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if NAME in line] == [1]
    assert result.metrics[NAME] == next(line[NAME] for line in lines if NAME in line)


def test_a_large_model_on_a_cpu_is_asked_one_row(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(recipe_of(GPT2))
    asked = StartLoss(trainer, trainer.train_dataset, print)
    assert len(asked._chosen()) == len(trainer.train_dataset)
    monkeypatch.setattr("instructft.training.rehearsal.start_loss.TOKENS", 1)
    assert len(asked._chosen()) == 1
