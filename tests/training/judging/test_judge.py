"""Held-out rows are answered as `instructft evaluate` answers them, and nothing that is trained changes by it."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.data.load import conversations
from instructft.errors import Stopped, UsageError
from instructft.training.judging import budget
from instructft.training.run import train
from tests.conftest import BATTERY
from tests.helpers.stops import SignalAt, interrupt

RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 64, initializer_range: 0.1}
  tokenizer: quickstart
data: {datasets: [{path: ROWS}], max_length: 64, template: instruction, splits: {validation: 0.25}}
train: {max_steps: 30, per_device_train_batch_size: 8, learning_rate: 1e-2, eval_steps: 10, logging_steps: 5,
        save_steps: 10, report_to: none, use_cpu: true}
"""
OWN = "def score(prediction, reference, row):\n    return len(prediction) + len(row['output'])\n"


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("judged")
    rng = random.Random(0)
    words = ["tea", "bread", "honey", "milk", "rice", "salt", "soup", "cake", "fish", "corn", "plum", "nuts"]
    rows = [
        {"instruction": " ".join(rng.sample(words, 5)), "output": "soup now" if i % 4 else rng.choice(words)}
        for i in range(64)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(OWN)
    (folder / "judged.yaml").write_text(RECIPE.replace("ROWS", str(folder / "rows.jsonl")))

    def load(name: str, *overrides: str) -> Any:
        return instructft.load_recipe(folder / "judged.yaml", [*overrides, f"output_dir={folder / name}"])

    return load


def trained(recipe: Any) -> tuple[Any, str]:
    console = Console(record=True, soft_wrap=True, file=io.StringIO())
    return train(recipe, console=console), console.export_text()


def logged(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if "per_second" not in k and "runtime" not in k}
        for line in lines
        if "eval_loss" in line
    ]


@pytest.fixture(scope="module")
def judged(load: Callable[..., Any]) -> tuple[Any, str]:
    """A run whose best checkpoint is judged by its answers."""
    best = ["train.metric_for_best_model=exact_match", "train.load_best_model_at_end=true"]
    return trained(load("judged", "evaluation.metrics=mine.py:score", *best))


def test_the_figures_are_those_of_an_evaluation(load: Callable[..., Any], judged: tuple[Any, str]) -> None:
    result, said = judged
    at = {line["step"]: line for line in logged(result.output_dir)}
    best = result.facts["train"]["best"]["step"]
    found = instructft.evaluate(str(result.output_dir), conversations(load("judged"), "validation"))
    assert at[best]["eval_answered"] == 16
    for ours, theirs in (("exact_match", "exact_match"), ("rougeL", "rougeL"), ("stops", "stopped")):
        assert at[best][f"eval_{ours}"] == pytest.approx(found[theirs])
        assert [at[best][f"eval_{ours}_{end}"] for end in ("low", "high")] == pytest.approx(found["intervals"][theirs])
    lengths = [len(row["prediction"]) + len(row["reference"]) for row in found["rows"]]
    assert at[best]["eval_score"] == pytest.approx(sum(lengths) / len(lengths))
    assert result.metrics["eval_exact_match"] == at[best]["eval_exact_match"] == result.facts["train"]["best"]["value"]
    assert "eval_tool_calls" not in at[best]  # no row has calls
    assert "mine.py:score is code that runs here (sha256 " in said
    assert "exact match" in said
    assert 0 < result.facts["train"]["evaluation_share"] < 1
    assert result.facts["train"]["seconds_by_part"]["answers"] > 0


def test_nothing_that_is_trained_changes(load: Callable[..., Any]) -> None:
    """With dropout, recomputed layers and random states of all kinds."""
    recomputed = ["train.gradient_checkpointing=true", "train.max_steps=12", "train.eval_steps=3"]
    weights = []
    for rows in (0, 5):
        run = trained(load(f"rows-{rows}", *recomputed, f"evaluation.rows={rows}"))[0].output_dir
        assert [line.get("eval_answered", 0) for line in logged(run)] == [rows] * 4
        weights.append((run / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_resumed_run_has_the_same_best(
    load: Callable[..., Any], judged: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = judged
    best = ["train.metric_for_best_model=exact_match", "train.load_best_model_at_end=true"]
    for place, step in (("evaluation", 20), ("step", 14))[: 2 if BATTERY else 1]:
        recipe = load(f"{place}-{step}", "evaluation.metrics=mine.py:score", *best)
        with monkeypatch.context() as patch:
            interrupt(patch, SignalAt(place, step))
            with pytest.raises(Stopped):
                trained(recipe)
        resumed, _ = trained(recipe)
        assert resumed.facts["train"]["resumed"]
        assert resumed.facts["train"]["best"] == whole.facts["train"]["best"]
        assert logged(resumed.output_dir) == logged(whole.output_dir)
        ours, theirs = ((run.output_dir / "model.safetensors").read_bytes() for run in (resumed, whole))
        assert ours == theirs


def test_a_run_that_is_not_told_to_go_back_says_which_was_best(load: Callable[..., Any]) -> None:
    best = ["train.metric_for_best_model=exact_match", "train.save_strategy=no", "train.max_steps=10"]
    result, _ = trained(load("told", *best))
    assert result.facts["train"]["best"] == {
        "step": 10, "metric": "exact_match", "value": result.metrics["eval_exact_match"], "restored": False,
    }  # fmt: skip


def test_early_stopping_by_answers(load: Callable[..., Any]) -> None:
    """Of answers that are all wrong none is better: training ends after the patience, with the first checkpoint."""
    never = ["train.learning_rate=1e-9", "train.early_stopping_patience=2", "train.metric_for_best_model=exact_match"]
    result, said = trained(load("early", *never, "train.eval_steps=2", "train.save_steps=2", "train.max_steps=12"))
    assert (result.facts["train"]["steps"], result.facts["train"]["best"]["step"]) == (6, 2)
    assert "nothing was better beyond chance than exact match 0.0% (step 2) for 2 evaluations" in said


def test_a_run_too_short_for_answers_has_none(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still but for steps: half of a tenth of 30 seconds is less than a batch would take."""
    now = [0.0]
    monkeypatch.setattr(budget, "CLOCK", lambda: now[0])
    from instructft.training.trainer import Trainer

    step = Trainer.training_step

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        now[0] += 1.0
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", slow)
    short, _ = trained(load("short"))
    assert all("eval_answered" not in line for line in logged(short.output_dir))
    monkeypatch.setattr(budget, "PASSES", 1)  # of which the first answers are expected to be
    long, _ = trained(load("long"))
    assert [line.get("eval_answered") for line in logged(long.output_dir)] == [16, 16, 16]  # they took no time


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("def score(prediction, reference, row): return row['nowhere']", [], "KeyError: 'nowhere' .tried with"),
        (OWN, ["evaluation.metrics=[tool_calls]", "train.metric_for_best_model=tool_calls"], "none of the 16 held-out"),
    ],
)
def test_what_fails_fails_before_training(
    load: Callable[..., Any], tmp_path: Path, text: str, more: list[str], said: str
) -> None:
    (tmp_path / "mine.py").write_text(text)
    recipe = load("fails", f"evaluation.metrics={tmp_path / 'mine.py'}:score", *more)
    with pytest.raises(UsageError, match=said):
        trained(recipe)
    assert not (Path(recipe.output_dir) / "metrics.jsonl").exists()
