"""What a run saves is what its base is: every tensor, in its shape and its type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from instructft.errors import ModelError
from instructft.weights.base_manifest import places, save_like_base
from tests.weights.test_verify_saved import MODELS


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    model.save_pretrained(folder, **more)
    return model


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    held = {**load_file(folder / "model.safetensors"), **{name.replace("__", "."): t for name, t in tensors.items()}}
    kept = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_is_the_same_and_its_files_stay(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "base")
    model.save_pretrained(tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    count = len(load_file(tmp_path / "base" / "model.safetensors"))
    found = save_like_base(model, tmp_path / "run", tmp_path / "base", keep_dtype=False)
    assert found == {"tensors": count, "dtype": "float32"}
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("shards", ["50GB", "10KB"])
def test_weights_go_back_to_the_type_of_the_base_and_untouched_ones_to_its_bits(shards: str, tmp_path: Path) -> None:
    model = saved("untied", tmp_path / "base", torch.bfloat16).float()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)  # less than half of what bfloat16 can tell apart
    model.save_pretrained(tmp_path / "run", max_shard_size=shards)
    found = save_like_base(model, tmp_path / "run", tmp_path / "base", keep_dtype=False)
    assert found["dtype"] == "bfloat16"
    base = load_file(tmp_path / "base" / "model.safetensors")
    now: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "run").glob("*.safetensors"):
        now |= load_file(file)
    assert now.keys() == base.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in now.values())
    assert [name for name in base if not torch.equal(base[name], now[name])] == ["lm_head.weight"]
    moved = (now["lm_head.weight"].float() - base["lm_head.weight"].float()).mean()
    assert moved == pytest.approx(1e-4, rel=0.3)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "bfloat16"
    again = type(model).from_pretrained(tmp_path / "run", dtype="auto")
    assert again.dtype == torch.bfloat16
    index = tmp_path / "run" / "model.safetensors.index.json"
    if shards == "10KB":
        size = json.loads(index.read_text())["metadata"]["total_size"]
        assert size == sum(tensor.nbytes for tensor in now.values())


def test_a_type_that_was_asked_for_stays(tmp_path: Path) -> None:
    model = saved("untied", tmp_path / "base", torch.bfloat16).float()
    model.save_pretrained(tmp_path / "run")
    assert save_like_base(model, tmp_path / "run", tmp_path / "base", keep_dtype=True)["dtype"] == "float32"


def test_what_transformers_has_no_place_for_is_carried_over(tmp_path: Path) -> None:
    model = saved("untied", tmp_path / "base")
    model.save_pretrained(tmp_path / "run")
    change(tmp_path / "base", mtp__layers__0__weight=torch.ones(3, dtype=torch.bfloat16))
    found = save_like_base(model, tmp_path / "run", tmp_path / "base", keep_dtype=False)
    assert found["carried"] == ["mtp.layers.0.weight"]
    assert torch.equal(load_file(tmp_path / "run" / "model.safetensors")["mtp.layers.0.weight"], torch.ones(3))


def test_a_vocabulary_that_grew_is_explained(tmp_path: Path) -> None:
    model = saved("untied", tmp_path / "base")
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "run")
    found = save_like_base(model, tmp_path / "run", tmp_path / "base", keep_dtype=False)
    assert found["grown"] == ["lm_head.weight", "model.embed_tokens.weight"]


def test_a_tensor_of_the_base_that_was_not_saved_is_an_error(tmp_path: Path) -> None:
    model = saved("tied", tmp_path / "base")
    model.save_pretrained(tmp_path / "run")
    change(tmp_path / "run", model__norm__weight=None)
    with pytest.raises(ModelError, match=r"model\.norm\.weight of the base missing \(1 in all\)"):
        save_like_base(model, tmp_path / "run", tmp_path / "base", keep_dtype=False)


def test_another_shape_is_an_error(tmp_path: Path) -> None:
    model = saved("tied", tmp_path / "base")
    model.save_pretrained(tmp_path / "run")
    change(tmp_path / "run", model__layers__0__mlp__up_proj__weight=torch.ones(24, 17))
    with pytest.raises(ModelError, match=r"up_proj\.weight has the shape \[24, 17\], in the base \[24, 16\]"):
        save_like_base(model, tmp_path / "run", tmp_path / "base", keep_dtype=False)


def test_a_tensor_that_the_base_lacks_is_an_error(tmp_path: Path) -> None:
    model = saved("untied", tmp_path / "base")
    model.save_pretrained(tmp_path / "run")
    change(tmp_path / "base", lm_head__weight=None)
    with pytest.raises(ModelError, match=r"lm_head\.weight new, which the base does not have"):
        save_like_base(model, tmp_path / "run", tmp_path / "base", keep_dtype=False)


def test_parts_of_a_parameter_are_known_as_such() -> None:
    names = ["model.layers.0.mlp.experts.0.w1.weight", "model.norm.weight", "mtp.weight"]
    found = places(MODELS["mixture"](), ["model.layers.0.block_sparse_moe.experts.0.w1.weight", *names[1:]])
    assert list(found.values()) == [
        ("model.layers.0.mlp.experts.gate_up_proj", ".experts.*.w1.weight"),
        ("model.norm.weight", None),
        (None, None),
    ]
