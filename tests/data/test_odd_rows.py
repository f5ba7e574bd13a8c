"""Odd rows of every kind that was once trained wrongly or refused without need, several of each, with what is right.

Each is shown as `instructft inspect` shows it: what carries loss is between ⟦ and ⟧.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.data.load import Part, load_parts, rules_of, shape
from instructft.data.tokenize import UNREAD, Batches
from instructft.errors import DataError
from tests.helpers.layouts import OSLO, ROME, THOUGHT, TOOL, WEATHER, Turn, chat, said, written
from tests.helpers.rows import prepared

Row = dict[str, Any]
Say = Callable[..., str]

_ANSWER = "{%- if m.role == 'assistant' -%}"
_ASKED = "{%- else -%}{{ '<' + m.role + '>' + m.content + '\\n' }}{%- endif -%}{%- endfor -%}"
_ASKS = "{%- if add_generation_prompt -%}{{ '<A>' }}{%- endif -%}"
_EACH = "{%- for m in messages -%}" + _ANSWER
TEMPLATES = {
    "drops thoughts": f"{_EACH}{{{{ '<A>' + m.content.split('</think>')[-1] + eos_token }}}}{_ASKED}{_ASKS}",
    "thinks": f"{_EACH}{{{{ '<A><think>' + (m.reasoning_content or '') + '</think>' + m.content + eos_token }}}}"
    + _ASKED
    + _ASKS,
    "looks at the first": "{%- if messages[0].role == 'system' -%}{{ '<system>' + messages[0].content }}{%- endif -%}"
    + f"{_EACH}{{{{ '<A>' + m.content + eos_token }}}}"
    + _ASKED.replace("else", "elif m.role == 'user'")
    + _ASKS,
    "opens a thought": f"{_EACH}{{{{ '<A>' + m.content + eos_token }}}}{_ASKED}"
    + _ASKS.replace("<A>", "<A><think>\\n"),
    "opens a thought if asked": f"{_EACH}{{{{ '<A>' + m.content + eos_token }}}}{_ASKED}"
    + "{%- if add_generation_prompt -%}{{ '<A>' + ('' if enable_thinking is false else '<think>\\n') }}{%- endif -%}",
}


@pytest.fixture(scope="module")
def say(tmp_path_factory: pytest.TempPathFactory) -> Say:
    """What becomes of a row: its text with its mask, or why it is not trained."""
    folder = tmp_path_factory.mktemp("odd")
    recipe = folder / "odd.yaml"
    recipe.write_text(
        "model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16}, tokenizer: quickstart}\n"
        "data: {datasets: [{name: quickstart}], template: chatml, max_length: 4096}\n",
        encoding="utf-8",
    )
    tokenizers: dict[tuple[str, ...], Any] = {}
    for name, text in TEMPLATES.items():
        (folder / f"{name}.jinja").write_text(text, encoding="utf-8")

    def say(row: Row, template: str = "chatml", **data: Any) -> str:
        name = str(folder / f"{template}.jinja") if template in TEMPLATES else template
        asked = [f"data.template={name}", *(f"data.{key}={json.dumps(value)}" for key, value in data.items())]
        loaded = instructft.load_recipe(recipe, asked)
        tokenizer = tokenizers.setdefault(tuple(asked), None) or instructft.load_tokenizer(loaded)
        tokenizers[tuple(asked)] = tokenizer
        fmt, columns = shape((None, {}), list(row), "row", "data.datasets[0]")
        part = Part("row", None, fmt, columns, {}, "data.datasets[0]", rules=rules_of(loaded, columns))
        ids, labels, sizes, _, _, (verdict,), (note,) = Batches(part, loaded.data, tokenizer).encode([row], [0])
        if verdict:
            return f"{verdict}: " + (
                "; ".join(f"{w}: {why}" for w, _, why in json.loads(note)) if note[:1] == "[" else note
            )
        shown, start = [], 0
        for size in sizes.tolist():
            shown.append(marked(tokenizer, ids[start : start + size], labels[start : start + size]))
            start += size
        return "\n---\n".join(shown) + (f"\nnote: {note}" if note else "")

    return say


def marked(tokenizer: Any, ids: Any, labels: Any) -> str:
    """A row's text with ⟦ and ⟧ around what carries loss."""
    pieces = []
    for loss, run in groupby(zip(ids.tolist(), (labels != -100).tolist(), strict=True), key=itemgetter(1)):
        text = tokenizer.decode([token for token, _ in run])
        pieces.append(f"⟦{text}⟧" if loss else text)
    return "".join(pieces)


