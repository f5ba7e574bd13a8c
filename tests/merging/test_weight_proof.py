"""Merged weights are held against PEFT's own merge, value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instructft import merge_adapter
from instructft.errors import ModelError
from instructft.merging import arithmetic, merge
from tests.helpers.merging import (
    QUIET,
    make_adapter,
    make_base,
    rewrite,
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


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(("tied", "only"), [(True, "head"), (False, "all")], ids=["tied", "untied"])
def test_an_adapter_of_the_smallest_effect_is_not_passed_over(
    tied: bool, only: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its change is a ten-billionth of the weights: no logit tells whether it was left out."""
    base = make_base(tmp_path / "base", "llama", tied=tied)
    options = {"target_modules": ["q_proj", "lm_head"]} if only == "head" else {}
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base, **options), tokenizer)
    rewrite(adapter, lambda found: [found[name].mul_(1e-11) for name in found if "lora_B" in name])
    merge_adapter(adapter, tmp_path / "right", console=QUIET)
    monkeypatch.setattr(arithmetic._Weight, "read", lambda self, start, stop: self.source.read(start, stop).double())
    with pytest.raises(ModelError, match="is not merged as PEFT merges it"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_file_that_holds_something_else_than_the_rounded_merge_is_refused(
    rounding: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right until it is written: one value in each piece is two units of the last place away."""
    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False)
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)

    def spoiled(*arguments: Any) -> Any:
        for piece in arithmetic.merged(*arguments):
            piece = piece.clone()
            piece.view(-1)[0] *= 1 + 2**-6
            yield piece

    monkeypatch.setattr(merge, "merged", spoiled)
    with pytest.raises(ModelError, match="is not the rounding of its merged value"):
        merge_adapter(adapter, tmp_path / "out", rounding=rounding, console=QUIET)
