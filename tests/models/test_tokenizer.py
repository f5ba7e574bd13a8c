"""Tokenizer, template and model agree: special tokens, embedding rows, where generation stops."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from instructft import load_model, load_recipe, load_tokenizer
from instructft.errors import TemplateError, UsageError
from instructft.models.starting_point import starting_point
from instructft.models.tokenizer import date_in_prompts, said_of_date
from instructft.prompt.loss_mask import encode_conversation, encode_prompt, render

ONE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture
def base(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> Path:
    """A pretrained model's folder: a GPT-2 with a tokenizer that has no chat template."""
    folder = tmp_path / "base"
    tokenizer.chat_template = None
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(write_recipe: Callable[..., Path], base: Path, *overrides: str) -> Any:
    text = f"model: {{name_or_path: {base}}}\ndata: {{datasets: quickstart, max_length: 64}}\n"
    return load_recipe(write_recipe(text), overrides)


def test_chatml_adds_its_tokens_once_and_starts_them_at_the_mean(write_recipe: Any, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    asked = recipe(write_recipe, base, "data.template=chatml")
    tokenizer = load_tokenizer(asked)
    old = AutoModelForCausalLM.from_pretrained(base)
    n = old.get_input_embeddings().weight.shape[0]
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [n, n + 1]
    model = load_model(asked, tokenizer)
    assert model.config.vocab_size == len(tokenizer) == n + 2
    new = model.get_input_embeddings().weight
    torch.testing.assert_close(new[:n], old.get_input_embeddings().weight, rtol=0, atol=0)
    torch.testing.assert_close(new[n:], old.get_input_embeddings().weight.mean(0, keepdim=True).expand(2, -1))
    assert model.get_output_embeddings().weight is new  # tied stays tied
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_what_is_saved_renders_the_same_prompt(write_recipe: Any, base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("instruction", "alpaca", "human-assistant", "chatml"):
        tokenizer = load_tokenizer(recipe(write_recipe, base, f"data.template={name}"))
        tokenizer.save_pretrained(tmp_path / name)
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert again.chat_template == tokenizer.chat_template
        served = again.apply_chat_template(ONE[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert served == encode_prompt(ONE[:1], tokenizer)
        assert encode_conversation(ONE, again) == encode_conversation(ONE, tokenizer)


def test_the_system_prompt_is_part_of_the_template(write_recipe: Any, base: Path) -> None:
    text = 'Say "yes", {{ not }} {% if %} ü\n'
    asked = load_recipe(
        write_recipe(f"model: {{name_or_path: {base}}}\ndata: {{datasets: quickstart, max_length: 64}}\n")
    )
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"system_prompt": text})})
    tokenizer = load_tokenizer(asked)
    assert render(ONE, tokenizer).startswith(f"{text}\n\n### Instruction:\nHi")
    own = [{"role": "system", "content": "Other."}, *ONE]
    assert render(own, tokenizer).startswith("Other.\n\n### Instruction:\nHi")


def test_a_bos_that_the_tokenizer_adds_stands_in_the_template(write_recipe: Any, base: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    tokenizer.save_pretrained(base)
    loaded = load_tokenizer(recipe(write_recipe, base))
    assert loaded("a")["input_ids"][0] == bos  # else this test shows nothing
    ids = encode_conversation(ONE, loaded)["input_ids"]
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_a_missing_pad_token_comes_from_the_vocabulary(write_recipe: Any, base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    size = len(tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    loaded = load_tokenizer(recipe(write_recipe, base))
    assert loaded.pad_token_id is not None
    assert len(loaded) == size


def test_auto_takes_the_models_own_template(write_recipe: Any, base: Path) -> None:
    from transformers import AutoTokenizer

    own = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}<assistant>"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = own.replace("<assistant>", "{% if add_generation_prompt %}<assistant>{% endif %}")
    tokenizer.save_pretrained(base)
    assert render(ONE[:1], load_tokenizer(recipe(write_recipe, base))) == f"<user>Hi{tokenizer.eos_token}"
    assert "### Instruction" in load_tokenizer(recipe(write_recipe, base, "data.template=instruction")).chat_template


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["data.template=tokenizer"], TemplateError, "no chat template of its own"),
        (["data.max_length=4096"], UsageError, r"data\.max_length: 4096 tokens .* 128 positions"),
    ],
)
def test_refusals(write_recipe: Any, base: Path, overrides: list[str], error: type, says: str) -> None:
    asked = recipe(write_recipe, base, *overrides)
    with pytest.raises(error, match=says):
        starting_point(asked, load_tokenizer(asked))