def hand(*turns: Turn, tools: tuple[Row, ...] = ()) -> str:
    """The same of turns as one writes them in ChatML by hand."""
    return "".join(f"⟦{text}⟧" if loss else text for text, loss in written(list(turns), tools))


ASK, COLD, HOW = ("user", "Weather in Oslo?"), ("assistant", "Cold."), ("user", "How cold?")
FUNCTION = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
CALL = {"id": "call_1", "type": "function", "function": FUNCTION}
TOOLS = {"tools": [TOOL]}
DONE = hand(ASK, ("assistant", OSLO), ("tool", "4"), COLD, tools=(TOOL,))
CALLED = hand(ASK, ("assistant", OSLO), tools=(TOOL,))
PAIR = hand(ASK, COLD)


def answers(*messages: Row, **columns: Any) -> Row:
    return {"messages": [*chat(ASK), *messages], **columns}


def bot(content: Any, **keys: Any) -> Row:
    return {"role": "assistant", "content": content, **keys}


def spelled(answer: str, **keys: Any) -> Row:
    """Parts written out as text, as a CSV file has them."""
    return {
        "messages": [{"role": "user", "content": json.dumps([{"type": "text", "text": ASK[1]}])}, bot(answer, **keys)]
    }


FORM = '[{"type": "text", "label": "Your name"}]'  # fields of a form
# Answers in JSON, which a model is taught to write.
JSON_ANSWERS = (FORM, '[{"kind": "text"}]', '[{"type": "text", "text": "Cold."}]')

RESULT = {"role": "tool", "content": "4"}
BAD = bot("BAD")
BAD_READ = hand(ASK, ("read", "BAD"), HOW, COLD)
THEN = [*chat(HOW), bot("Cold.")]

ROLES = "expected system, developer, user, assistant, tool, and names like human, gpt, observation"

