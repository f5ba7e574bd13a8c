"""What the tests of merging share."""

from __future__ import annotations

from pathlib import Path

import pytest

from instructft.merging import comparison
from instructft.weights import tensor_io
from tests.helpers.merging import make_adapter, make_base


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is merged in several pieces, of a number of rows that divides nothing."""
    monkeypatch.setattr(tensor_io, "PIECE", 7 * 32)


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof shows three texts and asks for four tokens."""
    monkeypatch.setattr(comparison, "ANSWER", 4)
    monkeypatch.setattr(comparison, "FIXED", comparison.FIXED[:3])
    monkeypatch.setattr(comparison, "ROWS", 3)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter of it."""
    base = make_base(tmp_path / "base", "gpt2")
    return base, make_adapter(tmp_path / "adapter", base)
