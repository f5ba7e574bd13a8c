"""A damaged file of a model is named by every command that opens it, with exit code 2, whatever the library raises."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Regex, pre_tokenizers

from instructft.adapters.adapter_folder import read_adapter
from instructft.errors import InstructftError, ModelFileError, UsageError
from instructft.models.load_for_inference import load_for_inference
from instructft.models.tokenizer import load_tokenizer
from instructft.prompt.loss_mask import Encoder
from instructft.recipe.load import load_recipe
from instructft.weights.readable import reading, require_readable


@pytest.fixture
def folder(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps(change(found) or found))


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    found = json.loads(content[8 : 8 + length])
    text = change(found) or json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def first(found: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in found.items() if name != "__metadata__")


class Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled(path: Path) -> None:
    path.unlink()
    torch.save({"weight": Code(path.parent / "ran")}, path.with_name("pytorch_model.bin"))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:200]), "cut short or no safetensors file"),
    "empty": ("model.safetensors", lambda p: p.write_bytes(b""), "cut short or no safetensors file"),
    "tail": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-64]), "cut short: found"),
    "deep": ("model.safetensors", lambda p: header(p, lambda _: b"[" * 20_000), "its header cannot be read"),
    "dtype": ("model.safetensors", lambda p: header(p, lambda h: first(h).update(dtype=["F32"])), "does not say what"),
    "offsets": (
        "model.safetensors",
        lambda p: header(p, lambda h: first(h).update(data_offsets=[0.0, 4.0])),
        "does not say what",
    ),
    "shape": ("model.safetensors", lambda p: header(p, lambda h: first(h).update(shape=[[2]])), "does not say what"),
    "true": ("model.safetensors", lambda p: header(p, lambda h: first(h).update(shape=[True])), "does not say what"),
    "config-cut": ("config.json", lambda p: p.write_bytes(p.read_bytes()[:100]), "cannot be read as JSON"),
    "config-list": ("config.json", lambda p: p.write_text("[1]"), "found list, expected a JSON object"),
    "config-deep": ("config.json", lambda p: p.write_text("[" * 200_000), "cannot be read as JSON"),
    "config-text": ("config.json", lambda p: edit(p, lambda c: c.update(n_layer="two")), "n_layer.*expected int"),
    "generation-cut": ("generation_config.json", lambda p: p.write_text('{"eos_token_id": 0, '), "cannot be read"),
    "tokenizer-other": ("tokenizer.json", lambda p: p.write_text('{"a": 1}'), "expected an object with a model"),
    "tokenizer-list": ("tokenizer.json", lambda p: p.write_text("[]"), "expected an object with a model"),
    "tokenizer-vocabulary": (
        "tokenizer.json",
        lambda p: edit(p, lambda t: t["model"].update(vocab=[])),
        "no tokenizer that can be read",
    ),
    "tokenizer-cut": ("tokenizer.json", lambda p: p.write_bytes(p.read_bytes()[:999]), "no tokenizer that can be read"),
    "tokenizer-text": ("tokenizer_config.json", lambda p: p.write_text('"text"'), "expected a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_file_is_named(folder: Path, damage: str) -> None:
    name, damaged, said = DAMAGES[damage]
    damaged(folder / name)
    with pytest.raises(ModelFileError, match=rf"(?s){name}.*{said}") as refused:
        load_for_inference(str(folder))
    assert refused.value.exit_code == 2


def test_a_pickle_that_holds_code_is_refused_in_our_words(folder: Path) -> None:
    pickled(folder / "model.safetensors")
    with pytest.raises(ModelFileError, match="more than tensors, so that reading it could run code") as refused:
        load_for_inference(str(folder))
    assert "weights_only=False" not in str(refused.value)
    assert not (folder / "ran").exists()


def test_a_pattern_of_exponential_time_is_an_error_that_names_the_file(folder: Path) -> None:
    _, tokenizer = load_for_inference(str(folder))
    endless = pre_tokenizers.Split(Regex(r"(\w+)+#"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = endless
    with pytest.raises(ModelFileError, match=r"base \(tokenizer\.json\) fails on a text: .*retry-limit-in-match"):
        Encoder(tokenizer).tokenize(["a" * 60 + " #"])


@pytest.mark.parametrize(
    "pattern", [r"(\w+)+#", "(x+x+)+y", "(a|aa)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", r"([a-z]+)*\d\?"]
)
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_and_one_that_is_refused_before_any_text_comes(folder: Path, pattern: str, part: str) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    change = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}]}
    path.write_text(json.dumps({**found, part: cut if part == "pre_tokenizer" else change}))
    with pytest.raises(
        ModelFileError, match=r"base.* does not come to an end on some texts.*retry-limit-in-match"
    ) as no:
        load_for_inference(str(folder))
    assert pattern in str(no.value)
    recipe = load_recipe("quickstart", [f"model.tokenizer={folder}"])
    with pytest.raises(UsageError, match=r"model\.tokenizer: the tokenizer of"):
        load_tokenizer(recipe)


def test_a_tokenizer_of_gigabytes_is_not_opened(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 34)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json cannot be a tokenizer's: it has 17,179,869,184 bytes"):
        load_for_inference(str(folder))
    with pytest.raises(UsageError, match=r"model\.tokenizer: .*tokenizer\.json cannot be a tokenizer's"):
        load_tokenizer(load_recipe("quickstart", [f"model.tokenizer={folder}"]))


def test_adapters_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 9000) + b"[" * 9000)
    with pytest.raises(InstructftError, match=r"adapter_model\.safetensors is no safetensors file") as refused:
        read_adapter(tmp_path)
    assert refused.value.exit_code == 2


def test_a_sound_folder_is_read_and_its_errors_keep_their_words(folder: Path) -> None:
    require_readable(folder)
    with pytest.raises(ModelFileError, match="base could not be loaded: no such thing"), reading("base", folder):
        raise ValueError("no such thing")
    with pytest.raises(KeyboardInterrupt), reading("base", folder):
        raise KeyboardInterrupt
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert list(file.keys())
