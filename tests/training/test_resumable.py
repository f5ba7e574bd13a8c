"""Random states: none is moved by an evaluation, and those of a Mac's GPU come back with a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from instructft.training.budget import Budget
from instructft.training.resumable import Progress, random_states_kept


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_are_as_before() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with random_states_kept(torch.device("cpu")):
        drawn()
    assert drawn() == expected


def test_a_macs_gpu_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: list[Any] = [torch.tensor([7, 255, 0], dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(device=torch.device("mps"), process_index=0), _metrics={}, _tr_loss=0.0,
        _globalstep_last_logged=0, _total_loss_scalar=0.0, counts=(0, 0, 0),
        micro_batches=SimpleNamespace(rows_at_once=None),
        step_checks=SimpleNamespace(recent_losses=[], spikes=[], since_log={}),
        stop=SimpleNamespace(left_evaluation=False),
        budget=Budget(None),
    )  # fmt: skip
    progress = Progress(trainer)
    with progress.training(None):
        progress.write(tmp_path)
    state[0] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    progress.restore_random_states(tmp_path)
    assert state[0].tolist() == [7, 255, 0]
