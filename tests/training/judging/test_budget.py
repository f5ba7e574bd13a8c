"""Looking at the model keeps to its share of the time, by a clock that is set; it changes nothing that is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import instructft
from instructft.errors import Stopped
from instructft.inference.generator import Generator
from instructft.training.judging import budget
from instructft.training.judging.budget import LOOKING, Budget
from instructft.training.run import train
from instructft.training.trainer import Trainer
from tests.helpers.stops import SignalAt, interrupt

QUIET = Console(quiet=True)


class Clock:
    """Stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """From now on each call of a method takes this long."""
        method = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(budget, "CLOCK", found)
    return found


@pytest.fixture
def slow(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A step takes 1 s, an evaluation 1.5 s, all samples 1 s."""
    clock.takes(monkeypatch, Trainer, "training_step", 1.0)
    clock.takes(monkeypatch, Trainer, "evaluation_loop", 1.5)
    clock.takes(monkeypatch, Generator, "answers", 1.0)
    clock.takes(monkeypatch, Generator, "complete", 0.0)
    return clock


@pytest.fixture
def load(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    def load(*overrides: str, name: str = "run") -> Any:
        steps = ["train.max_steps=60", "train.report_to=none", "train.learning_rate=1e-2"]
        return instructft.load_recipe(write_recipe(), [*steps, *overrides, f"output_dir={tmp_path / name}"])

    return load


def steps_of(run: Path, file: str, key: str) -> list[int]:
    lines = [json.loads(line) for line in (run / file).read_text(encoding="utf-8").splitlines()]
    return [line["step"] for line in lines if key in line]


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def test_what_is_due_waits_until_it_fits_and_the_last_never_does(slow: Clock, load: Callable[..., Any]) -> None:
    result = train(load("samples=[Hello]"), console=QUIET)
    run = result.output_dir
    evaluated, answered = steps_of(run, "metrics.jsonl", "eval_loss"), steps_of(run, "samples.jsonl", "response")
    # the samples before the first step took 1 s, and the first evaluation is taken for one of 1 s, so both fit at step
    # 20; a second evaluation and the last with its samples do not
    assert evaluated == [20, 60]
    assert answered == [0, 60]
    seconds = result.facts["train"]["seconds_by_part"]
    assert (seconds["steps"], seconds["evaluation"], seconds["samples"]) == (60.0, 3.0, 2.0)
    assert sum(seconds[name] for name in LOOKING) <= 0.1 * seconds["steps"]


def test_the_clock_changes_nothing_that_is_trained(slow: Clock, load: Callable[..., Any]) -> None:
    within = train(load("train.max_steps=20", name="within"), console=QUIET).output_dir
    all_of_them = train(
        load("train.max_steps=20", "train.evaluation_budget=null", name="all"), console=QUIET
    ).output_dir
    assert steps_of(within, "metrics.jsonl", "eval_loss") == [2, 20]
    assert steps_of(all_of_them, "metrics.jsonl", "eval_loss") == list(range(2, 21, 2))
    assert weights(within) == weights(all_of_them)


def test_one_that_waits_survives_a_resume(
    slow: Clock, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(load("train.logging_steps=5", name="whole"), console=QUIET).output_dir
    recipe = load("train.logging_steps=5", name="stopped")  # at step 14 it waits for step 15
    with monkeypatch.context() as patch:
        interrupt(patch, SignalAt("step", 13))
        with pytest.raises(Stopped):
            train(recipe, console=QUIET)
    (known,) = (Path(recipe.output_dir) / "checkpoint-14").glob("progress_0.json")
    assert json.loads(known.read_text())["evaluation_is_due"]
    assert json.loads(known.read_text())["budget"]["seconds"]["steps"] == 14.0
    resumed = train(recipe, console=QUIET)
    assert steps_of(resumed.output_dir, "metrics.jsonl", "eval_loss") == steps_of(whole, "metrics.jsonl", "eval_loss")
    assert weights(resumed.output_dir) == weights(whole)
    assert resumed.facts["train"]["seconds_by_part"]["steps"] == 60.0


@pytest.mark.parametrize("key", ["early_stopping_patience=100", "load_best_model_at_end=true", "eval_steps=6"])
def test_an_evaluation_that_somebody_needs_does_not_wait(
    clock: Clock, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    clock.takes(monkeypatch, Trainer, "evaluation_loop", 100.0)
    run = train(load("train.max_steps=18", "train.save_steps=6", f"train.{key}"), console=QUIET).output_dir
    assert steps_of(run, "metrics.jsonl", "eval_loss") == [6, 12, 18]


def test_a_budget_of_zero_leaves_the_last_alone(load: Callable[..., Any]) -> None:
    recipe = load("train.max_steps=6", "train.evaluation_budget=0", "samples=[Hello]")
    run = train(recipe, console=QUIET).output_dir
    assert steps_of(run, "metrics.jsonl", "eval_loss") == [6]
    assert steps_of(run, "samples.jsonl", "response") == [0, 6]


def test_the_default_is_a_tenth_unless_somebody_has_said_when(load: Callable[..., Any]) -> None:
    assert load().train["evaluation_budget"] == 0.1
    assert load("train.eval_steps=5").train["evaluation_budget"] is None
    assert load("train.eval_steps=5", "train.evaluation_budget=0.2").train["evaluation_budget"] == 0.2


def test_the_first_process_decides_for_all(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, op: sent.append(int(flag)))
    state = SimpleNamespace(global_step=10, max_steps=100)
    control = SimpleNamespace(should_training_stop=False)
    found = []
    for rank, trained in ((0, 1.0), (1, 1000.0)):  # the second would have the time
        args = SimpleNamespace(world_size=2, process_index=rank, device=torch.device("cpu"))
        of_rank = Budget(0.1)
        of_rank.restore({"seconds": {"steps": trained}, "costs": {"samples": 5.0}})
        found.append(of_rank.allows("samples", args, state, control))
    assert sent == [0, 0]
    assert found == [False, False]


def test_an_inner_part_is_not_the_outer_ones(clock: Clock) -> None:
    found = Budget(0.1)
    found.on_train_begin(SimpleNamespace(device=torch.device("cpu")), None, None)
    clock.now = 10.0
    with found.part("evaluation"):
        clock.now = 12.0
        with found.part("samples"):
            clock.now = 15.0
        clock.now = 16.0
    clock.now = 17.0
    found.on_train_end(None, None, None)
    seconds = {"steps": 11.0, "evaluation": 3.0, "answers": 0.0, "samples": 3.0, "warnings": 0.0, "checkpoints": 0.0}
    assert found.seconds == {"start": 0.0, **seconds}
