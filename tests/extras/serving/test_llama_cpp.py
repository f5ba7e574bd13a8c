"""How a tokenizer cuts text, by llama.cpp's names; and where its tools are looked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instructft.data.sources import QUICKSTART
from instructft.errors import UsageError
from instructft.extras.serving.llama_cpp import find_converter, find_quantizer, formats, pre_tokenizer
from tests.conftest import GPT2


def changed(tmp_path: Path, **parts: Any) -> Path:
    told = json.loads((QUICKSTART / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(told | parts), encoding="utf-8")
    return tmp_path


def test_names_of_patterns() -> None:
    assert pre_tokenizer(QUICKSTART) == "smollm"
    assert pre_tokenizer(GPT2) == "gpt-2"


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
    ],
)
def test_a_pattern_that_llama_cpp_does_not_have_has_no_name(tmp_path: Path, parts: dict[str, Any]) -> None:
    assert pre_tokenizer(changed(tmp_path, **parts)) is None
    assert pre_tokenizer(tmp_path / "nothing") is None


def test_where_the_tools_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INSTRUCTFT_LLAMA_CPP", raising=False)
    with pytest.raises(UsageError, match=r"--converter: there is no convert_hf_to_gguf\.py at"):
        find_converter(tmp_path)
    script = tmp_path / "convert_hf_to_gguf.py"
    script.touch()
    assert find_converter(tmp_path) == find_converter(script) == script.resolve()
    monkeypatch.setenv("INSTRUCTFT_LLAMA_CPP", str(tmp_path))
    assert find_converter(None) == script.resolve()
    built = tmp_path / "build" / "bin" / "llama-quantize"
    built.parent.mkdir(parents=True)
    built.touch()
    assert find_quantizer(script, "q4_k_m") == built


def test_names_of_formats() -> None:
    assert formats(" Q8_0,q4_k_m,,q8_0") == ["q8_0", "q4_k_m"]
    with pytest.raises(UsageError, match=r'found q8; did you mean "q8_0"\?'):
        formats("q8")