# kind -> rows of it, each with what is right; the first rows are those that once came out wrong, the others their kin
ROWS: dict[str, list[tuple[Row, str]]] = {
    "an answer and a call": [
        (
            answers(bot("I look.", tool_calls=[CALL]), **TOOLS),
            hand(ASK, ("assistant", f"I look.\n{OSLO}"), tools=(TOOL,)),
        ),
        (
            answers(
                bot("I look.", tool_calls=[{"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}]),
                **TOOLS,
            ),
            hand(ASK, ("assistant", f"I look.\n{OSLO}"), tools=(TOOL,)),
        ),
        (
            answers(
                bot(
                    "Both.",
                    tool_calls=json.dumps([CALL, {**CALL, "function": {**FUNCTION, "arguments": '{"city": "Rome"}'}}]),
                ),
                **TOOLS,
            ),
            hand(ASK, ("assistant", f"Both.\n{OSLO}\n{ROME}"), tools=(TOOL,)),
        ),
        (
            answers(
                bot(
                    [
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Oslo"}},
                    ]
                ),
                **TOOLS,
            ),
            hand(ASK, ("assistant", f"I look.\n{OSLO}"), tools=(TOOL,)),
        ),
    ],
    "tools that nobody calls": [
        (answers(bot("Cold."), **TOOLS), hand(ASK, COLD, tools=(TOOL,))),
        (answers(bot("Cold."), tools=json.dumps([WEATHER])), hand(ASK, COLD, tools=(TOOL,))),
        (answers(bot("Cold."), functions=[WEATHER]), hand(ASK, COLD, tools=(TOOL,))),
        ({"instruction": ASK[1], "output": "Cold.", "tools": [TOOL]}, hand(ASK, COLD, tools=(TOOL,))),
        (answers(bot("Cold."), tools=[]), PAIR),
    ],
    "calls without words": [
        (answers(bot(None, tool_calls=[CALL]), RESULT, bot("Cold."), **TOOLS), DONE),
        (answers({"role": "assistant", "tool_calls": [CALL]}, **TOOLS), CALLED),
        (
            answers(
                bot(None, function_call=FUNCTION),
                {**RESULT, "role": "function", "name": "get_weather"},
                bot("Cold."),
                functions=[WEATHER],
            ),
            DONE,
        ),
        (answers(bot("", tool_calls=[CALL]), RESULT, bot("Cold."), **TOOLS), DONE),
        (answers(bot([], tool_calls=[CALL]), RESULT, **TOOLS), CALLED),
        (answers(bot(float("nan"), tool_calls=[CALL]), {**RESULT, "role": "ipython"}, bot("Cold."), **TOOLS), DONE),
        (
            {
                "conversations": said(
                    ("human", ASK[1]), ("function_call", json.dumps(FUNCTION)), ("observation", "4"), ("gpt", "Cold.")
                ),
                **TOOLS,
            },
            DONE,
        ),
        (
            answers(
                bot([{"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Oslo"}}]),
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "4"}]},
                bot("Cold."),
                **TOOLS,
            ),
            DONE,
        ),
    ],
    "an answer that is marked as not to be trained": [
        (answers(bot("BAD", train=False), *THEN), BAD_READ),
        (answers(bot("BAD", loss=False), *THEN), BAD_READ),
        (answers(bot("BAD", weight=0), *THEN), BAD_READ),
        (answers(bot("BAD", mask=1), *THEN), BAD_READ),
        (answers(bot("BAD", loss_scale=0.0), *THEN), BAD_READ),
        (answers(bot("BAD", train="false"), *THEN), BAD_READ),
        (answers(bot("BAD", weight="0"), *THEN), BAD_READ),
        (answers(bot("BAD", training=0), *THEN), BAD_READ),
        (answers(bot("BAD", train_detail=[{"begin_offset": 0, "end_offset": 2, "train": False}]), *THEN), BAD_READ),
    ],
    "what stands beside a question": [
        (
            {"instruction": HOW[1], "input": "", "output": "Cold.", "history": [[ASK[1], "Cold."]]},
            hand(ASK, COLD, HOW, COLD),
        ),
        (
            {"instruction": "Translate.", "input": "Good morning", "response": "Cold."},
            hand(("user", "Translate.\n\nGood morning"), COLD),
        ),
        (
            {"instruction": "Translate.", "context": "Good morning", "output": "Cold."},
            hand(("user", "Translate.\n\nGood morning"), COLD),
        ),
        (
            {"instruction": HOW[1], "output": "Cold.", "history": json.dumps([[ASK[1], "Cold."]])},
            hand(ASK, COLD, HOW, COLD),
        ),
        ({"instruction": HOW[1], "response": "Cold.", "history": chat(ASK, COLD)}, hand(ASK, COLD, HOW, COLD)),
        (
            {"question": HOW[1], "answer": "Cold.", "history": [[ASK[1], "Cold."]], "system": "Be brief."},
            hand(("system", "Be brief."), ASK, COLD, HOW, COLD),
        ),
    ],
    "an answer inside a prompt": [
        ({"prompt": chat(ASK, ("assistant", "BAD"), HOW), "completion": chat(COLD)}, BAD_READ),
        ({"prompt": json.dumps(chat(ASK, ("assistant", "BAD"), HOW)), "completion": "Cold."}, BAD_READ),
        (
            {
                "prompt": said(("human", ASK[1]), ("gpt", "BAD"), ("human", HOW[1])),
                "completion": said(("gpt", "Cold.")),
            },
            BAD_READ,
        ),
        (
            {
                "prompt": chat(("system", "Be brief."), ASK, ("assistant", "BAD"), HOW),
                "completion": chat(COLD, HOW, COLD),
            },
            hand(("system", "Be brief."), ASK, ("read", "BAD"), HOW, COLD, HOW, COLD),
        ),
        ({"prompt": {"messages": chat(ASK, ("assistant", "BAD"), HOW)}, "completion": "Cold."}, BAD_READ),
        ({"input": chat(ASK, ("assistant", "BAD"), HOW), "output": "Cold."}, BAD_READ),
        ({"instruction": json.dumps(chat(ASK, ("assistant", "BAD"), HOW)), "output": "Cold."}, BAD_READ),
        ({"question": {"messages": chat(ASK)}, "answer": {"messages": 1}}, hand(ASK, ("assistant", '{"messages":1}'))),
        (
            {"prompt": {"messages": chat(ASK), "mood": "bad"}, "completion": "Cold."},
            "unread: key `mood` in `prompt`: nothing reads it",
        ),
        (
            {"prompt": ASK[1], "completion": [chat(COLD), chat(COLD)]},
            "unread: column `completion`: it holds several conversations, expected one; give each its own row",
        ),
        (
            {"instruction": "Answer.", "input": chat(ASK, ("assistant", "BAD")), "output": "Cold."},
            "unread: column `input`: it holds messages, expected a text beside `instruction`; "
            "put the question behind them, in one list",
        ),
    ],
    "contents in parts": [
        (answers(bot([{"type": "text", "text": "Cold."}])), PAIR),
        (answers(bot(["Co", "ld."])), PAIR),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_text", "text": ASK[1]}]},
                    bot([{"type": "output_text", "text": "Cold."}]),
                ]
            },
            PAIR,
        ),
        (answers(bot({"type": "text", "text": "Cold."})), PAIR),
        (answers(bot([{"type": "text", "text": "Co"}, {"text": "ld."}])), PAIR),
        (answers(bot([{"type": "text", "text": {"value": "Cold.", "annotations": []}}])), PAIR),
        (
            answers(bot([{"type": "text", "text": {"value": "Cold.", "mood": "bad"}}])),
            "unread: key `mood` of a text in a part `text` of a content in `messages`: nothing reads it",
        ),
        (
            {"messages": [{"role": "user", "content": json.dumps([{"type": "text", "text": ASK[1]}])}, bot("Cold.")]},
            PAIR,
        ),
        (spelled(str([{"type": "text", "text": "Cold."}]), weight=1), PAIR),
        (spelled("Cold."), PAIR),
        (
            spelled(json.dumps([{"type": "image_url", "image_url": {"url": "x"}}])),
            "unread: part `image_url` of a content in `messages`: "
            "expected text, thinking, tool_use or tool_result; images and sound are not read",
        ),
        *((answers(bot(text)), hand(ASK, ("assistant", text))) for text in JSON_ANSWERS),
        (spelled(FORM), hand(ASK, ("assistant", FORM))),
        (answers(bot(None, refusal="Cold.")), PAIR),
        (
            answers(bot("Cold.", refusal="I cannot.")),
            "unread: key `refusal` of a message in `messages`: nothing reads it",
        ),
    ],
    "a side of a row in parts, or as a message": [
        (
            {"system": [{"type": "text", "text": "Be brief."}], "messages": chat(ASK, COLD)},
            hand(("system", "Be brief."), ASK, COLD),
        ),
        ({"prompt": chat(ASK)[0], "completion": chat(COLD)[0]}, PAIR),
        ({"instruction": ASK[1], "output": [{"type": "text", "text": "Co"}, {"type": "text", "text": "ld."}]}, PAIR),
        ({"question": json.dumps([{"type": "input_text", "text": ASK[1]}]), "answer": "Cold."}, PAIR),
        *(({"instruction": ASK[1], "output": text}, hand(ASK, ("assistant", text))) for text in JSON_ANSWERS),
        ({"instruction": ASK[1], "output": {"type": "cold"}}, hand(ASK, ("assistant", '{"type":"cold"}'))),
        (
            {"prompt": [{"type": "image", "url": "x.png"}, {"type": "text", "text": ASK[1]}], "completion": "Cold."},
            "unread: part `image` of a content in `prompt`: "
            "expected text, thinking, tool_use or tool_result; images and sound are not read",
        ),
    ],
    "names of speakers": [
        ({"messages": [{"role": "human", "content": ASK[1]}, bot("Cold.")]}, PAIR),
        ({"messages": said(("human", ASK[1]), ("gpt", "Cold."))}, PAIR),
        ({"messages": chat(("developer", "Be brief."), ASK, COLD)}, hand(("developer", "Be brief."), ASK, COLD)),
        ({"thread": [{"text": ASK[1], "role": "prompter"}, {"text": "Cold.", "role": "assistant"}]}, PAIR),
        ({"messages": chat(("USER", ASK[1]), ("Assistant", "Cold."))}, PAIR),
        ({"conversations": said(("User:", ASK[1]), ("ChatGPT", "Cold."))}, PAIR),
        ({"messages": [{"speaker": "customer", "text": ASK[1]}, {"speaker": "agent", "text": "Cold."}]}, PAIR),
        ({"conversations": [{"role": "prompter", "value": ASK[1]}, {"role": "bot", "value": "Cold."}]}, PAIR),
        (
            {"messages": chat(("narrator", "x"), ASK, COLD)},
            f"unread: role of a message in `messages`: {ROLES}",
        ),
    ],
    "a conversation as text": [
        ({"messages": json.dumps(chat(ASK, COLD))}, PAIR),
        ({"messages": str(chat(ASK, COLD))}, PAIR),
        ({"conversations": json.dumps(said(("human", ASK[1]), ("gpt", "Cold.")), indent=2)}, PAIR),
        ({"messages": [json.dumps(turn) for turn in chat(ASK, COLD)]}, PAIR),
        ({"conversation": json.dumps([{"input": ASK[1], "output": "Cold."}])}, PAIR),
        ({"messages": {"role": ["user", "assistant"], "content": [ASK[1], "Cold."]}}, PAIR),
        ({"conversations": {"from": ["human", "gpt"], "value": [ASK[1], "Cold."], "weight": [None, 1]}}, PAIR),
        ({"text": f"### Human: {ASK[1]}### Assistant: Cold."}, PAIR),
        ({"text": f"### User:\n{ASK[1]}\n\n### Assistant:\nCold.\n"}, PAIR),
        ({"text": f"<|im_start|>user\n{ASK[1]}<|im_end|>\n<|im_start|>assistant\nCold.<|im_end|>\n"}, PAIR),
        (
            {"text": f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{ASK[1]} [/INST] Cold. </s>"},
            hand(("system", "Be brief."), ASK, COLD),
        ),
        ({"text": f"They wrote: ### Human: {ASK[1]}"}, f"⟦They wrote: ### Human: {ASK[1]}<|im_end|>⟧"),
    ],
    "numbers and objects": [
        ({"instruction": ASK[1], "output": 20}, hand(ASK, ("assistant", "20"))),
        ({"instruction": ASK[1], "output": {"degrees": 4}}, hand(ASK, ("assistant", '{"degrees":4}'))),
        ({"instruction": ASK[1], "output": False}, hand(ASK, ("assistant", "false"))),
        ({"messages": [{"role": "user", "content": 42}, bot(0.5)]}, hand(("user", "42"), ("assistant", "0.5"))),
        ({"question": ASK[1], "answer": ["a", None]}, hand(ASK, ("assistant", '["a",null]'))),
        ({"instruction": ASK[1], "output": "20"}, hand(ASK, ("assistant", "20"))),
    ],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, rows in ROWS.items() for n in range(len(rows))])
