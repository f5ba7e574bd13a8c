"""A converted checkpoint gives the logits of the code that wrote it, and says what became of each tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from instructft.errors import UsageError
from instructft.extras.convert import convert as module
from tests.helpers.gpt2_kin import SIZES, GPTConfig, GPTModel, NanoGPT, args, convert, gap, loaded, shaken, tanh_gelu


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_nanogpt(tmp_path: Path, save: Any, bias: bool, tied: bool) -> None:
    model = shaken(NanoGPT(bias=bias, tied=tied))
    checkpoint = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
        "model_args": args(bias, dropout=0.2),
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.5),
        "config": {"n_head": 12, "n_layer": 12, "compile": True},  # what was asked for, not what was built
    }
    facts = convert(save(checkpoint), tmp_path / "out")
    assert gap(model, tmp_path / "out") < 1e-5
    assert facts["activation"]["name"] == "gelu"
    assert facts["left_out"] == ["optimizer", "iter_num", "best_val_loss", "config"]
    config = loaded(tmp_path / "out").config
    assert (config.n_head, config.n_layer, config.n_positions, config.tie_word_embeddings) == (4, 2, 48, tied)
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.2, 0.2, 0.2)
    # two norms and four matrices a layer, and the last norm
    assert len(facts["added"]) == (0 if bias else 2 * 6 + 1)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_llms_from_scratch(tmp_path: Path, save: Any, qkv_bias: bool) -> None:
    model = shaken(GPTModel(qkv_bias))
    file = save({"model_state_dict": model.state_dict(), "optimizer_state_dict": {"state": {}, "param_groups": []}})
    facts = convert(file, tmp_path / "out", n_head=4)
    assert gap(model, tmp_path / "out") < 1e-5
    assert facts["activation"]["name"] == "gelu_new"
    assert not facts["tied"]
    assert sorted(facts["dropped"]) == ["trf_blocks.0.att.mask", "trf_blocks.1.att.mask"]
    assert len(facts["added"]) == (0 if qkv_bias else 2)


def test_build_nanogpt_with_a_settings_object(tmp_path: Path, save: Any) -> None:
    model = shaken(NanoGPT(act=tanh_gelu))
    facts = convert(save({"model": model.state_dict(), "config": GPTConfig(), "step": 9}), tmp_path / "out")
    assert gap(model, tmp_path / "out") < 1e-5
    assert facts["settings"] == {"from": "config", **{key: SIZES[key] for key in vars(GPTConfig())}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(tmp_path: Path, save: Any, dtype: torch.dtype) -> None:
    model = shaken(NanoGPT(bias=False)).to(dtype)
    convert(save({"model": model.state_dict(), "model_args": args(False)}), tmp_path / "out")
    assert {tensor.dtype for tensor in loaded(tmp_path / "out", dtype="auto").state_dict().values()} == {dtype}
    assert gap(model.float(), tmp_path / "out") < 1e-5


def test_shards(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHARD", 40_000)
    model = shaken(NanoGPT())
    convert(save({"model": model.state_dict(), "model_args": args()}), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert gap(model, tmp_path / "out") < 1e-5


def test_every_tensor_is_accounted_for(tmp_path: Path, save: Any) -> None:
    model = shaken(GPTModel())
    state = model.state_dict()
    convert(save(state), tmp_path / "out", n_head=4)
    facts = json.loads((tmp_path / "out" / "convert.json").read_text(encoding="utf-8"))
    assert facts["tensors"].keys() | facts["dropped"].keys() == state.keys()
    assert not facts["tensors"].keys() & facts["dropped"].keys()
    made = loaded(tmp_path / "out").state_dict()
    assert {entry["to"] for entry in facts["tensors"].values()} | facts["added"].keys() == made.keys()
    assert facts["tensors"]["trf_blocks.1.att.W_key.weight"] == {
        "to": "transformer.h.1.attn.c_attn.weight",
        "how": "joined and transposed",
    }
    assert facts["proof"]["lengths"] == [1, 2, 33, 48]
    assert 0 < facts["proof"]["difference"] <= facts["proof"]["tolerance"] <= 1e-4 * facts["proof"]["scale"]


def test_heads_have_to_be_known(tmp_path: Path, save: Any) -> None:
    sizes = {"n_embd": 128, "n_layer": 1}
    file = save(NanoGPT(**sizes).state_dict())
    with pytest.raises(UsageError, match=r"would be --n-head 2$"):
        convert(file, tmp_path / "out")
    both = save({"model": NanoGPT().state_dict(), "model_args": args()}, "both.pt")
    with pytest.raises(UsageError, match=r"found 2, but model_args in .* says 4"):
        convert(both, tmp_path / "out", n_head=2)


def test_the_command(tmp_path: Path, save: Any) -> None:
    from instructft.cli import app

    file = save({"model": shaken(NanoGPT()).state_dict(), "model_args": args()})
    done = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for part in (
        "4 heads (from model_args)",
        "activation gelu: the exact GELU",
        "transposed",
        "proof ",
        "no tokenizer",
    ):
        assert part in done.output
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out")])
    assert isinstance(again.exception, UsageError)
    assert again.exception.exit_code == 2
    assert "is not empty" in str(again.exception)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
