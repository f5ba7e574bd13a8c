"""A wrong conversion is not kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import ModelError
from instructft.extras.convert import convert as module
from instructft.extras.convert import targets
from tests.helpers.gpt2_kin import NanoGPT, args, convert, shaken

WRONG: dict[str, Callable[[Any], Any]] = {
    "another part not transposed": lambda t: t["transformer.h.1.attn.c_proj.weight"],
    "another order of q, k and v": lambda t: t["transformer.h.0.attn.c_attn.weight"],
    "another bias": lambda t: t["transformer.h.1.mlp.c_fc.bias"],
    "other positions": lambda t: t["transformer.wpe.weight"],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_conversion_is_not_kept(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    right = targets.make_targets

    def wrong(*given: Any) -> Any:
        made = right(*given)
        (name,) = (name for name, target in made.items() if target is WRONG[what](made))
        old = made[name]

        tensor = old.tensor
        if what.endswith("transposed"):
            spoiled = tensor.T.contiguous()
        else:
            spoiled = tensor.roll(32, -1) if "q, k" in what else tensor.flip(0)
        made[name] = old._replace(tensor=spoiled)
        return made

    monkeypatch.setattr(module, "make_targets", wrong)
    file = save({"model": shaken(NanoGPT()).state_dict(), "model_args": args()})
    with pytest.raises(ModelError, match="is not the source: a logit differs by"):
        convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_the_other_gelu_is_not_within_the_tolerance(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save({"model": shaken(NanoGPT()).state_dict(), "model_args": args()})
    right = module._write_configs

    def wrong(folder: Path, source: Any, layout: Any, heads: int, activation: str, *rest: Any) -> None:
        assert activation == "gelu"
        right(folder, source, layout, heads, "gelu_new", *rest)

    monkeypatch.setattr(module, "_write_configs", wrong)
    with pytest.raises(ModelError, match="is not the source"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