def test_rows(say: Say, kind: str, number: int) -> None:
    row, right = ROWS[kind][number]
    assert say(row) == right


BOB = hand(("system", "You are Bob."), ASK, COLD)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat(("system", ""), ASK, COLD)},
        {"system": "", "instruction": ASK[1], "output": "Cold."},
        {"messages": chat(("system", " \n"), ASK, COLD)},
        {"messages": chat(("system", None), ASK, COLD)},
        {"system": None, "conversations": said(("human", ASK[1]), ("gpt", "Cold."))},
        {"system_prompt": "  ", "question": ASK[1], "answer": "Cold."},
    ],
)
def test_an_empty_system_message_is_none_in_every_format(say: Say, row: Row) -> None:
    assert say(row, system_prompt="You are Bob.") == BOB


PREFERENCES = "rows that compare answers"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (answers(bot("Cold."), chosen=chat(ASK, COLD), rejected=chat(ASK, ("assistant", "Hot."))), "column `chosen`"),
        (answers(bot("Cold."), label=False), "column `label`"),
        ({"prompt": ASK[1], "completion": "Cold.", "rejected": "Cold."}, "column `rejected`"),
        (answers(bot("Cold."), rejected="Weather in Oslo? Cold. Or it is not."), "column `rejected`"),
        ({"prompt": ASK[1], "chosen": "Cold.", "rejected": "Hot."}, "column `chosen`"),
        ({"instruction": ASK[1], "output": "Cold.", "non_preferred_output": "Hot."}, "column `non_preferred_output`"),
    ],
)
def test_rows_that_compare_are_named_as_such(say: Say, row: Row, named: str) -> None:
    found = say(row)
    assert found.startswith(f"{UNREAD}: ")
    assert f"{named}: {PREFERENCES}" in found


