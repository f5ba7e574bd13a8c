"""What a machine decides of the training arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import instructft
from instructft.training.arguments import training_arguments


def test_one_process_takes_one_gpu(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several that are visible; upstream would wrap the model in `DataParallel`, which TRL refuses."""

    def four(self: TrainingArguments) -> torch.device:
        self._n_gpu = 4
        return torch.device("cpu")

    devices = functools.cached_property(four)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    recipe = instructft.load_recipe(write_recipe())
    data = SimpleNamespace(splits={"validation": None}, tokens_per_row=10.0)
    args, _ = training_arguments(recipe, data, SimpleNamespace(num_processes=1))  # type: ignore[arg-type]
    assert args.n_gpu == 1
    assert args.train_batch_size == recipe.train["per_device_train_batch_size"]