def test_a_folder_without_a_model_lists_what_it_holds(write_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    asked = recipe(write_recipe, tmp_path / "empty")
    with pytest.raises(UsageError, match=r"model\.name_or_path: .*holds notes\.txt"):
        load_tokenizer(asked)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{% for m in messages %}\n{{ m.content }", r"bad\.jinja, line 2: not a Jinja template"),
        (b"{{ \xff }}", r"bad\.jinja is not UTF-8"),
    ],
)
def test_a_template_file_that_is_none(write_recipe: Any, base: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "bad.jinja").write_bytes(content)
    with pytest.raises(TemplateError, match=says):
        load_tokenizer(recipe(write_recipe, base, f"data.template={tmp_path / 'bad.jinja'}"))


def test_a_template_file_with_generation_markers(write_recipe: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = load_tokenizer(recipe(write_recipe, base, f"data.template={tmp_path / 'own.jinja'}"))
    assert render(ONE[:1], tokenizer, add_generation_prompt=True).endswith("<assistant>")


def test_a_date_in_a_template_is_that_of_the_recipe_on_every_day(write_recipe: Any, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "date.jinja"
    file.write_text(
        "{{- 'Today: ' + strftime_now('%d %b %Y') -}}{%- for m in messages -%}{{- m.content + eos_token -}}{%- endfor -%}"  # noqa: E501
    )
    tokenizer = load_tokenizer(recipe(write_recipe, base, f"data.template={file}"))
    assert render(ONE[:1], tokenizer) == f"Today: 26 Jul 2024Hi{tokenizer.eos_token}"
    other = load_tokenizer(recipe(write_recipe, base, f"data.template={file}", "data.template_date=2026-01-02"))
    assert render(ONE[:1], other).startswith("Today: 02 Jan 2026")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{%- set form = '%d %B %Y' -%}{{- strftime_now(form) -}}", "26 July 2024"),
        ("{{- strftime_now('%Y' + '-%m') -}}{{- strftime_now('%d') -}}", "2024-0726"),
        ("{{- strftime_now( format = '%-d.' ~ '%-m' ) -}} {{- strftime_now('%A') -}}", "26.7Friday"),
    ],
)
def test_a_date_in_a_form_that_the_template_makes_up(
    write_recipe: Any, base: Path, tmp_path: Path, template: str, said: str
) -> None:
    file = tmp_path / "date.jinja"
    file.write_text(template + "{%- for m in messages -%}{{- m.content + eos_token -}}{%- endfor -%}")
    tokenizer = load_tokenizer(recipe(write_recipe, base, f"data.template={file}"))
    assert render(ONE[:1], tokenizer) == f"{said}Hi{tokenizer.eos_token}"


def test_a_date_that_is_pinned_is_said_and_may_be_pinned_anew(write_recipe: Any, base: Path, tmp_path: Path) -> None:
    """Also in a template that a run has saved, whose day must not outlive the recipe's."""
    file = tmp_path / "date.jinja"
    file.write_text("{{- strftime_now('%Y') -}}{%- for m in messages -%}{{- m.content + eos_token -}}{%- endfor -%}")
    asked = recipe(write_recipe, base, f"data.template={file}")
    saved = load_tokenizer(asked)
    assert date_in_prompts(asked, saved) == "2024-07-26"
    file.write_text(saved.chat_template)
    later = recipe(write_recipe, base, f"data.template={file}", "data.template_date=2026-01-02")
    assert render(ONE[:1], load_tokenizer(later)).startswith("2026Hi")
    assert date_in_prompts(later, load_tokenizer(later)) == "2026-01-02"
    assert later.data.template_date in said_of_date("2026-01-02")
    plain = recipe(write_recipe, base, "data.template=chatml")
    assert date_in_prompts(plain, load_tokenizer(plain)) is None


def test_a_vocabulary_that_only_sentencepiece_reads(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream falls back to another reader, and its error says that a line cannot be parsed."""
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # where `make real` has installed it
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    wanted = "its tokenizer.model is SentencePiece's, which is not installed here: pip install sentencepiece"
    with pytest.raises(UsageError, match=rf"model.name_or_path: .*llama .*{wanted}"):
        load_tokenizer(recipe(write_recipe, folder))


def test_template_options_are_saved_with_the_template(write_recipe: Any, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "thinks.jinja"
    file.write_text(
        "{%- for m in messages -%}{{- m.content + eos_token -}}{%- endfor -%}"
        "{%- if enable_thinking is not defined or enable_thinking -%}THINK{%- endif -%}"
    )
    asked = recipe(write_recipe, base, f"data.template={file}", "data.template_options={enable_thinking: false}")
    tokenizer = load_tokenizer(asked)
    assert render(ONE[:1], tokenizer) == f"Hi{tokenizer.eos_token}"
    given = tokenizer.apply_chat_template(ONE[:1], tokenize=False, enable_thinking=True)
    assert given.endswith("THINK")  # a caller's own value wins


def test_a_tokenizer_that_takes_special_tokens_apart_is_refused(write_recipe: Any, base: Path) -> None:
    """Prompts would have had `<|endoftext|>` in letters, the rows of many at once as one token."""
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": True}))
    with pytest.raises(UsageError, match="split_special_tokens"):
        load_tokenizer(recipe(write_recipe, base))
