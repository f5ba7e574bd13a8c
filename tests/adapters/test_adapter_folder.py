"""Adapter folders: one that is whole gives the model that was trained, bit for bit; any other is refused everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from instructft import cli
from instructft.adapters.adapter_folder import is_adapter, read_adapter
from instructft.adapters.attach import attach, check_fit, locate_base
from instructft.errors import AdapterError, ModelError
from instructft.models.load_for_inference import load_bare, load_base, locate
from tests.helpers.adapters import (
    PREFIX,
    A,
    base_json,
    config,
    make_adapter,
    pair_gone,
    tensors,
)

ROWS = f"{PREFIX}transformer.wte.token_adapter.trainable_tokens_delta"


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def other_base(folder: Path) -> None:
    def train(state: dict[str, Any]) -> None:
        state["transformer.h.0.attn.c_attn.weight"] += 1e-3

    base = folder.parent / "base"
    state = load_file(base / "model.safetensors")
    train(state)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})


def layer_more(state: dict[str, Any]) -> None:
    for name in (A, A.replace("lora_A", "lora_B")):
        state[name.replace("h.0", "h.7")] = state[name].clone()


# what is broken -> how, and what is said
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensor missing": (
        lambda f: tensors(f, lambda s: s.pop(A)),
        r"not whole:\n  \S+h\.0\.attn\.c_attn\.lora_A\.weight is missing, the other half of lora_B",
    ),
    "pair missing": (
        lambda f: tensors(f, pair_gone),
        r"does not fit its base .*:\n  \S+c_attn\.lora_A\.weight is missing\n  \S+c_attn\.lora_B\.weight is missing",
    ),
    "extra tensor": (
        lambda f: tensors(f, layer_more),
        r"h\.7\.attn\.c_attn\.lora_A\.weight belongs to no layer of this base",
    ),
    "a weight of the base": (
        lambda f: tensors(f, lambda s: s.update({PREFIX + "transformer.h.0.ln_1.weight": torch.ones(32)})),
        r"h\.0\.ln_1\.weight belongs to no layer of this base",
    ),
    "zero-sized": (
        lambda f: tensors(f, lambda s: s.update({A: torch.zeros(4, 0)})),
        r"lora_A\.weight has the shape \(4, 0\): it holds nothing",
    ),
    "wrong shape": (
        lambda f: tensors(f, lambda s: s.update({A: torch.zeros(4, 31)})),
        r"lora_A\.weight has the shape \(4, 31\); expected \(4, 32\)",
    ),
    "wrong rank": (
        lambda f: tensors(f, lambda s: s.update({A: torch.zeros(5, 32)})),
        r"lora_A\.weight has the shape \(5, 32\); expected rank 4 on axis 0",
    ),
    "unknown base": (
        lambda f: (f.parent / "base").rename(f.parent / "moved"),
        r"trained on \S+/base, which is neither a folder .*write its new place to name_or_path in \S+/base\.json",
    ),
    "changed base": (
        other_base,
        r"is not the base that \S+ was trained on: found the fingerprint sha256:\w+, ex",
    ),
    "cut short": (cut, r"adapter_model\.safetensors is cut short: found \d+ bytes, expected \d+"),
    "garbage": (
        lambda f: (f / "adapter_config.json").write_text("{not json", encoding="utf-8"),
        r"adapter_config\.json cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_adapters_are_refused_by_every_command(
    what: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    break_it, message = BROKEN[what]
    break_it(sound)
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text(json.dumps({"instruction": "What is 1 + 1?", "output": "2"}) + "\n", encoding="utf-8")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    commands = {
        "generate": [sound, "--input", rows, "--output", answers],
        "chat": [sound],
        "evaluate": [sound, "--data", rows],
    }
    for command, arguments in commands.items():
        monkeypatch.setattr(sys, "argv", ["instructft", command, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert ended.value.code == 2, (command, err)
        assert err.splitlines()[0].endswith("…"), err
        assert err.splitlines()[1].startswith("instructft: "), err
        assert re.search(message, err), err
        assert "Traceback" not in out + err
        assert str(sound.parent) in err
    assert not answers.exists()


# found without the base, by whoever reads the folder
UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "pickled weights .* save it again",
    ),
    "longer": (
        lambda f: (f / "adapter_model.safetensors").open("ab").write(b"x"),
        "is longer than its header says: found",
    ),
    "no header": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 50), "cut short or no safetensors"),
    "no tensors": (lambda f: tensors(f, lambda s: s.clear()), "holds no tensors at all"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "found list, expected a JSON object"),
    "another method": (lambda f: config(f, peft_type="IA3"), "peft_type: found 'IA3', expected 'LORA'"),
    "another task": (lambda f: config(f, task_type="SEQ_CLS"), "task_type: found 'SEQ_CLS', expected 'CAUSAL_LM'"),
    "no rank": (lambda f: config(f, r="4"), "rank of .*: found '4', expected a whole number"),
    "bad pattern": (lambda f: config(f, rank_pattern={"(": 3}), "rank_pattern cannot be read"),
    "no magnitudes": (lambda f: config(f, use_dora=True), r"lora_magnitude_vector is missing, though"),
    "no rows": (lambda f: config(f, trainable_token_indices=[1, 2]), "missing: the rows of 2 trained tokens"),
    "another number of rows": (
        lambda f: (
            config(f, trainable_token_indices=[1, 2]),
            tensors(f, lambda s: s.update({ROWS: torch.ones(3, 32)})),
        ),
        r"trainable_tokens_delta has 3 rows; expected 2, one for each of the trained tokens",
    ),
    "odd rows": (lambda f: config(f, trainable_token_indices=[-1]), "expected lists of row numbers"),
    "odd name": (lambda f: tensors(f, lambda s: s.update(x=torch.ones(2))), "x is no name that PEFT gives"),
    "half a record": (lambda f: (f / "base.json").write_text('{"dtype": "float32"}'), "base.json lacks commit, "),
    "way out": (lambda f: base_json(f, subfolder="../../etc"), r"base.json: subfolder: found '../../etc'"),
    "odd record": (lambda f: base_json(f, quantization="3bit"), r"base.json: quantization: found '3bit'"),
    "few rows": (lambda f: base_json(f, vocab_size=0), r"base.json: vocab_size: found 0"),
    "no base": (
        lambda f: ((f / "base.json").unlink(), config(f, base_model_name_or_path=None)),
        "does not name the base it was trained on; write its folder",
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_refused_without_the_base(what: str, sound: Path) -> None:
    break_it, message = UNREADABLE[what]
    read_adapter(sound)
    break_it(sound)
    assert is_adapter(sound)
    with pytest.raises(AdapterError, match=message):
        locate(str(sound))


def test_attach_itself_is_strict(sound: Path) -> None:
    """Also for a caller that brings a base of its own and checks nothing before."""
    tensors(sound, pair_gone)
    adapter = read_adapter(sound)
    with pytest.raises(AdapterError, match=r"lora_A\.weight is missing\n.*lora_B\.weight is missing$"):
        attach(load_base(adapter), adapter)
    with pytest.raises(AdapterError, match=r"lora_A\.weight is missing"):
        check_fit(adapter, locate_base(adapter))


def test_more_than_three_problems_are_counted(sound: Path) -> None:
    tensors(sound, lambda s: [s.pop(name) for name in list(s) if "lora_B" in name])
    with pytest.raises(AdapterError, match=r"lora_B.weight is missing[^\n]*\n  and 5 more$"):
        read_adapter(sound)


def test_nan_and_what_peft_did_not_load(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read_adapter(sound)
    monkeypatch.setattr("peft.set_peft_model_state_dict", lambda *a, **k: None)
    with pytest.raises(ModelError, match=r"PEFT did not load .* as it is in the file"):
        attach(load_base(adapter), adapter)
    tensors(sound, lambda s: s[A].fill_(float("nan")))
    with pytest.raises(AdapterError, match=r"lora_A\.weight holds NaN or infinity"):
        load_bare(str(sound))


def test_a_base_that_is_an_adapter_or_has_too_few_rows(sound: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(sound / "adapter_config.json", tmp_path / "base")
    with pytest.raises(AdapterError, match="holds an adapter itself; merge that one first"):
        load_bare(str(sound))
    (tmp_path / "base" / "adapter_config.json").unlink()
    rows = json.loads((bases["gpt2"] / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    folder, *_ = make_adapter(bases["gpt2"], tmp_path / "tokens", new=True)
    base_json(folder, vocab_size=rows)  # less than the rows that were trained
    with pytest.raises(AdapterError, match=r"base.json: vocab_size: found \d+, which is not what instructft writes"):
        read_adapter(folder)


def test_half_a_base_is_refused(sound: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-64])
    with pytest.raises(ModelError, match=r"model.safetensors is cut short"):
        load_bare(str(sound))
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load_bare(str(sound))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"names ../model-2.safetensors, which is no file in its folder"):
        load_bare(str(sound))


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_a_pattern_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr("instructft.adapters.adapter_folder.SECONDS", 0.2)
    endless = r"((\w|[.])+)+#"
    config = {"peft_type": "LORA", "r": 2, key: {endless: 2} if key == "rank_pattern" else endless}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/name"}))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"a regular expression in it .* takes over 0\.2 s"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", -1e308), ("lora_alpha", "16"),
        ("lora_dropout", float("nan")), ("lora_dropout", 1.5), ("alpha_pattern", {"q_proj": float("nan")}),
    ],
)  # fmt: skip
def test_a_scale_that_is_no_number_is_named(tmp_path: Path, key: str, value: Any) -> None:
    """JSON as Python reads it has NaN; every answer would be made of it, and nobody told."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, key: value, "base_model_name_or_path": "org/name"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {key}.*: found .*, expected a "):
        read_adapter(tmp_path)
