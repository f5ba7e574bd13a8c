"""A step of training waits for the GPU once, and once more where it is logged, with the GPU's head or TRL's loss."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback

import instructft
from instructft.models.kernels import fused_loss, gpu_head
from instructft.training import run as run_module
from instructft.training.run import train
from tests.helpers.read_backs import ReadBacks

RECIPE = """
model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 128}, tokenizer: quickstart}
data: {datasets: [{name: quickstart, rows: 60}], max_length: 64, packing: true, splits: {validation: 0},
       template: instruction}
train: {max_steps: 6, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, save_strategy: "no",
        use_cpu: true, logging_steps: 2, report_to: none}
"""
# what no GPU is asked for: batches are made on the host, and masks are the attention's, which needs none on a GPU
NOT_OF_THE_STEP = ("data/collator.py", "batches/", "masking_utils.py")


class Look(TrainerCallback):
    """What was read back in each step, from the end of the one before to its own end, its log included."""

    def __init__(self) -> None:
        self.steps: dict[int, list[str]] = {}
        self.open: ReadBacks | None = None

    def _next(self, step: int) -> None:
        if self.open is not None:
            self.open.close()
            self.steps[step] = [f"{what} at {where}" for what, where in self.open.found
                                if not any(name in where for name in NOT_OF_THE_STEP)]  # fmt: skip
        self.open = ReadBacks().__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The callback of a step that is not logged is its end; the log of one that is comes later."""
        if not control.should_log:
            self._next(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._next(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.open is not None:
            self.open.close()


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*overrides: str) -> dict[int, list[str]]:
        path = tmp_path / "looked.yaml"
        path.write_text(RECIPE)
        seen, build = Look(), run_module.build_trainer
        monkeypatch.setattr(fused_loss, "_DEVICES", ())
        monkeypatch.setattr(gpu_head, "head_for", lambda device: gpu_head.torch_parts)

        def watched(*args: Any) -> Any:
            trainer = build(*args)
            trainer._pack_width = 64  # flat packs, as an attention that keeps to borders has them
            trainer.add_callback(seen)
            return trainer

        monkeypatch.setattr(run_module, "build_trainer", watched)
        recipe = instructft.load_recipe(path, [f"output_dir={tmp_path / 'run'}", *overrides])
        train(recipe, console=Console(file=io.StringIO()))
        return seen.steps

    return run


def test_a_step_reads_once_and_its_log_once_more(look: Any) -> None:
    steps = look()
    assert sorted(steps) == [2, 3, 4, 5, 6]
    assert {step: len(found) for step, found in steps.items() if step % 2} == {3: 1, 5: 1}, steps
    assert all(len(found) <= 2 for found in steps.values()), steps
