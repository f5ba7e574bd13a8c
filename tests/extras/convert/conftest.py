"""What the tests of converting share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of `torch.save`."""
    import torch

    def write(what: Any, name: str = "ckpt.pt", **options: Any) -> Path:
        torch.save(what, tmp_path / name, **options)
        return tmp_path / name

    return write