EOS = "<|endoftext|>"


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        (answers(bot("<think>\nIt is winter.\n</think>\n\nCold.")), "reasoning"),
        (answers(bot("Cold.", reasoning_content="It is winter.")), "reasoning"),
        (
            answers(bot([{"type": "thinking", "thinking": "It is winter."}, {"type": "text", "text": "Cold."}])),
            "reasoning",
        ),
        (answers(bot("It is </think>winter, so cold.")), "content"),
    ],
)
def test_what_a_template_leaves_out_of_an_answer_is_said(say: Say, row: Row, left_out: str) -> None:
    assert f'"left_out": ["{left_out}"]' in say(row, "drops thoughts")


@pytest.mark.parametrize(
    "message",
    [
        bot("Wood does.", reasoning_content="Density decides."),
        bot("Wood does.", reasoning="Density decides."),
        bot("Wood does.", thinking="Density decides."),
        bot([{"type": "thinking", "thinking": "Density decides."}, {"type": "text", "text": "Wood does."}]),
        bot(THOUGHT),
    ],
)
def test_thoughts_go_where_the_template_reads_them_and_once(say: Say, message: Row) -> None:
    thought = f"<user>{ASK[1]}\n<A>⟦<think>Density decides.</think>Wood does.{EOS}⟧"
    assert say(answers(message), "thinks") == thought
    assert say(answers(message)) == hand(ASK, ("assistant", THOUGHT))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [bot("Hello!"), *chat(ASK, COLD)]},
        {"conversations": said(("gpt", "Hello!"), ("human", ASK[1]), ("gpt", "Cold."))},
        {"messages": [bot("Hello!", weight=0), *chat(ASK, COLD)]},
        {"conversation": [{"input": "", "output": "Hello!"}, {"input": ASK[1], "output": "Cold."}]},
    ],
)
def test_a_greeting_is_read_and_not_trained_where_no_server_would_ask_for_it(say: Say, row: Row) -> None:
    found = say(row, "looks at the first")
    assert found.startswith(f"<A>Hello!{EOS}<user>{ASK[1]}\n<A>⟦Cold.{EOS}⟧")


