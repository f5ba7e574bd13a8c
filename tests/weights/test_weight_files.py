"""A model is known again by its tensors, however they lie in files; a header that lies is found out."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from instructft.errors import ModelError
from instructft.weights.base_record import base_fingerprint
from instructft.weights.weight_files import read_header
from tests.helpers.adapters import (
    make_base,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {kind: make_base(kind, place / kind) for kind in ("gpt2", "llama", "wide")}


def save_again(base: Path, folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, **how: Any) -> str:
    """The base saved once more, changed or not: the fingerprint of that."""
    model = AutoModelForCausalLM.from_pretrained(base)
    state = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    if change:
        change(state)
    if how:
        model.save_pretrained(folder, **how)
    else:
        folder.mkdir()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(base / "config.json", folder)
    return base_fingerprint(str(folder))


def test_the_fingerprint_is_that_of_the_tensors(bases: dict[str, Path], tmp_path: Path) -> None:
    base, name = bases["gpt2"], "transformer.h.1.mlp.c_fc.weight"
    own = base_fingerprint(str(base))
    assert own.startswith("sha256:")
    assert save_again(base, tmp_path / "shards", max_shard_size="20KB") == own
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert save_again(base, tmp_path / "same") == own
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(load_file(base / "model.safetensors"), pickled / "pytorch_model.bin")
    shutil.copy(base / "config.json", pickled)
    assert base_fingerprint(str(pickled)) == own

    def move(state: dict[str, Any]) -> None:
        state[name][-1, -1] += 1e-6  # 16 KiB, so every byte counts

    def retype(state: dict[str, Any]) -> None:
        state[name] = state[name].view(torch.int32)  # the same bytes

    def reshape(state: dict[str, Any]) -> None:
        state[name] = state[name].reshape(-1).contiguous()

    def rename(state: dict[str, Any]) -> None:
        state[name.replace("weight", "weights")] = state.pop(name)  # the order of the names stays

    changed = {change.__name__: save_again(base, tmp_path / change.__name__, change) for change in (move, retype)}
    changed |= {change.__name__: save_again(base, tmp_path / change.__name__, change) for change in (reshape, rename)}
    assert len({own, *changed.values()}) == 5, changed


def test_the_fingerprint_of_a_large_base_takes_no_time(bases: dict[str, Path], tmp_path: Path) -> None:
    """12 GB, of which a sparse file holds nothing on disk; reading all of them would take many seconds."""
    header = {
        f"layer.{i}": {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [i << 25, (i + 1) << 25]}
        for i in range(360)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, path.stat().st_size + (360 << 25))
    shutil.copy(bases["gpt2"] / "config.json", tmp_path)
    begun = time.perf_counter()
    before = base_fingerprint(str(tmp_path))
    assert time.perf_counter() - begun < 2
    with path.open("r+b") as file:  # the last bytes of a tensor count
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert base_fingerprint(str(tmp_path)) != before


def test_headers_that_lie(tmp_path: Path) -> None:
    for header, message in (
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "does not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "does not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "header cannot be read"),
        ([1], "header cannot be read"),
    ):
        text = json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(ModelError, match=message):
            read_header(tmp_path / "x.safetensors")
