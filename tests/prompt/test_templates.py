"""The built-in templates, letter by letter."""

from __future__ import annotations

from typing import Any

import pytest

import instructft
from instructft.errors import RecipeError, TemplateError
from instructft.prompt.loss_mask import render
from instructft.prompt.templates import with_adds
from tests.helpers.conversations import assistant, user, with_template


def test_exact_strings(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "instruction")
    eos = tokenizer.eos_token
    one = [user("Say hi."), assistant("Hi.")]
    assert render(one, tokenizer) == f"### Instruction:\nSay hi.\n\n### Response:\nHi.{eos}"
    dolly = [user("Who?", context="Ada wrote it."), assistant("Ada.")]
    assert render(dolly, tokenizer) == (
        f"### Instruction:\nWho?\n\n### Context:\nAda wrote it.\n\n### Response:\nAda.{eos}"
    )
    alpaca = [user("Add.", input="1 2"), assistant("3")]
    assert render(alpaca, tokenizer) == f"### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3{eos}"


_PLAIN = "{%- for m in messages -%}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{%- endfor -%}"
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
_RESULT = {"role": "tool", "content": "4"}


def test_tools_where_a_template_has_no_place_for_them(bare_tokenizer: Any) -> None:
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = with_adds(_PLAIN, ["tools"])
    eos = tokenizer.eos_token
    called = {"role": "assistant", "content": "I look.", "tool_calls": [_CALL, _CALL], "reasoning_content": "hm"}

    def shown(*messages: Any, tools: Any = None) -> list[str]:
        text = tokenizer.apply_chat_template([list(messages)], tools=tools, tokenize=False)[0]
        return [turn.lstrip("\n") for turn in text.split(eos)[:-1]]

    plain = [{"role": "system", "content": "S"}, user("Q"), assistant("A")]
    assert shown(*plain) == ["<system>S", "<user>Q", "<assistant>A"]
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    first, *rest = shown(user("Q"), called, _RESULT, _RESULT, user("More"), assistant("A"), tools=[_TOOL])
    assert first.startswith("<system># Tools\n\n")
    assert '\n{"type": "function", "function": {"name": "f", "parameters": {}}}\n</tools>' in first
    answers = "<tool_response>\n4\n</tool_response>\n<tool_response>\n4\n</tool_response>"
    assert rest == [
        "<user>Q",
        f"<assistant>I look.\n{call}\n{call}",
        f"<user>{answers}\n\nMore",
        "<assistant>A",
    ]
    first, *rest = shown(*plain[:2], called, _RESULT, tools=[_TOOL])
    assert first.startswith("<system>S\n\n# Tools")
    assert rest[-1] == "<user><tool_response>\n4\n</tool_response>"


def test_a_recipe_gives_a_template_what_it_lacks(write_recipe: Any, tmp_path: Any) -> None:
    """The tokenizer has it from then on, as it is saved: whoever renders with it renders the same."""
    file = tmp_path / "own.jinja"
    file.write_text(
        "{%- for m in messages -%}{%- if m.role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
        "<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{%- if m.role == 'assistant' -%}{{ eos_token }}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<assistant><think>\n{% endif %}\n"
    )
    asked = [f"data.template={file}", "data.template_options={enable_thinking: false}"]
    rows = [{"role": "system", "content": "S"}, user("Q"), assistant("A")]
    with pytest.raises(TemplateError, match=r"enable_thinking: the chat template .* does not read it"):
        instructft.load_tokenizer(instructft.load_recipe(write_recipe(), asked))
    bare = instructft.load_tokenizer(instructft.load_recipe(write_recipe(), asked[:1]))
    with pytest.raises(TemplateError, match=r"no system; data\.template_adds: \[system\] puts it before the first"):
        instructft.encode_conversation(rows, bare)
    with pytest.raises(TemplateError, match=r"data\.template_adds: \[thinking\]"):
        instructft.encode_conversation(rows[1:], bare)
    adds = [*asked, "data.template_adds=[system, thinking]"]
    tokenizer = instructft.load_tokenizer(instructft.load_recipe(write_recipe(), adds))
    found = instructft.encode_conversation(rows, tokenizer)
    prompt = tokenizer.apply_chat_template(rows[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<user>S\n\nQ<assistant><think>\n\n</think>\n\n"
    carries = [token for token in found["labels"] if token != -100]
    assert tokenizer.decode(carries) == f"A{tokenizer.eos_token}"
    assert found["input_ids"] == [*tokenizer(prompt)["input_ids"], *carries]
    with pytest.raises(RecipeError, match=r"data\.template_adds.*tool"):
        instructft.load_recipe(write_recipe(), [*asked, "data.template_adds=[tool]"])
