"""A held-out row is asked with the prompt that a server would render, and its reference is what would be decoded."""

from __future__ import annotations

from typing import Any

from instructft.inference.generator import Generator
from instructft.prompt.conversation import Conversation
from instructft.prompt.templates import TEMPLATES
from instructft.training.judging.questions import BEYOND, LEAST, MOST, questions


def row(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)], **more}


def test_the_prompt_is_the_server_s(tiny_model: Any, tokenizer: Any) -> None:
    generator = Generator(tiny_model, tokenizer)
    rows = [row("Hello", " Hi there. "), row("One", "Two", "Three", "Four", category="count")]
    found = questions(generator, rows)
    assert [q.prompt for q in found] == generator.encoder.prompts([r["messages"][:-1] for r in rows])
    assert [q.reference for q in found] == ["Hi there.", "Four"]
    assert [q.row for q in found] == rows
    assert found[0].limit == LEAST


def test_an_answer_has_room_for_its_reference(tiny_model: Any, tokenizer: Any) -> None:
    generator = Generator(tiny_model, tokenizer)
    generator.context = 4096
    count = {n: len(tokenizer("word " * n, add_special_tokens=False)["input_ids"]) for n in (30, 100, 300)}
    limits = [q.limit for q in questions(generator, [row("Hi", "word " * n) for n in count])]
    assert limits[0] > count[30]
    assert limits[1] in range(count[100] + 1, max(MOST, count[100] + BEYOND + 2) + 1)
    assert limits[2] >= count[300] + BEYOND
    generator.context = 40
    assert [q.reference for q in questions(generator, [row("Hi", "word " * 300), row("Hi", "word")])] == ["word"]


def test_calls_are_those_of_the_row(tiny_model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["chatml"].text()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = Conversation(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}], [tool]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    generator = Generator(tiny_model, tokenizer)
    generator.context = 4096
    (question,) = questions(generator, [{"messages": messages}])
    assert question.calls == (("f", {"a": 1}),)
    assert '"name": "f"' in question.reference


def test_what_the_template_refuses_is_no_question(tiny_model: Any, tokenizer: Any) -> None:
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]
    refused = row("Hi", "")
    refused["messages"][1]["tool_calls"] = calls
    assert len(questions(Generator(tiny_model, tokenizer), [refused, row("Hi", "Hello")])) == 1
