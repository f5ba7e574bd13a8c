"""A step that is read when the next is queued: refused by the optimizer itself, told all the same, nothing changed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

import instructft
from instructft.errors import NotFiniteError
from instructft.training.run import train
from instructft.training.step_checks import StepChecks, refuses_steps
from tests.helpers.device import here
from tests.helpers.stops import interrupt

RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 128}
  tokenizer: quickstart
data: {datasets: [{name: quickstart, rows: 200}], max_length: 64, splits: {validation: 0.1}, template: instruction}
train: {max_steps: 12, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, save_steps: 6, eval_steps: 6,
        use_cpu: true, logging_steps: 4, report_to: none, learning_rate: 1e-3, optim: adamw_torch_fused}
"""
BAD = 6  # neither the first step nor one behind which something is logged


class Poison(TrainerCallback):
    """From one step on the gradient is infinite; keeps the weights and the optimizer as they were before it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: list[tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]] = []
        self.model: Any = None
        self.optimizer: Any = None

    def now(self) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        states = self.optimizer.state.values()
        return weights, [{name: value.clone() for name, value in state.items()} for state in states]

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            self.model, self.optimizer = model, optimizer
            self.seen.append(self.now())
            model.transformer.wte.weight.register_hook(lambda grad: grad * float("inf"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(name: str, *overrides: str, late: bool = True, callback: Any = None) -> tuple[Path, str]:
        path = tmp_path / "late.yaml"
        path.write_text(here(RECIPE))
        console = Console(record=True, soft_wrap=True, file=io.StringIO())
        decide = StepChecks.on_train_begin

        def decided(self: StepChecks, *args: Any, **kwargs: Any) -> None:
            decide(self, *args, **kwargs)
            self.late = late and not self.skip_spikes and refuses_steps(self._optimizer)
            assert self.late == late

        with monkeypatch.context() as patch:
            patch.setattr(StepChecks, "on_train_begin", decided)
            if callback is not None:
                interrupt(patch, callback)
            train(instructft.load_recipe(path, [f"output_dir={tmp_path / name}", *overrides]), console=console)
        return tmp_path / name, console.export_text()

    return run


@pytest.mark.parametrize("logging", [1, 2, 4, 100])
def test_a_step_that_is_not_finite_is_refused_by_the_optimizer(run: Any, tmp_path: Path, logging: int) -> None:
    poison = Poison(BAD - 1 if logging == 4 else BAD)
    with pytest.raises(
        NotFiniteError, match=rf"step {poison.step}: a gradient is not a finite number; the step was not"
    ):
        run("run", f"train.logging_steps={logging}", "train.save_steps=100", "train.eval_steps=100", callback=poison)
    (weights, states), (after, later) = poison.seen[0], poison.now()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    for before, behind in zip(states, later, strict=True):
        assert before.keys() == behind.keys()
        assert all(torch.equal(before[name], behind[name]) for name in before)
    rows = (tmp_path / "run" / f"not-finite-{poison.step}-0.jsonl").read_text().splitlines()
    assert len(rows) == 8


def test_no_checkpoint_holds_a_step_that_is_not_finite(run: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="step 6: "):
        run("run", "train.logging_steps=100", callback=Poison(6))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_last_step_is_read_too(run: Any) -> None:
    with pytest.raises(NotFiniteError, match="step 12: "):
        run("run", "train.logging_steps=100", "train.save_strategy=no", "train.eval_strategy=no", callback=Poison(12))


def test_what_is_trained_and_logged_is_the_same(run: Any) -> None:
    at_once, _ = run("at-once", late=False)
    late, _ = run("late")
    assert (at_once / "model.safetensors").read_bytes() == (late / "model.safetensors").read_bytes()
    times = ("runtime", "per_second", "time")
    logs = [
        [{k: v for k, v in json.loads(line).items() if not any(t in k for t in times)} for line in text.splitlines()]
        for text in ((folder / "metrics.jsonl").read_text() for folder in (at_once, late))
    ]
    assert logs[0] == logs[1]
    assert all("entropy" in line for line in logs[0] if "loss" in line)


def test_only_what_can_refuse_a_step_is_trusted_to() -> None:
    weights = [torch.zeros(2, requires_grad=True)]
    assert refuses_steps(torch.optim.AdamW(weights, fused=True))
    assert not refuses_steps(torch.optim.AdamW(weights, fused=False))
    assert not refuses_steps(torch.optim.SGD(weights))
