"""What depends on the machine in the arguments of a run: here how batches reach a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl

from instructft.training.arguments import training_arguments

STATE: Any = SimpleNamespace(num_processes=1)
DATA: Any = SimpleNamespace(splits={}, tokens_per_row=10)


@pytest.mark.parametrize(
    ("overrides", "ahead"),
    [
        ([], True),
        (["train.accelerator_config={split_batches: true}"], True),
        (["train.accelerator_config={non_blocking: false}"], False),
        (["train.dataloader_pin_memory=false"], False),  # memory that is not pinned cannot be copied aside
    ],
)
def test_batches_are_copied_to_a_gpu_while_it_computes(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, overrides: list[str], ahead: bool
) -> None:
    monkeypatch.setattr(trl.SFTConfig, "device", property(lambda _: torch.device("cuda")))
    args, _ = training_arguments(recipe("train.use_cpu=false", *overrides), DATA, STATE)
    assert args.accelerator_config.non_blocking is ahead
    assert args.dataloader_pin_memory is ("train.dataloader_pin_memory=false" not in overrides)


def test_a_file_says_how(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"non_blocking": False}))
    monkeypatch.setattr(trl.SFTConfig, "device", property(lambda _: torch.device("cuda")))
    args, _ = training_arguments(
        recipe("train.use_cpu=false", f"train.accelerator_config={tmp_path / 'config.json'}"), DATA, STATE
    )
    assert args.accelerator_config.non_blocking is False


def test_a_cpu_copies_nothing(recipe: Any) -> None:
    args, _ = training_arguments(recipe(), DATA, STATE)
    assert args.accelerator_config.non_blocking is args.dataloader_pin_memory is False
