"""Memory that runs out where a test says so, in runs that are tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from instructft.errors import OutOfMemoryError

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
)
RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 192, resid_pdrop: 0.0, embd_pdrop: 0.0,
           attn_pdrop: 0.0}
  tokenizer: quickstart
data: {datasets: [{name: quickstart, rows: 160}], template: instruction, max_length: 160, splits: {validation: 0.1}}
train: {max_steps: 4, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, logging_steps: 1, eval_steps: 4,
        save_steps: 2, use_cpu: true, learning_rate: 1e-2, adam_epsilon: 1e-3, report_to: none}
"""
Fails = Callable[[Any, int], bool]  # (trainer, rows) -> whether memory runs out now


def out_of_memory(patch: pytest.MonkeyPatch, fails: Fails, error: Any = None, after: bool = False) -> list[int]:
    """Let memory run out where `fails` says so, `after` the gradient is there or before; the rows that were tried."""
    real, tried = SFTTrainer.training_step, []

    def step(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        rows = inputs["input_ids"].shape[0]
        tried.append(rows)
        failing = fails(self, rows)
        if failing and not after:
            raise error or torch.OutOfMemoryError(CUDA)
        loss = real(self, model, inputs, *args)
        if failing:
            raise error or torch.OutOfMemoryError(CUDA)
        return loss

    patch.setattr(SFTTrainer, "training_step", step)
    return tried


def proposed(error: OutOfMemoryError) -> list[str]:
    """The overrides that a message names, line by line."""
    lines = str(error).split("What would help most:\n")[1].splitlines()
    return [line.split("  (")[0].strip() for line in lines]