def test_a_greeting_behind_a_system_message_is_read(say: Say) -> None:
    row = {"messages": [*chat(("system", "Be brief. ")), bot("Hello!"), *chat(ASK, COLD)]}
    assert f"<user>{ASK[1]}\n<A>⟦Cold.{EOS}⟧" in say(row, "looks at the first")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat(ASK, COLD, HOW, COLD)},
        {"messages": chat(ASK, COLD)},
        {"instruction": ASK[1], "output": "Cold."},
        {"messages": chat(("system", "Be brief."), ASK, COLD)},
    ],
)
@pytest.mark.parametrize("train_on", ["responses", "last_response"])
def test_a_prompt_that_opens_a_thought_is_named_with_ways_out_that_work(say: Say, row: Row, train_on: str) -> None:
    found = say(row, "opens a thought", train_on=train_on)
    assert found.startswith("refused_by_template: ")
    assert "opens a thought (<think>) that this answer does not have" in found
    assert f"⟦Cold.{EOS}⟧" in say(
        row, "opens a thought if asked", train_on=train_on, template_options={"enable_thinking": False}
    )
    assert "⟦Cold.<|im_end|>⟧" in say(row, "chatml", train_on=train_on)


def test_an_option_that_the_template_does_not_read_is_named(say: Say) -> None:
    row = answers(
        bot("Cold."), chat_template_kwargs={"enable_thinking": False, "xml_tools": ["<f/>"], "python_tools": []}
    )
    assert say(row).startswith(
        "refused_by_template: `xml_tools`, which the row gives to the chat template, is not read"
    )
    assert say(row, ignore=["xml_tools"]) == PAIR
    with pytest.raises(instructft.InstructftError, match=r"data.template_options.effort: .* does not read it"):
        say(row, template_options={"effort": "high"})


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------

