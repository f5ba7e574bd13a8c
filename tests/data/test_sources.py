"""Every named data set: three rows of its real shape, and the exact conversation that each becomes, or why none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructft.data.formats import FORMATS, detect_format, to_conversation
from instructft.data.sources import SOURCES
from instructft.prompt.ledger import Unread, Unusable
from instructft.errors import DataError


def user(content, **more):
    return {"role": "user", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def verdict(row, fmt):
    """The conversation of a row, or the reason why it is dropped."""
    try:
        return to_conversation(row, fmt)
    except Unusable as unusable:
        return unusable.reason


PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def alpaca(instruction, given, output):
    shown = f"{PREAMBLE}\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}"
    return {"instruction": instruction, "input": given, "output": output, "text": shown}


ALPACA = [
    (alpaca("Name a prime.", "", "Seven"), [user("Name a prime."), answer("Seven")]),
    (alpaca("Add them.", "1, 2", "3"), [user("Add them.", input="1, 2"), answer("3")]),
    (alpaca("Say nothing.", "", ""), "empty_answer"),
]
BOOK = [({k: v for k, v in row.items() if k != "text"}, expected) for row, expected in ALPACA]

# source -> three rows as they come from it, each with the conversation or the reason why it is dropped
ROWS = {
    "dolly-15k": [
        (
            {
                "instruction": "When did it start?",
                "context": "It started in 2000.\n",
                "response": "In 2000.",
                "category": "closed_qa",
            },
            [user("When did it start?", context="It started in 2000."), answer("In 2000.")],
        ),
        (
            {"instruction": "Tope or Rope?", "context": "", "response": "Tope", "category": "classification"},
            [user("Tope or Rope?"), answer("Tope")],
        ),
        ({"instruction": "Why?", "context": "", "response": " \n", "category": "open_qa"}, "empty_answer"),
    ],
    "alpaca-gpt4": ALPACA,
    "alpaca": ALPACA,
    "hh-rlhf": [
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello. Well?\n\nHuman: Bye\n\nAssistant: See you.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Go away.",
            },
            [user("Hi"), answer("Hello. Well?"), user("Bye"), answer("See you.")],
        ),
        (
            {
                "chosen": "\n\nHuman: Two\n\nparagraphs: a\nb\n\nAssistant: Yes:\n\n1. one\n\n2. two",
                "rejected": "\n\nHuman: Two",
            },
            [user("Two\n\nparagraphs: a\nb"), answer("Yes:\n\n1. one\n\n2. two")],
        ),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, "empty_answer"),
    ],
    "slim-orca": [
        (
            {
                "conversations": [
                    {"from": "system", "value": "You are an AI.", "weight": None},
                    {"from": "human", "value": "2 + 2?", "weight": 0.0},
                    {"from": "gpt", "value": "4", "weight": 1.0},
                ]
            },
            [system("You are an AI."), user("2 + 2?"), answer("4")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "A?", "weight": 0.0},
                    {"from": "gpt", "value": "a", "weight": 0.0},
                    {"from": "human", "value": "B?", "weight": None},
                    {"from": "gpt", "value": "b", "weight": None},
                ]
            },
            [user("A?"), answer("a", weight=0), user("B?"), answer("b")],
        ),
        ({"conversations": [{"from": "human", "value": "A?", "weight": None}]}, "no_assistant_turn"),
    ],
    "llms-from-scratch": BOOK,
    "quickstart": [
        (
            {"instruction": "What is 3 + 4?", "input": "", "output": "3 + 4 = 7", "category": "sums"},
            [user("What is 3 + 4?"), answer("3 + 4 = 7")],
        ),
        (
            {
                "instruction": "Turn the word into its opposite.",
                "input": "Word: early",
                "output": "late",
                "category": "opposites",
            },
            [user("Turn the word into its opposite.", input="Word: early"), answer("late")],
        ),
        ({"instruction": "", "input": "", "output": "late", "category": "opposites"}, "empty_prompt"),
    ],
}


@pytest.mark.parametrize("name", SOURCES)
def test_three_rows_of_each_source_become_exactly_these_messages(name):
    assert len(ROWS[name]) == 3
    for row, expected in ROWS[name]:
        assert detect_format(list(row), name) == SOURCES[name].format
        assert verdict(row, SOURCES[name].format) == expected


def test_every_source_says_where_it_is_from_and_under_which_licence():
    assert list(SOURCES) == list(ROWS)
    for name, source in SOURCES.items():
        assert source.format in FORMATS
        assert source.licence
        assert source.homepage
        assert (source.hub is not None) + (source.url is not None) == (name != "quickstart")
    assert "red-team-attempts" not in str(SOURCES["hh-rlhf"].files)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["output", "instruction"], "alpaca"),
        (["instruction", "context", "response", "category"], "dolly"),
        (["instruction", "response"], "dolly"),
        (["chosen", "rejected"], "hh"),
        (["chosen"], "hh"),
        (["conversations"], "sharegpt"),
        (["id", "conversations", "system"], "sharegpt"),
        (["messages"], "messages"),
        (["messages", "conversations"], "messages"),
        (["prompt", "completion"], "prompt-completion"),
        (["prompt", "prompt_id", "messages"], "messages"),  # as in UltraChat
    ],
)
def test_format_is_detected_by_columns(columns, expected):
    assert detect_format(columns, "rows.json") == expected


@pytest.mark.parametrize("columns", [[], ["text"], ["question", "answer"], ["instruction"], ["prompt"], ["rejected"]])
def test_unknown_columns_are_an_error_that_lists_them_and_all_formats(columns):
    with pytest.raises(DataError) as caught:
        detect_format(columns, "rows.json")
    message = str(caught.value)
    assert message.startswith(f"rows.json: no known format has the columns {', '.join(columns) or '(none)'}.\n")
    for name, fmt in FORMATS.items():
        assert f"  {name}: {', '.join(fmt.columns)}\n" in message
    assert "columns: {instruction: question, …}" in message


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("\n\nHuman: a\n\nAssistant: b", [user("a"), answer("b")]),
        ("Human: a\n\nAssistant: b", [user("a"), answer("b")]),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", [user("a\n\nb"), answer("c")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", [user("a"), answer("b\n\nc")]),
        (
            "\n\nHuman: Is Human: a word?\nHuman: yes\n\nAssistant: b",
            [user("Is Human: a word?\nHuman: yes"), answer("b")],
        ),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", [user("a"), answer("b")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "empty_answer"),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: c\n\nAssistant: d", "empty_answer"),
        ("\n\nHuman: a\n\nAssistant:b", [user("a"), answer("b")]),
        ("Intro\n\nHuman: a\n\nAssistant: b", "not_a_dialogue"),
        ("no marker at all", "not_a_dialogue"),
        ("", "not_a_dialogue"),
        (None, "not_a_dialogue"),
        ([{"role": "user", "content": "a"}], "not_text"),
        ("\n\nHuman: a", "no_assistant_turn"),
        ("\n\nAssistant: b", "empty_prompt"),
    ],
)
def test_hh_dialogues(chosen, expected):
    assert verdict({"chosen": chosen, "rejected": "\n\nHuman: a\n\nAssistant: worse"}, "hh") == expected


def turns(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.mark.parametrize(
    ("row", "fmt", "expected"),
    [
        # names of speakers
        ({"conversations": turns(("user", "a"), ("chatgpt", "b"))}, "sharegpt", [user("a"), answer("b")]),
        ({"conversations": turns(("Human", "a"), ("GPT", "b"))}, "sharegpt", [user("a"), answer("b")]),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "sharegpt",
            [user("a"), answer("b")],
        ),
        ({"conversations": turns(("human", "a"), ("tool", "x"), ("gpt", "b"))}, "sharegpt", "unknown_role"),
        ({"conversations": turns((None, "a"), ("gpt", "b"))}, "sharegpt", "unknown_role"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages", "unknown_role"),
        ({"messages": [{"content": "a"}]}, "messages", "unknown_role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages", "unknown_role"),
        # weights: an answer of weight 0 is read, not trained
        (
            {"messages": [user("a"), answer("b", weight=0), user("c"), answer("d", weight=1)]},
            "messages",
            [user("a"), answer("b", weight=0), user("c"), answer("d")],
        ),
        (
            {"messages": [user("a"), answer("b", weight=0), answer("c")]},
            "messages",
            [user("a"), answer("b\n\nc", weight=0)],
        ),
        (
            {"messages": [user("a"), answer("b"), answer("c", weight=0)]},
            "messages",
            [user("a"), answer("b\n\nc", weight=0)],
        ),
        # system prompts
        (
            {"system": "s", "instruction": "a", "output": "b"},
            "alpaca",
            [system("s"), user("a"), answer("b")],
        ),
        ({"system": "s", "instruction": "a", "response": "b"}, "dolly", [system("s"), user("a"), answer("b")]),
        (
            {"system": "s", "conversations": turns(("human", "a"), ("gpt", "b"))},
            "sharegpt",
            [system("s"), user("a"), answer("b")],
        ),
        (
            {"system": " ", "conversations": turns(("system", "s"), ("human", "a"), ("gpt", "b"))},
            "sharegpt",
            [system("s"), user("a"), answer("b")],
        ),
        # turns of one speaker are joined, with what belongs to them
        (
            {"messages": [user("a", input="1"), user("b", input="2", context="c"), answer("d")]},
            "messages",
            [user("a\n\nb", input="1\n\n2", context="c"), answer("d")],
        ),
        ({"messages": [user("a"), user(""), answer("b")]}, "messages", [user("a"), answer("b")]),
        # what follows the last answer is left off
        ({"messages": [user("a"), answer("b"), user("c"), system("d")]}, "messages", [user("a"), answer("b")]),
        ({"messages": [user("a"), user("b")]}, "messages", "no_assistant_turn"),
        ({"messages": []}, "messages", "no_assistant_turn"),
        # prompt and completion, as texts and as messages
        ({"prompt": " a ", "completion": " b\n"}, "prompt-completion", [user("a"), answer("b")]),
        (
            {"prompt": [system("s"), user("a")], "completion": [answer("b")]},
            "prompt-completion",
            [system("s"), user("a"), answer("b")],
        ),
        ({"prompt": "a", "completion": None}, "prompt-completion", "empty_answer"),
        ({"prompt": "", "completion": "b"}, "prompt-completion", "empty_prompt"),
        # nulls, white space, and what is no text
        ({"instruction": "a", "input": None, "output": "b"}, "alpaca", [user("a"), answer("b")]),
        ({"instruction": "a", "output": None}, "alpaca", "empty_answer"),
        ({"instruction": "a", "output": " \t\n\u00a0"}, "alpaca", "empty_answer"),
        ({"instruction": None, "input": "x", "output": "b"}, "alpaca", [user("", input="x"), answer("b")]),
        ({"instruction": " ", "output": "b"}, "alpaca", "empty_prompt"),
        ({"instruction": "a", "output": 42}, "alpaca", "not_text"),
        ({"instruction": "a", "input": 0, "output": "b"}, "alpaca", "not_text"),
        ({"instruction": True, "response": "b"}, "dolly", "not_text"),
        ({"instruction": "a", "output": "half an emoji \ud83d"}, "alpaca", "not_text"),
        ({"messages": [user("a"), answer([{"type": "text", "text": "b"}])]}, "messages", "not_text"),
        ({"messages": [user("a"), answer("b"), user("c"), answer(" ")]}, "messages", "empty_answer"),
        ({"messages": None}, "messages", "not_a_dialogue"),
        ({"messages": "a"}, "messages", "not_a_dialogue"),
        ({"messages": [user("a"), None]}, "messages", "not_a_dialogue"),
        ({"conversations": {"from": "human"}}, "sharegpt", "not_a_dialogue"),
    ],
)
def test_rows_in_the_wild(row, fmt, expected):
    assert verdict(row, fmt) == expected


texts = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=8),
    st.sampled_from(["", " \n", "\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\ud800"]),
)
roles = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", None])
messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles, "from": roles, "content": texts, "value": texts, "weight": st.sampled_from([None, 0, 1])}
    ),
    max_size=5,
)
wild_rows = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(["instruction", "input", "output", "context", "response", "system", "chosen"], texts),
        **dict.fromkeys(["messages", "conversations", "prompt", "completion"], messages | texts),
    },
)


@settings(max_examples=300, deadline=None)
@given(wild_rows, st.sampled_from(list(FORMATS)))
def test_a_conversation_always_ends_with_an_answer_that_is_not_empty(row, fmt):
    found = verdict(row, fmt)
    if isinstance(found, str):
        assert found in (
            "no_assistant_turn",
            "empty_answer",
            "empty_prompt",
            "not_text",
            "not_a_dialogue",
            "unknown_role",
        )
        return
    assert found[-1]["role"] == "assistant"
    assert any(message["role"] == "user" for message in found)
    for message, following in zip(found, [*found[1:], None], strict=True):
        assert following is None or message["role"] != following["role"]
        assert set(message) <= {"role", "content", "input", "context", "weight"}
        assert message["content"] == message["content"].strip()
        assert message["content"] or message["role"] != "assistant"
        message["content"].encode()
