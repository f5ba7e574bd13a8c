"""How a tokenizer cuts text, by llama.cpp's names; and where its tools are looked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instructft.data.sources import QUICKSTART
from instructft.errors import ModelError, UsageError
from instructft.extras.serving import llama_cpp
from instructft.extras.serving.llama_cpp import find_converter, find_quantizer, formats, pre_tokenizer, quantize
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


@pytest.mark.parametrize(
    ("known", "told"), [("smollm", "gpt-2"), ("gpt-2", "gpt-2"), ("command-r", "command-r"), (None, "gpt-2")]
)
def test_the_converter_is_told_the_pattern_in_place_of_another_one(
    known: str | None, told: str, tmp_path: Path
) -> None:
    """Its checksum is of one text: SmolLM without its splitting of digits cuts that text alike, and other texts not."""
    (tmp_path / "conversion").mkdir()
    knows = f"return {known!r}" if known else "raise NotImplementedError"
    (tmp_path / "conversion" / "base.py").write_text(
        f"class TextModel:\n    def get_vocab_base_pre(self, tokenizer): {knows}\n", encoding="utf-8"
    )
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "from conversion.base import TextModel\nprint(TextModel().get_vocab_base_pre(None))\n", encoding="utf-8"
    )
    command = [sys.executable, str(llama_cpp.TOOLS), "convert", str(script), "gpt-2"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == told


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


def shared(path: Path, source: str) -> Path:
    """A shared library of C source."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".c").write_text(source, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(path.with_suffix(".c"))], check=True)
    return path


# the two functions as llama.h declares them, which write down what they are asked for
LIBLLAMA = """
#include <stdio.h>
struct params { int nthread; int ftype; int output; int embedding; char flags[6]; void *rest[4]; };
void llama_backend_init(void) {}
struct params llama_model_quantize_default_params(void) { struct params p = {7, 9, 43, 43}; return p; }
unsigned llama_model_quantize(const char *source, const char *output, const struct params *p) {
    FILE *file = fopen(output, "w");
    if (!file || p->output != 43) return 1;
    fprintf(file, "%s %d %d", source, p->nthread, p->ftype);
    return fclose(file);
}
"""


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is built for this system by cc")
def test_llama_cpps_library_quantizes_where_its_program_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFT_LLAMA_CPP", str(tmp_path / "llama.cpp"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "LIBRARY_PACKAGES", ())
    script = tmp_path / "convert_hf_to_gguf.py"
    with pytest.raises(
        UsageError, match=r"(?s)--quantize q4_k_m needs .*none that runs was found.*pip install llama-cpp-py-"
    ):
        find_quantizer(script, "q4_k_m")
    monkeypatch.undo()
    monkeypatch.setenv("INSTRUCTFT_LLAMA_CPP", str(tmp_path / "llama.cpp"))
    library = shared(tmp_path / "llama.cpp" / "build" / "bin" / "libllama.so", LIBLLAMA)
    assert find_quantizer(script, "q4_k_m") == library
    quantize(library, tmp_path / "ä.gguf", tmp_path / "out.gguf", "q4_k_m")
    assert (tmp_path / "out.gguf").read_text() == f"{tmp_path}/ä.gguf 7 15"
    with pytest.raises(ModelError, match=r"llama\.cpp's library failed \(exit code 1\)"):
        quantize(library, tmp_path / "in.gguf", tmp_path / "no" / "out.gguf", "q4_k_m")
    shared(library, "int something_else;")
    with pytest.raises(UsageError, match=r"libllama\.so does not load: failed .*llama_model_quantize"):
        find_quantizer(script, "q4_k_m")
