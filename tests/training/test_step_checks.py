"""Steps whose loss jumps: noticed, told with their rows, left out when asked to; what follows is as it would be."""

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
from instructft.errors import Stopped, UsageError
from instructft.training.run import train
from instructft.training.step_checks import FEWEST, usual_loss
from tests.helpers.device import here
from tests.helpers.stops import SignalAt, interrupt

RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128}
  tokenizer: quickstart
data: {datasets: [{name: quickstart, rows: 200}], max_length: 64, splits: {validation: 0}, template: instruction}
train: {max_steps: 18, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, save_steps: 6, use_cpu: true,
        logging_steps: 1, report_to: none, learning_rate: 1e-3}
"""
SPIKES_AT = 15


class Leap(TrainerCallback):
    """In one step the model is sure of what is wrong; keeps a copy of the weights before and after that step."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}
        self.state_before: Any = None
        self.state_after: Any = None

    @staticmethod
    def _copy(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    @staticmethod
    def _first_moments(optimizer: Any) -> list[torch.Tensor]:
        return [state["exp_avg"].clone() for state in optimizer.state.values()]

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kw: Any
    ) -> None:
        if state.global_step + 1 == SPIKES_AT:
            self.before, self.state_before = self._copy(model), self._first_moments(optimizer)
            self.hook = model.transformer.ln_f.register_forward_hook(lambda *a: a[-1] * -2000)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kw: Any
    ) -> None:
        if state.global_step == SPIKES_AT:
            self.hook.remove()
            self.after, self.state_after = self._copy(model), self._first_moments(optimizer)


@pytest.fixture
def spiked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*overrides: str, name: str = "run", stop_at: int | None = None) -> Any:
        path = tmp_path / "leap.yaml"
        path.write_text(here(RECIPE))
        recipe = instructft.load_recipe(path, [f"output_dir={tmp_path / name}", *overrides])
        leap, console = Leap(), Console(record=True, soft_wrap=True, file=io.StringIO())
        with monkeypatch.context() as patch:
            interrupt(patch, leap)
            if stop_at is not None:
                interrupt(patch, SignalAt("step", stop_at))
                with pytest.raises(Stopped):
                    train(recipe, console=console)
                return None
            return train(recipe, console=console), leap, console.export_text()

    return run


def test_what_a_spike_is() -> None:
    usual = [2.0, 2.2, 1.8] * 5
    assert usual_loss(usual, 6.1, 3.0) == 2.0
    assert usual_loss(usual, 5.9, 3.0) is None
    assert usual_loss(usual, 60.0, None) is None
    assert usual_loss(usual[: FEWEST - 1], 60.0, 3.0) is None
    assert usual_loss([0.005] * 20, 0.9, 3.0) is None  # many times, but far too little to harm


def test_a_spike_is_told_and_the_step_taken(spiked: Any) -> None:
    result, leap, said = spiked()
    (spike,) = result.facts["train"]["loss_spikes"]
    assert spike["step"] == SPIKES_AT
    assert not spike["skipped"]
    assert spike["loss"] > 3 * spike["median"]
    assert f"step {SPIKES_AT}: a loss of {spike['loss']:.4f}, where {spike['median']:.4f} was usual" in said
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[SPIKES_AT - 1]["loss"] == pytest.approx(spike["loss"], rel=1e-3)
    rows = [json.loads(x) for x in (result.output_dir / f"loss-spike-{SPIKES_AT}-0.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all("### Response:" in row["text"] for row in rows)
    assert any(not torch.equal(leap.before[name], leap.after[name]) for name in leap.before)


def test_a_step_that_is_left_out_changes_nothing(spiked: Any) -> None:
    result, leap, said = spiked("train.on_loss_spike=skip")
    assert result.facts["train"]["loss_spikes"][0]["skipped"]
    assert "the step is left out" in said
    assert all(torch.equal(leap.before[name], leap.after[name]) for name in leap.before)
    pairs = zip(leap.state_before, leap.state_after, strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)
    assert result.facts["train"]["steps"] == 18


def test_deepspeed_takes_each_step_by_itself(spiked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"train.on_loss_spike: skip has no effect under DeepSpeed"):
        spiked("train.on_loss_spike=skip")


def test_no_limit_says_nothing(spiked: Any) -> None:
    result, _, said = spiked("train.loss_spike_limit=null")
    assert "loss_spikes" not in result.facts["train"]
    assert "was usual" not in said
    assert not list(result.output_dir.glob("loss-spike-*"))


def test_a_resumed_run_knows_what_was_usual(spiked: Any) -> None:
    """Stopped before the spike and gone on with: the same step is left out, to the same weights."""
    whole, _, _ = spiked("train.on_loss_spike=skip")
    spiked("train.on_loss_spike=skip", name="stopped", stop_at=9)
    gone_on, _, _ = spiked("train.on_loss_spike=skip", name="stopped")
    assert gone_on.facts["train"]["resumed"][0]["step"] == 10
    assert gone_on.facts["train"]["loss_spikes"] == whole.facts["train"]["loss_spikes"]
    weights = [(result.output_dir / "model.safetensors").read_bytes() for result in (whole, gone_on)]
    assert weights[0] == weights[1]


def test_what_is_done_about_spikes_may_change_on_the_way(spiked: Any) -> None:
    spiked(stop_at=9)
    result, _, said = spiked("train.on_loss_spike=skip")
    assert result.facts["train"]["loss_spikes"][0]["skipped"]
    assert result.facts["train"]["resumed"][0]["changed"] == {"train.on_loss_spike": ["warn", "skip"]}
    assert 'changed: train.on_loss_spike, "warn" to "skip"' in said
