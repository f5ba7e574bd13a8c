"""Sample answers reach the trackers as text: TensorBoard's files for real, the others through stand-ins."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

import instructft
from instructft.inference.generator import Answer, Generator
from instructft.training.callbacks import TRACKERS, Outlasted, Samples, reads_checkpoints, send
from instructft.training.judging.budget import Budget

TEXTS = [("Who?", "Ada."), ("Where?", "London.")]


def test_texts_reach_tensorboard(write_recipe: Callable[..., Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ["samples=[What is the capital of Norway?]", "train.eval_steps=2", "train.max_steps=4"]
    recipe = instructft.load_recipe(write_recipe(), overrides)
    result = instructft.train(recipe, console=Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (result.output_dir / "samples.jsonl").read_text("utf-8").splitlines()]
    read = EventAccumulator(str(result.output_dir / "tensorboard"))
    read.Reload()
    (tag,) = [tag for tag in read.Tags()["tensors"] if tag.startswith("samples/What is the capital of Norway?")]
    events = [(event.step, event.tensor_proto.string_val[0].decode()) for event in read.Tensors(tag)]
    assert events == [(line["step"], line["response"]) for line in lines]
    assert [step for step, _ in events] == [0, 2, 4]


def test_what_is_evaluated_after_the_last_step_stays_in_the_run_that_the_tracker_has_open(
    write_recipe: Callable[..., Path],
) -> None:
    """Trackers close when training ends, and open a second run for whatever comes later."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ["train.eval_strategy='no'", "train.max_steps=2", "train.report_to=tensorboard"]
    result = instructft.train(
        instructft.load_recipe(write_recipe(), overrides), console=Console(file=io.StringIO()), rehearsal=False
    )
    (written,) = result.output_dir.rglob("events.out.*")
    assert written.parent == result.output_dir / "tensorboard"
    read = EventAccumulator(str(written))
    read.Reload()
    assert [event.step for event in read.Scalars("eval/loss")] == [2]


def test_a_tracker_closes_once_and_after_the_last_figure() -> None:
    told: list[str] = []

    class Tracker(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            told.append("log")

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            told.append("end")

    watching = Outlasted(Tracker())
    watching.on_train_end(None, None, None)
    watching.on_log(None, None, None)
    watching.end()
    watching.end()
    assert told == ["log", "end"]


def test_samples_are_answered_in_the_precision_of_the_run(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    answers = Generator.answers

    def watched(self: Generator, *args: Any, **kwargs: Any) -> Any:
        with self.evaluating():
            seen.append(torch.is_autocast_enabled("cpu"))
        return answers(self, *args, **kwargs)

    monkeypatch.setattr(Generator, "answers", watched)
    for bf16 in ("true", "false"):
        overrides = ["samples=[Hello]", "train.max_steps=1", "train.report_to=none", f"train.bf16={bf16}"]
        recipe = instructft.load_recipe(write_recipe(), [*overrides, f"output_dir={tmp_path / bf16}"])
        instructft.train(recipe, console=Console(quiet=True))
    assert seen == [True, True, False, False]


class Recorder(types.ModuleType):
    """A module with the few names that are called, as wandb 0.2x, mlflow 3 and comet_ml 3 have them."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[Any] = []
        self.run: Any = object()

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:
        return {"columns": columns, "data": data}

    def log(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def active_run(self) -> Any:
        return self.run

    def log_text(self, text: str, where: str = "", step: int = 0, metadata: Any = None) -> None:
        self.calls.append((text, where, step, metadata))

    def get_running_experiment(self) -> Any:
        return self if self.run else None


def test_texts_reach_other_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: Recorder(module) for name, (module, _) in TRACKERS.items()}
    for module in modules.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert send(["wandb", "mlflow", "comet_ml", "tensorboard", "dvclive"], 30, TEXTS) == []
    table = {"columns": ["step", "prompt", "answer"], "data": [[30, "Who?", "Ada."], [30, "Where?", "London."]]}
    assert modules["wandb"].calls == [{"samples": table, "train/global_step": 30}]
    assert modules["mlflow"].calls == [("Who?\n→ Ada.\n\nWhere?\n→ London.", "samples/step-30.txt", 0, None)]
    assert modules["comet_ml"].calls == [
        ("Ada.", "", 30, {"prompt": "Who?"}), ("London.", "", 30, {"prompt": "Where?"}),
    ]  # fmt: skip
    for module in modules.values():  # nobody has opened a run
        module.run, module.calls = None, []
    send(list(modules), 40, TEXTS)
    assert [module.calls for module in modules.values()] == [[], [], []]


def test_a_tracker_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Recorder("wandb")
    broken.log = lambda values: 1 / 0  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", broken)
    said: list[str] = []
    assert send(["wandb"], 1, TEXTS, said.append) == ["wandb"]
    assert said == ["train.report_to: wandb took no sample answers: division by zero; no more are sent to it"]


def test_answers_of_several_lines_stay_below_their_question(tmp_path: Path) -> None:
    generator: Any = types.SimpleNamespace(answers=lambda *_, **__: [Answer("1. tea\n2. honey", "stop")])
    said = io.StringIO()
    samples = Samples(("A list:\ntea",), generator, tmp_path / "samples.jsonl", Console(file=said), None, Budget(None))
    samples.answer(3)
    assert said.getvalue() == "  A list:\n  tea\n  → 1. tea\n    2. honey\n"


@pytest.mark.parametrize(
    ("name", "variables", "reads"),
    [
        ("WandbCallback", {}, False),
        ("WandbCallback", {"WANDB_LOG_MODEL": "end"}, False),
        ("WandbCallback", {"WANDB_LOG_MODEL": "checkpoint"}, True),
        ("MLflowCallback", {"HF_MLFLOW_LOG_ARTIFACTS": "TRUE"}, True),
        ("MLflowCallback", {}, False),
        ("TrackioCallback", {}, False),
        ("ClearMLCallback", {}, True),
        ("TensorBoardCallback", {}, False),
    ],
)
def test_trackers_that_keep_checkpoints_are_known(
    name: str, variables: dict[str, str], reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import integration_utils

    for variable in ("WANDB_LOG_MODEL", "HF_MLFLOW_LOG_ARTIFACTS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    theirs = vars(getattr(integration_utils, name))
    tracker = type(name, (TrainerCallback,), {"on_save": theirs["on_save"]} if "on_save" in theirs else {})
    assert reads_checkpoints(Outlasted(tracker())) is reads
