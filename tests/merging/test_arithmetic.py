"""A merged value is the exact one, rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from instructft import merge_adapter
from instructft.errors import ModelError
from instructft.merging.arithmetic import Edit, Lora, Place, merged
from instructft.weights.rounding import unit_in_last_place
from instructft.weights.tensor_io import read_tensors
from tests.helpers.merging import (
    CONFIGS,
    QUIET,
    files_in,
    make_adapter,
    make_base,
    rewrite,
)


@pytest.mark.parametrize("options", ["lora", "dora"])
def test_a_bfloat16_merge_to_the_nearest_is_the_nearest_there_is(options: str, tmp_path: Path) -> None:
    """Each merged value is the exact one rounded once; PEFT, which rounds twice, is further away."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False)
    adapter = make_adapter(tmp_path / "adapter", base, **CONFIGS[options])
    merge_adapter(adapter, tmp_path / "out", verify=False, rounding="nearest", console=QUIET)
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter, autocast_adapter_dtype=False
    )
    exact = exact.double().merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    theirs = PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    off = {"ours": 0.0, "peft": 0.0}
    for name, value in exact.items():
        assert ours[name].dtype == torch.bfloat16
        unit = unit_in_last_place(value.float(), torch.bfloat16)
        assert ((ours[name].double() - value).abs() <= 0.5001 * unit + 1e-7).all(), name
        off["ours"] += float((ours[name].double() - value).abs().sum())
        off["peft"] += float((theirs[name].double() - value).abs().sum())
    assert off["ours"] < 0.95 * off["peft"]


def test_a_dtype_too_small_for_the_weights_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base)
    rewrite(adapter, lambda found: [tensor.mul_(1e4) for tensor in found.values()])
    with pytest.raises(ModelError, match="not a number in float16"):
        merge_adapter(adapter, tmp_path / "out", verify=False, dtype="float16", console=QUIET)
    assert files_in(tmp_path) == {"base", "adapter"}


def test_parts_of_a_weight_are_merged_as_the_weight_is(tmp_path: Path) -> None:
    """All experts in one tensor, each transposed (Qwen 3 VL MoE); a layer that is two tensors on the disk."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    experts, layer = torch.randn(3, 4, 5), torch.randn(6, 5)  # (E, out, in), (out, in)
    held = {"experts": experts.mT.contiguous(), "gate": layer[:2].clone(), "up": layer[2:].clone()}
    held |= {
        "a": torch.randn(3 * 2, 5),
        "b": torch.randn(4, 2 * 3),
        "one_a": torch.randn(2, 5),
        "one_b": torch.randn(6, 2),
    }
    save_file(held, tmp_path / "all.safetensors")
    there = read_tensors(tmp_path / "all.safetensors")

    whole = Edit(lora=Lora("a", "b", 0.5, False, experts=3))
    place = Place("experts", transposed=True)
    found = torch.cat(list(merged(there["experts"], whole.at(place), there, torch.float64)))
    change = (
        torch.einsum("ore,eri->eoi", held["b"].double().reshape(4, 2, 3), held["a"].double().reshape(3, 2, 5)) * 0.5
    )
    torch.testing.assert_close(place.of(experts + change), found, atol=1e-12, rtol=0)

    whole = Edit(lora=Lora("one_a", "one_b", 2.0, False))
    expected = layer + 2.0 * held["one_b"].double() @ held["one_a"].double()
    for part in (Place("gate", start=0, stop=2), Place("up", start=2, stop=6)):
        found = torch.cat(list(merged(there[part.name], whole.at(part), there, torch.float64)))
        torch.testing.assert_close(part.of(expected), found, atol=1e-12, rtol=0)


def test_a_weight_of_one_number_is_all_of_its_parameter() -> None:
    """Apertus and Emu3 have such; nothing of it is a row."""
    import torch

    assert Place("scale").of(torch.tensor(2.0)) == 2.0
