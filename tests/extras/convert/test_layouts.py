"""GPT-2 is found in each layout, or what is wrong with it is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from instructft.errors import UsageError
from tests.helpers.gpt2_kin import SIZES, NanoGPT, args, convert, gap, loaded, shaken, tanh_gelu


def test_masks_are_dropped_and_tell_the_older_activation(tmp_path: Path, save: Any) -> None:
    model = shaken(NanoGPT(act=tanh_gelu, masks=True))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    facts = convert(save(state), tmp_path / "out", n_head=4)
    assert gap(model, tmp_path / "out") < 1e-5
    assert sorted(facts["dropped"]) == [
        "module.lm_head.weight",
        "module.transformer.h.0.attn.bias",
        "module.transformer.h.1.attn.bias",
    ]


@pytest.mark.parametrize("name", ["gelu_new", "relu"])
def test_a_given_activation(tmp_path: Path, save: Any, name: str) -> None:
    model = shaken(NanoGPT(act={"gelu_new": tanh_gelu, "relu": F.relu}[name]))
    convert(save({"model": model.state_dict(), "model_args": args()}), tmp_path / "out", activation=name)
    assert gap(model, tmp_path / "out") < 1e-5


def test_transformers_own_layout(tmp_path: Path, save: Any, tiny_model: Any) -> None:
    shaken(tiny_model)
    state = tiny_model.state_dict() | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    convert(save(state), tmp_path / "out", n_head=2)
    made = loaded(tmp_path / "out")
    ours, theirs = made.state_dict(), tiny_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert made.config.activation_function == tiny_model.config.activation_function


def test_square_matrices_lie_as_the_others(tmp_path: Path, save: Any) -> None:
    """q, k and v apart and an MLP as wide as the model: no shape tells how any matrix lies."""
    torch.manual_seed(0)
    width = SIZES["n_embd"]
    state = {"tok_emb.weight": torch.randn(50, width), "pos_emb": torch.randn(1, 16, width)}
    for part in ("attn.query", "attn.key", "attn.value", "attn.proj", "mlp.0", "mlp.2"):
        state |= {f"blocks.0.{part}.weight": torch.randn(width, width) / 4, f"blocks.0.{part}.bias": torch.randn(width)}
    for part in ("blocks.0.ln1", "blocks.0.ln2", "ln_f"):
        state |= {f"{part}.weight": torch.randn(width), f"{part}.bias": torch.randn(width)}
    state["head.weight"] = torch.randn(50, width)
    facts = convert(save(state), tmp_path / "out", n_head=2)
    made = loaded(tmp_path / "out").state_dict()
    assert torch.equal(made["transformer.h.0.mlp.c_fc.weight"], state["blocks.0.mlp.0.weight"].T)
    joined = torch.cat([state[f"blocks.0.attn.{part}.weight"] for part in ("query", "key", "value")])
    assert torch.equal(made["transformer.h.0.attn.c_attn.weight"], joined.T)
    assert facts["mlp_width"] == width


def change(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, Any]], Any]:
    def edit(checkpoint: dict[str, Any]) -> None:
        full = f"transformer.{name}"
        if tensor is None:
            del checkpoint["model"][full]
        else:
            checkpoint["model"][full] = tensor

    return edit


def setting(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: checkpoint["model_args"].update(values)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown": (change("h.0.attn.q_norm.weight", torch.ones(8)), r"does not have: transformer.h.0.attn.q_norm.weight"),
    "missing": (change("h.1.ln_2.weight", None), r"missing are h.1.ln_2.w "),
    "a missing bias": (change("h.1.mlp.c_fc.bias", None), r"missing are h.1.mlp.fc.b "),
    "no positions": (change("wpe.weight", None), r"missing are wpe.w "),
    "shape": (change("h.1.mlp.c_proj.weight", torch.ones(128, 32)), r"c_proj.weight \(128, 32\), expected \(32, 128\)"),
    "width": (change("h.0.attn.c_attn.weight", torch.ones(64, 32)), r"expected 96 × 32"),
    "NaN": (change("ln_f.weight", torch.full((32,), math.nan)), r"NaN in transformer.ln_f.weight"),
    "dtype": (change("ln_f.weight", torch.ones(32, dtype=torch.int8)), r"ln_f.weight is torch.int8"),
    "window": (
        change("h.0.attn.bias", torch.ones(48, 48).tril().triu(-8)),
        r"not have: transformer.h.0.attn.bias",
    ),
    "twice": (change("h.0.mlp.fc1.weight", torch.ones(128, 32)), r"the same twice: .*c_fc.weight and .*fc1.weight"),
    "layers": (setting(n_layer=3), r"contradicts itself: model_args says n_layer 3, its tensors 2"),
    "another model": (setting(use_rotary=True), r"model_args says use_rotary=True, which GPT-2 does not have"),
    "heads": (setting(n_head=5), r"found 5, expected a divisor of the width 32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused(tmp_path: Path, save: Any, case: str) -> None:
    checkpoint = {"model": NanoGPT().state_dict(), "model_args": args()}
    edit, message = BROKEN[case]
    edit(checkpoint)
    with pytest.raises(UsageError, match=message):
        convert(save(checkpoint), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