ROW = {"instruction": "Weather in Oslo?", "output": "Cold; 4, or 5."}
LINE = json.dumps(ROW)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("array.jsonl", f"[{LINE}]"),
        ("data.json", f'{{"data": [{LINE}]}}'),
        ("semicolons.csv", 'instruction;output\nWeather in Oslo?;"Cold; 4, or 5."\n'),
        ("tabs.csv", "instruction\toutput\nWeather in Oslo?\tCold; 4, or 5.\n"),
        ("pipes.csv", "instruction|output\nWeather in Oslo?|Cold; 4, or 5.\n"),
        ("examples.json", f'{{"version": "1.0", "examples": [{LINE}]}}'),
        ("pretty.jsonl", json.dumps(ROW, indent=2)),
        ("bom.json", "\ufeff" + f"[\n{LINE}\n]\n"),
        ("windows.csv", 'instruction;output\r\nWeather in Oslo?;"Cold; 4, or 5."\r\n'),
    ],
)
def test_files_as_people_write_them(recipe: Any, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    (part,) = load_parts(recipe({"path": str(tmp_path / name)}))
    assert [part.row(raw) for raw in part.raw] == [ROW]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([answers(bot("Cold.")), ROW, {"prompt": "a", "completion": "b"}, {"text": "c"}, {}], "4 with no conversation"),
        ([ROW, {"instruction": "a", "answer": "b"}, {"instruction": "c"}], "2 with an empty answer"),
        ([{"text": "A document."}, {"content": "Another."}, ROW, ROW], "2 with an empty"),
        ([{"question": "a", "answer": "b"}, *[{"q": "a", "a": "b"}] * 3], "3 with an empty"),
    ],
)
def test_a_file_whose_rows_differ_is_refused_with_what_was_found(recipe: Any, rows: list[Row], said: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared(recipe(rows, overrides=["data.splits={validation: 0, test: 0}"]))
    assert said in str(caught.value)
    assert "check.max_dropped_share allows 20.0%" in str(caught.value)
    assert "its columns with a value: " in str(caught.value)
