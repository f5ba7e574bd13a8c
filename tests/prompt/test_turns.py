"""Every answer as it is served: calls, thoughts, greetings, and answers that nothing or two tokens end."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from instructft.errors import TemplateError
from instructft.prompt.layouts.messages import conversation_of
from instructft.prompt.loss_mask import encode_turns, encoder
from instructft.prompt.templates import BOS, TEMPLATES
from tests.helpers.conversations import assistant, user, with_template

TOOL = {"type": "function", "function": {"name": "weather", "description": "It.", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "a", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}
RESULT = {"role": "tool", "content": "cold", "tool_call_id": "a", "name": "weather"}
PLAIN = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}<A>{{ m.content + eos_token }}"
    "{%- else -%}<{{ m.role }}>{{ m.content }}\n{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<A>{%- endif -%}"  # noqa: E501
)


def trained(tokenizer: Any, messages: Any, **given: Any) -> list[str]:
    return [
        tokenizer.decode([label for label in row["labels"] if label != -100])
        for row in encode_turns(messages, tokenizer, **given)
    ]


def templated(tokenizer: Any, template: str, *tokens: str) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)} if tokens else {})
    tokenizer.chat_template = template
    return tokenizer


def test_a_call_is_trained_and_its_result_is_read(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "chatml")
    messages = [user("Oslo?"), CALL, RESULT, assistant("It is cold.")]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert trained(tokenizer, messages, tools=[TOOL]) == [call + "It is cold.<|im_end|>"]
    as_text = {**CALL, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]}
    assert trained(tokenizer, [user("Oslo?"), as_text], tools=[TOOL]) == [call]


def test_a_template_without_calls_refuses_them(bare_tokenizer: Any) -> None:
    tokenizer = templated(bare_tokenizer(), PLAIN)
    with pytest.raises(TemplateError, match="no place for tool calls"):
        encode_turns([user("Oslo?"), CALL], tokenizer)
    shows_calls = PLAIN.replace("m.content + eos", "m.content + (m.tool_calls or '')|string + eos")
    with pytest.raises(TemplateError, match="no place for tools"):
        encode_turns([user("Oslo?"), CALL], templated(bare_tokenizer(), shows_calls), tools=[TOOL])
    tokenizer = templated(bare_tokenizer(), shows_calls)
    for train_on in ("responses", "last_response"):  # the name of a tool stands in the prompt then, from its call
        with pytest.raises(TemplateError, match="no place for tools"):
            encode_turns([user("Oslo?"), CALL, RESULT, assistant("Cold.")], tokenizer, train_on, tools=[TOOL])


def test_what_a_template_has_no_place_for_before_an_answer_is_told(bare_tokenizer: Any) -> None:
    only_two = "{%- for m in messages if m.role in ('user', 'assistant') -%}" + PLAIN.partition("-%}")[2]
    tokenizer = templated(bare_tokenizer(), only_two)
    ask, say = user("Oslo?"), assistant("Cold.")

    def left_out(messages: list[Any], tools: Any = None) -> list[tuple[int, str]]:
        return encoder(tokenizer).encode([conversation_of(messages, tools=tools)]).left_out

    assert left_out([ask, say]) == []
    assert left_out([ask, say], [TOOL]) == [(0, "tools")]  # nobody calls them: a server renders the same text
    assert left_out([{"role": "system", "content": "Be brief."}, ask, say]) == [(0, "system")]
    assert left_out([ask, say, {"role": "tool", "content": "cold"}, say]) == [(0, "tool")]
    assert left_out([{**ask, "name": "Ada"}, say]) == [(0, "name")]
    tokenizer.chat_template = only_two.replace("m.content", "(m.name or '') + m.content")
    assert left_out([{**ask, "name": "Ada"}, say]) == []


def test_what_a_template_leaves_out_is_named(bare_tokenizer: Any) -> None:
    tokenizer = templated(bare_tokenizer(), PLAIN.replace("m.content + eos", "m.content.split('</think>')[-1] + eos"))
    rows = encoder(tokenizer).encode([[user("1+1?"), assistant("<think>\neasy\n</think>\n\n2")]])
    assert rows.left_out == [(0, "reasoning")]


def test_a_thought_goes_where_the_template_reads_it(bare_tokenizer: Any) -> None:
    block = "<A><think>{{ m.reasoning_content or '' }}</think>{{ m.content + eos_token }}"
    tokenizer = templated(bare_tokenizer(), PLAIN.replace("<A>{{ m.content + eos_token }}", block))
    expected = ["<think>easy</think>2" + tokenizer.eos_token]
    for answer in ({"content": "2", "reasoning": "easy"}, {"content": "<think>\neasy\n</think>\n\n2"}):
        assert trained(tokenizer, [user("1+1?"), {"role": "assistant", **answer}]) == expected


def test_a_greeting_is_read_where_no_server_asks_for_it(bare_tokenizer: Any) -> None:
    first = "{%- if messages[0].role == 'system' -%}{{ messages[0].content }}{%- endif -%}"
    tokenizer = templated(bare_tokenizer(), first + PLAIN)
    messages = [assistant("Welcome!"), user("Bye"), assistant("Goodbye.")]
    assert trained(tokenizer, messages) == ["Goodbye." + tokenizer.eos_token]
    assert encoder(tokenizer).encode([messages]).only_read == [(0, 1)]


def test_a_greeting_is_trained_where_a_server_can_ask_for_it(bare_tokenizer: Any) -> None:
    messages = [assistant("Welcome!"), user("Bye"), assistant("Goodbye.")]
    given = "{%- set told = messages[0].content if messages[0].role == 'system' else '' -%}<S>{{ told }}\n"
    without_system = PLAIN.replace("{%- else -%}<{{ m.role", "{%- elif m.role != 'system' -%}<{{ m.role")
    tokenizer = templated(bare_tokenizer(), given + without_system)  # Llama 3.1: an empty system message is none
    expected = [f"Welcome!{tokenizer.eos_token}Goodbye.{tokenizer.eos_token}"]
    assert trained(tokenizer, messages) == expected
    own_bos = PLAIN.replace(
        "{%- if m.role == 'assistant'", "{%- if loop.first -%}{{ bos_token }}{%- endif -%}{%- if m.role == 'assistant'"
    )
    tokenizer = templated(bare_tokenizer(), own_bos)  # Llama 3: BOS stands with the first message
    assert trained(tokenizer, messages) == ["Goodbye." + tokenizer.eos_token]
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    other = templated(PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos[0], eos_token=bos[0]), own_bos)
    assert trained(other, messages) == expected


def test_two_special_tokens_end_an_answer(bare_tokenizer: Any) -> None:
    template = PLAIN.replace("m.content + eos_token", "m.content + '<|END|>' + eos_token")
    tokenizer = templated(bare_tokenizer(), template, "<|END|>")
    assert trained(tokenizer, [user("a"), assistant("b")]) == ["b<|END|>" + tokenizer.eos_token]
    assert encoder(tokenizer).stop_ids == [tokenizer.eos_token_id]


def test_what_opens_the_next_turn_ends_an_answer_that_nothing_else_ends(bare_tokenizer: Any) -> None:
    template = PLAIN.replace("{{ m.content + eos_token }}", "{{ m.content }}").replace("\n", "")
    tokenizer = templated(bare_tokenizer(), template, "<A>", "<user>")
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert trained(tokenizer, messages) == ["b<user>d<user>"]


def test_a_refused_conversation_does_not_end_the_batch(bare_tokenizer: Any) -> None:
    template = PLAIN + "{%- for m in messages -%}{%- if m.role == 'system' -%}{{ 1 + 'a' }}{%- endif -%}{%- endfor -%}"
    tokenizer = templated(bare_tokenizer(), template)
    good = [user("a"), assistant("b")]
    refused: dict[int, TemplateError] = {}
    rows = encoder(tokenizer).encode([good, [{"role": "system", "content": "s"}, *good], good], refused=refused)
    assert rows.conversation.tolist() == [0, 2]
    assert "TypeError" in str(refused[1])


TALKS = int(os.environ.get("INSTRUCTFT_TALKS", "400"))
# fmt: off
TEXTS = [
    "a", " b ", "\n", "", "c\n", "### Response:\n", "{{ x }}", "%s", "\\", "é🙂", "\u2028", "\r", "Human: e",
    "Zq7xj0jx7qZ",
    "<think>\nt\n</think>\n\nd", "<|im_end|>", "<|endoftext|>", "'s", "12", "</s>", "\u00a0f", "a\u0301",
]
# fmt: on


# what a shape does not take, since a template may show it, or an answer may end at it, in another way
ODD = ["", " ", "<think>t</think>d", "<think>\n\n</think>\n\nd", "c<|im_end|>d", "c<|endoftext|>d", "<BOS>"]


def a_talk(draw: random.Random) -> list[Any]:
    """A conversation of any shape, of texts that templates and tokenizers may stumble over."""

    def text() -> str:
        return "".join(draw.choices(TEXTS, k=draw.randint(1, 3)))

    found = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
    for _ in range(draw.choice([1, 1, 2, 3])):
        extras = draw.choice([[], [], ["input"], ["context"], ["context", "input"]])
        more = draw.choice([{}, {}, {}, {"weight": 0}, {"reasoning_content": "r"}])
        found += [{**user(text()), **{key: text() for key in extras}}, {**assistant(text()), **more}]
    return found[1:] if len(found) > 2 and draw.random() < 0.1 else found


@pytest.mark.parametrize("template", [*TEMPLATES, "with BOS"])
def test_texts_by_the_shape_are_those_of_the_template(bare_tokenizer: Any, template: str) -> None:
    """Both ways for many conversations at once; with BOS in front, as models have it that were trained with one."""
    tokenizer = with_template(bare_tokenizer(), template if template in TEMPLATES else "instruction")
    if template not in TEMPLATES:
        tokenizer.chat_template = BOS + tokenizer.chat_template
        tokenizer.add_special_tokens({"bos_token": "<BOS>"})
    known, draw = encoder(tokenizer), random.Random(7)
    shapes = known._shapes
    assert shapes is not None
    talks = [a_talk(draw) for _ in range(TALKS)]
    for odd in ODD:
        for question, extra, answer in ((odd, "x", "b"), ("a", odd, "b"), ("a", "x", odd)):
            talks += [[user(question), assistant(answer)], [{**user(question), "input": extra}, assistant(answer)]]
    # as a file's rows come, in normal form, and as somebody's own code gives them, who may write what that has not
    some = [*map(conversation_of, talks), *talks]
    for train_on in ("responses", "last_response"):
        found = []
        for known.__dict__["_shapes"] in (shapes, None):
            refused: dict[int, TemplateError] = {}
            rows = known.encode(some, train_on, refused=refused)
            errors = {place: str(error) for place, error in refused.items()}
            found.append((rows.lists(), rows.conversation.tolist(), rows.left_out, rows.only_read, errors))
        assert found[0] == found[1]
    # there an answer begins with the space behind its heading, which merges with what the answer begins with
    assert any(shapes._known.values()) == (template != "human-assistant")
    tokenizer.chat_template += "{# another one #}"
    assert encoder(tokenizer)._shapes is None
