"""Names of metrics, and what is counted; what the trainer trains, saves and resumes is tested in whole runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from instructft.training.trainer import _plain
from tests.helpers.rehearsal import trainer_of


@pytest.mark.parametrize(
    ("name", "plain"),
    [("dolly-15k", "dolly-15k"), ("data/rows.jsonl", "rows"), ("org/set", "set"), ("/a/b.jsonl.gz", "b")],
)
def test_names_of_data_sets_in_metrics(name: str, plain: str) -> None:
    assert _plain(name) == plain


def test_operations_are_upstreams(recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are counted once, and not for each micro-batch."""
    trainer = trainer_of(recipe())
    counted: list[int] = []
    count = type(trainer.model).num_parameters
    monkeypatch.setattr(type(trainer.model), "num_parameters", lambda *a, **k: counted.append(1) or count(*a, **k))
    for shape in ((2, 8), (3, 16)):
        inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        assert trainer.floating_point_ops(inputs) == SFTTrainer.floating_point_ops(trainer, inputs)
    assert len(counted) == 3  # ours once, upstream's twice
