"""Names of metrics, what is counted and summed; what the trainer trains, saves and resumes is tested in whole runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from instructft.training.trainer import _plain, _sums_of_rows
from tests.helpers.rehearsal import trainer_of


@pytest.mark.parametrize(
    ("name", "plain"),
    [("dolly-15k", "dolly-15k"), ("data/rows.jsonl", "rows"), ("org/set", "set"), ("/a/b.jsonl.gz", "b")],
)
def test_names_of_data_sets_in_metrics(name: str, plain: str) -> None:
    assert _plain(name) == plain


def test_sums_of_a_flat_evaluation_are_those_of_its_packs() -> None:
    rows = [torch.arange(1.0, n + 1) for n in (4, 7, 5)]
    rows = [torch.stack([row, row * 10, row * 100, row * 1000]) for row in rows]  # (4, n); no token behind the last
    for row in rows:
        row[:, -1] = 0  # it predicts nothing
    wanted = torch.stack([row.sum(1) for row in rows])
    lengths = torch.tensor([4, 7, 5])
    padded = torch.stack([torch.nn.functional.pad(row, (0, 8 - row.shape[1])) for row in rows], dim=1)  # (4, 3, 8)
    assert torch.equal(_sums_of_rows(padded[..., :-1], lengths), wanted)
    end_to_end = torch.cat(rows, dim=1)[:, None, :-1]
    assert torch.equal(_sums_of_rows(end_to_end, lengths), wanted)
    fixed = padded.reshape(4, 1, -1)[..., :-1]
    assert torch.equal(_sums_of_rows(fixed, lengths, width=8), wanted)
    alone = _sums_of_rows(padded[:, :1].reshape(4, 1, -1)[..., :-1], lengths[:1], width=8)  # a batch of one pack
    assert torch.equal(alone, wanted[:1])


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
