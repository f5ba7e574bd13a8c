"""A merged value is the exact one, rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from instructft import merge_adapter
from instructft.errors import ModelError
from instructft.weights.rounding import unit_in_last_place
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
