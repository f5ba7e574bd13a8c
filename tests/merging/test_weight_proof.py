"""Merged weights are held against PEFT's own merge, value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instructft import merge_adapter
from instructft.errors import ModelError
from instructft.merging import arithmetic
from tests.helpers.merging import (
    QUIET,
    make_adapter,
    make_base,
    with_tokenizer,
)


def test_a_transposed_delta_is_refused(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's `c_proj` of the attention is square: only its values tell."""
    import torch

    base = make_base(tmp_path / "base", "gpt2")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base, target_modules=["attn.c_proj"]), tokenizer)

    def transposed(self: Any, start: int, stop: int) -> Any:
        whole = self.source.read().float() + (self.b @ self.a) * self.edit.lora.scaling
        return whole[start:stop]

    monkeypatch.setattr(arithmetic._Weight, "read", transposed)
    with pytest.raises(ModelError, match="is not merged as PEFT merges it"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)
    monkeypatch.undo()
    torch.manual_seed(0)
    assert merge_adapter(adapter, tmp_path / "out", console=QUIET).facts["proof"]["difference"] < 1e-5
