"""A QLoRA adapter merges into the published base or into the one it was trained on, and the nearer one is said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from instructft import merge_adapter
from instructft.adapters.quantization import configuration, fix_layout
from instructft.errors import UsageError
from tests.helpers.merging import QUIET, files_in, make_adapter, make_base, with_tokenizer


@pytest.fixture
def adapter(tmp_path: Path, tokenizer: Any) -> Path:
    """As if it had been trained on its base in 4 bits."""
    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False, width=128)
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    record = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps({**record, "quantization": "4bit"}))
    return adapter


@pytest.mark.usefixtures("short_answers")
def test_it_merges_into_the_base_it_was_trained_on_and_the_nearer_one_is_said(adapter: Path, tmp_path: Path) -> None:
    said, out = io.StringIO(), tmp_path / "out"
    console = Console(file=said, soft_wrap=True)
    facts = merge_adapter(adapter, out, into="dequantized", measure_quantized=True, console=console).facts
    found = facts["quantized"]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (facts["dtype"], facts["into"]) == ("bfloat16", "dequantized")
    assert (found["quantization"], found["nearer"]) == ("4bit", "dequantized")
    assert found["other"]["into"] == "original"
    assert found["kl"] < found["other"]["kl"] / 10  # four bits are far coarser than the rounding of the merge
    assert "nearer to what was trained: --into dequantized" in said.getvalue()
    assert "4bit and unpacked again" in said.getvalue()
    assert "4bit base" in (out / "README.md").read_text()
    assert not list(tmp_path.glob("*.partial-*"))


def test_the_dequantized_base_holds_what_the_packed_weights_stand_for(adapter: Path, tmp_path: Path) -> None:
    from instructft.adapters.adapter_folder import read_adapter
    from instructft.merging.quantized_base import dequantized_base

    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=configuration("4bit", torch.float32)
    )
    ids = torch.arange(40)[None]
    with dequantized_base(read_adapter(adapter), tmp_path / "base", tmp_path) as folder, torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found, expected = plain(input_ids=ids).logits, fix_layout(packed).eval()(input_ids=ids).logits
        assert files_in(folder) >= {"config.json", "model.safetensors"}
    assert torch.allclose(found, expected, atol=1e-2 * float(expected.abs().max()))
    assert not folder.exists()


def test_only_an_adapter_of_a_quantized_base_has_two(tmp_path: Path, tokenizer: Any) -> None:
    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False)
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    with pytest.raises(UsageError, match=r"--into: .* was trained on a base that is not quantized; leave it out"):
        merge_adapter(adapter, tmp_path / "out", into="dequantized", console=QUIET)
    with pytest.raises(UsageError, match="--into: found other, expected original, dequantized"):
        merge_adapter(adapter, tmp_path / "out", into="other", console=QUIET)
    assert not (tmp_path / "out").exists()
