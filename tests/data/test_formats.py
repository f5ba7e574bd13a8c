"""Every named data set: three rows of its real shape, and the exact conversation that each becomes, or why none."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructft.data.formats import FORMATS, Rules, columns_asked, detect_format, to_conversation
from instructft.data.sources import SOURCES
from instructft.errors import DataError, UsageError
from instructft.prompt.ledger import Unread, Unusable


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
    except Unread as unread:
        return "; ".join(f"{finding.what}: {finding.value}" for finding in unread.found)


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
            [user("When did it start?", context="It started in 2000.\n"), answer("In 2000.")],
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
    "quickstart-chat": [
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
            [user("Hi"), answer("Hello.")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "A?"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "B?"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            [user("A?"), answer("a"), user("B?"), answer("b")],
        ),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no_assistant_turn"),
    ],
}


@pytest.mark.parametrize("name", SOURCES)
def test_three_rows_of_each_source_become_exactly_these_messages(name):
    assert len(ROWS[name]) == 3
    for row, expected in ROWS[name]:
        assert detect_format(list(row), name) == SOURCES[name].format
        assert verdict(row, SOURCES[name].format) == expected


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


@pytest.mark.parametrize("columns", [[], ["instruction"], ["prompt"], ["rejected"]])
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
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", [user("a"), user("b"), answer("c")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", [user("a"), answer("b"), answer("c")]),
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
        (
            [{"role": "user", "content": "a"}],
            'column `chosen`: [{"role":"user","content":"a"}]; '
            'column `rejected`: "\\n\\nHuman: a\\n\\nAssistant: worse"',
        ),
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
        (
            {"conversations": turns(("human", "a"), ("alien", "x"), ("gpt", "b"))},
            "sharegpt",
            'role of a message in `conversations`: "alien"',
        ),
        ({"conversations": turns((None, "a"), ("gpt", "b"))}, "sharegpt", "role of a message in `conversations`: null"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages", "no_assistant_turn"),
        ({"messages": [{"content": "a"}]}, "messages", "role of a message in `messages`: null"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages", 'role of a message in `messages`: ["user"]'),
        # weights: an answer of weight 0 is read, not trained
        (
            {"messages": [user("a"), answer("b", weight=0), user("c"), answer("d", weight=1)]},
            "messages",
            [user("a"), answer("b", weight=0), user("c"), answer("d")],
        ),
        (
            {"messages": [user("a"), answer("b", weight=0), answer("c")]},
            "messages",
            [user("a"), answer("b", weight=0), answer("c")],
        ),
        (
            {"messages": [user("a"), answer("b"), answer("c", weight=0)]},
            "messages",
            [user("a"), answer("b"), answer("c", weight=0)],
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
        # turns of one speaker stay as they are
        (
            {"messages": [user("a", input="1"), user("b", input="2", context="c"), answer("d")]},
            "messages",
            [user("a", input="1"), user("b", input="2", context="c"), answer("d")],
        ),
        ({"messages": [user("a"), user(""), answer("b")]}, "messages", [user("a"), user(""), answer("b")]),
        # what follows the last answer is left off
        ({"messages": [user("a"), answer("b"), user("c"), system("d")]}, "messages", [user("a"), answer("b")]),
        ({"messages": [user("a"), user("b")]}, "messages", "no_assistant_turn"),
        ({"messages": []}, "messages", "no_assistant_turn"),
        # prompt and completion, as texts and as messages
        ({"prompt": " a ", "completion": " b\n"}, "prompt-completion", [user(" a "), answer(" b\n")]),
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
        ({"instruction": "a", "output": 42}, "alpaca", [user("a"), answer("42")]),
        ({"instruction": "a", "input": 0, "output": "b"}, "alpaca", [user("a", input="0"), answer("b")]),
        ({"instruction": True, "response": "b"}, "dolly", [user("true"), answer("b")]),
        ({"instruction": "a", "output": "half an emoji \ud83d"}, "alpaca", "not_text"),
        ({"messages": [user("a"), answer([{"type": "text", "text": "b"}])]}, "messages", [user("a"), answer("b")]),
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
    if isinstance(verdict(row, fmt), str):  # by a reason of the account, or by name
        assert verdict(row, fmt)
        return
    found = to_conversation(row, fmt)
    if found[0]["role"] == "text":
        assert len(found) == 1
        return
    assert found[-1]["role"] == "assistant"
    for message in found:
        assert set(message) <= {"role", "content", "input", "context", "weight", "tool_calls", "reasoning_content"}
        assert message["role"] != "assistant" or message["content"].strip() or message["tool_calls"]
        message["content"].encode()


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKED = [user("Weather?"), answer("", tool_calls=[CALL])]
GLAIVE = {
    "system": 'SYSTEM: Use these functions -\n{"name": "weather", "parameters": {"type": "object"}}',
    "chat": 'USER: Weather?\n\n\nASSISTANT: <functioncall> {"name": "weather", "arguments": \'{"city": "Oslo"}\'} '
    '<|endoftext|>\n\n\nFUNCTION RESPONSE: {"c": 4}\n\n\nASSISTANT: Cold. <|endoftext|>',
}


# rows in the layouts that published data sets have
@pytest.mark.parametrize(
    ("row", "fmt", "expected"),
    [
        (
            GLAIVE,
            "glaive",
            [system("Use these functions -"), *ASKED, {"role": "tool", "content": '{"c": 4}'}, answer("Cold.")],
        ),
        (
            {
                "id": 0,
                "query": "Weather?",
                "answers": '[{"name": "weather", "arguments": {"city": "Oslo"}}]',
                "tools": '[{"name": "weather", "parameters": {"type": "object"}}]',
            },
            "xlam",
            ASKED,
        ),
        (
            {
                "conversations": turns(
                    ("human", "Weather?"),
                    ("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}'),
                    ("observation", '{"c": 4}'),
                    ("gpt", "Cold."),
                ),
                "tools": '[{"name": "weather", "parameters": {"type": "object"}}]',
                "system": "Help.",
            },
            "sharegpt",
            [system("Help."), *ASKED, {"role": "tool", "content": '{"c": 4}'}, answer("Cold.")],
        ),
        (
            {"conversations": ["a", "b", "c", "d"], "source": "x"},
            "sharegpt",
            [user("a"), answer("b"), user("c"), answer("d")],
        ),
        ({"prompt": "a", "prompt_id": "1", "messages": [user("a"), answer("b")]}, "messages", [user("a"), answer("b")]),
        ({"text": "### Human: a### Assistant: b"}, "text", [user("a"), answer("b")]),
        ({"text": "A document.\n"}, "text", [{"role": "text", "content": "A document.\n"}]),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            "question-answer",
            [system("s"), user("a"), answer("b")],
        ),
        (
            {"conversation": [{"system": "s", "input": "a", "output": "b"}]},
            "conversation",
            [system("s"), user("a"), answer("b")],
        ),
        ({"question": "a", "answer": 20}, "question-answer", [user("a"), answer("20")]),
        ({"query": "a", "response": {"x": [1]}}, "question-answer", [user("a"), answer('{"x":[1]}')]),
        # what must not be trained as it stands
        ({"prompt": "a", "completion": "b", "label": False}, "prompt-completion", "column `label`: false"),
        ({"messages": [user("a"), answer("b")], "rejected": "no"}, "messages", 'column `rejected`: "no"'),
        ({"messages": [user("a"), answer("b")], "images": ["x.png"]}, "messages", 'column `images`: ["x.png"]'),
    ],
)
def test_published_layouts_have_every_column_accounted_for(row, fmt, expected):
    assert detect_format(list(row), "rows") == fmt
    assert verdict(row, fmt) == expected


def test_tools_options_and_rules():
    row = {"messages": [user(" a"), answer("b\n")], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    found = to_conversation(
        {**row, "mood": "x"}, "messages", Rules(frozenset({"mood"}), options={"enable_thinking": 1, "d": 2})
    )
    assert list(found) == [user(" a"), answer("b\n")]
    assert found.tools == [TOOL]
    assert found.options == {"enable_thinking": False, "d": 2}
    assert list(to_conversation(row, "messages", Rules(strip=True))) == [user("a"), answer("b")]


def test_rows_of_a_message_tree_are_refused_with_the_way_out():
    with pytest.raises(DataError, match="one message of a tree"):
        detect_format(["message_id", "parent_id", "body", "role"], "oasst")


def test_columns_that_differ_in_case_come_with_the_mapping_to_write():
    with pytest.raises(DataError, match=r'columns: \{question: Question, answer: "Answer "\}$'):
        detect_format(["Id", "Question", "Answer "], "rows.csv")
    with pytest.raises(DataError, match=r"columns: \{instruction: question, …\}$"):
        detect_format(["Id", "Frage", "Antwort"], "rows.csv")


def test_columns_that_are_typed():
    assert columns_asked(["instruction=question", "output=a=b"]) == {"instruction": "question", "output": "a=b"}
    for words, said in (
        (["instruction"], "found instruction, expected OURS=THEIRS"),
        (["=a"], "found =a, expected OURS=THEIRS"),
        (["instructions=a"], 'no format expects a column instructions; did you mean "instruction"?'),
    ):
        with pytest.raises(UsageError) as caught:
            columns_asked(words)
        assert said in str(caught.value)


def test_a_plain_row_is_read_as_any_other():
    """Three texts take a shorter way; beside a column that says nothing they take the long one."""
    texts = [
        "a",
        " b\n",
        "",
        " ",
        "\t",
        "[c]",
        '{"d": 1}',
        "<think>\nf\n</think>\n\ng",
        "é🙂",
        "\ud83d",
        "NA",
        "x" * 99,
    ]
    texts += ['[{"role": "user", "content": "e"}]', None, 7, ["h"]]
    for fmt, names in (
        ("alpaca", ("instruction", "input", "output")),
        ("dolly", ("instruction", "context", "response")),
    ):
        found = []
        for values in itertools.product(texts, repeat=3):
            row = dict(zip(names, values, strict=True))
            for one in (row, {**row, "id": None}):
                try:
                    conversation = to_conversation(one, fmt)
                    found.append((list(conversation), conversation.tools, conversation.options))
                except (Unusable, Unread) as error:
                    found.append(str(error))
            assert found[-2] == found[-1] or "its columns with a value" in str(found[-1]), row
        assert len(found) == 2 * len(texts) ** 3
