"""What is made of the question whether a row is the same when processes share it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instructft.errors import ModelError
from instructft.training.rehearsal import divided


def ask(monkeypatch: pytest.MonkeyPatch, difference: float, mixed: str = "no") -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(divided, "division_difference", lambda trainer: difference)
    trainer: Any = SimpleNamespace(
        get_cp_size=lambda: 4,
        model=SimpleNamespace(dtype=torch.float32),
        accelerator=SimpleNamespace(mixed_precision=mixed),
    )
    args = SimpleNamespace(device=torch.device("cpu"))
    divided.ProofOfDivision(trainer, said.append).on_train_begin(args, None, None)
    return said


def test_rounding_is_said_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = ask(monkeypatch, 2e-7)
    assert line.startswith("each row is divided among 4 processes: ")
    assert "differ by 2.0e-07 on average" in line
    assert ask(monkeypatch, 1e-2, "bf16")


@pytest.mark.parametrize(("difference", "mixed"), [(1e-3, "no"), (0.3, "bf16"), (float("inf"), "no")])
def test_more_than_rounding_stops_the_run(monkeypatch: pytest.MonkeyPatch, difference: float, mixed: str) -> None:
    with pytest.raises(ModelError, match=r"--context-parallel 4: .* other log-probabilities where 4 processes"):
        ask(monkeypatch, difference, mixed)


def test_what_is_no_number_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError):
        ask(monkeypatch, float("nan"))
