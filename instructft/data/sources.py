"""Where each named data set lives, and how a row of each format becomes messages.

To add a data set: one entry in `SOURCES`, three of its rows in `tests/data/test_sources.py`, one recipe.

A conversation is a list of `instructft.prompt.conversation.Message`s, the last one an assistant's; a row that cannot be
one is `Unusable`, for a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from instructft.errors import DataError
from instructft.prompt.conversation import Message


class Unusable(Exception):
    """A row that cannot be trained on: a verdict, caught and counted in `run.json` under `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


# --------------------------------------------------------------------------------------------------------------------
# Formats: how one row becomes a conversation
# --------------------------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], column: str) -> str:
    """The text of a column without outer white space; "" for a missing or null one."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str) or not _is_unicode(value):
        raise Unusable("not_text")
    return value.strip()


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell (a cut emoji, "\\ud83d") and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _instruction(row: Mapping[str, Any], extra: str, answer: str) -> list[Message]:
    """`{"instruction", "input", "output"}`, as in Stanford Alpaca, or Dolly's `context` and `response`."""
    user: Message = {"role": "user", "content": _text(row, "instruction")}
    if text := _text(row, extra):
        user[extra] = text
    return [*_system(row), user, {"role": "assistant", "content": _text(row, answer)}]


def _system(row: Mapping[str, Any]) -> list[Message]:
    system = _text(row, "system")
    return [{"role": "system", "content": system}] if system else []


_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _hh(row: Mapping[str, Any]) -> list[Message]:
    """`{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": …}`: the preferred dialogue of Anthropic HH."""
    before, *parts = _HH_TURN.split(_text(row, "chosen"))
    if before.strip() or not parts:
        raise Unusable("not_a_dialogue")
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": content.strip()})
    return messages


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
    """`{"conversations": [{"from", "value", "weight"}, …]}`. A weight of 0 on an answer: read, not trained."""
    messages: list[Message] = [*_system(row)]
    for turn in _turns(row, "conversations"):
        # rows in the wild mix ShareGPT's names (from, value) with OpenAI's (role, content)
        speaker = turn.get("from") or turn.get("role")
        role = _SHAREGPT_ROLES.get(str(speaker).lower())
        if role is None:
            raise Unusable("unknown_role")
        message: Message = {"role": role, "content": _text(turn, "value") or _text(turn, "content")}
        if role == "assistant" and turn.get("weight") == 0:
            message["weight"] = 0
        messages.append(message)
    return messages


def _messages(row: Mapping[str, Any]) -> list[Message]:
    """`{"messages": [{"role", "content"}, …]}`, as in OpenAI's and TRL's conversational format."""
    return [_message(turn) for turn in _turns(row, "messages")]


def _prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    """`{"prompt", "completion"}`, each a text or a list of messages."""
    return [*_side(row, "prompt", "user"), *_side(row, "completion", "assistant")]


def _side(row: Mapping[str, Any], column: str, role: str) -> list[Message]:
    if isinstance(row.get(column), list):
        return [_message(turn) for turn in _turns(row, column)]
    return [{"role": role, "content": _text(row, column)}]


def _turns(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    turns = row.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise Unusable("not_a_dialogue")
    return turns


def _message(turn: Mapping[str, Any]) -> Message:
    role = turn.get("role")
    if role not in ("system", "user", "assistant"):
        raise Unusable("unknown_role")
    message: Message = {"role": role, "content": _text(turn, "content")}
    for extra in ("input", "context"):
        if role == "user" and (text := _text(turn, extra)):
            message[extra] = text
    if role == "assistant" and turn.get("weight") == 0:
        message["weight"] = 0
    return message


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    Args:
        columns: the columns that a row must have; they also identify the format.
        optional: further columns that are read when they are there.
        to_messages: one row to one conversation; raises `Unusable`.
    """

    columns: tuple[str, ...]
    to_messages: Callable[[Mapping[str, Any]], list[Message]]
    optional: tuple[str, ...] = ()


# The order is the order of detection: the first format whose columns are all there.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages),
    "sharegpt": Format(("conversations",), _sharegpt, ("system",)),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion),
    "dolly": Format(
        ("instruction", "response"),
        partial(_instruction, extra="context", answer="response"),
        ("context", "category", "system"),
    ),
    "alpaca": Format(
        ("instruction", "output"),
        partial(_instruction, extra="input", answer="output"),
        ("input", "category", "system"),
    ),
    "hh": Format(("chosen",), _hh, ("rejected",)),
}


def detect_format(columns: list[str], where: str) -> str:
    """Name the format whose columns are all among `columns`.

    >>> detect_format(["instruction", "input", "output"], "rows.json")
    'alpaca'

    Raises:
        DataError: no format fits; the message lists what was found and what each format needs.
    """
    for name, fmt in FORMATS.items():
        if set(fmt.columns) <= set(columns):
            return name
    needs = "\n".join(f"  {name}: {', '.join(fmt.columns)}" for name, fmt in FORMATS.items())
    raise DataError(
        f"{where}: no known format has the columns {', '.join(columns) or '(none)'}.\n"
        f"A row needs the columns of one of these formats:\n{needs}\n"
        "If yours have other names, map them in the recipe: data.datasets[].columns: {instruction: question, …}"
    )


def to_conversation(row: Mapping[str, Any], fmt: str) -> list[Message]:
    """Turn one row into a conversation that ends with an assistant's answer.

    Turns of one speaker in a row are joined by an empty line; what follows the last answer is left off, since it
    carries no loss.

    >>> to_conversation({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca")
    [{'role': 'user', 'content': 'Add.', 'input': '1 2'}, {'role': 'assistant', 'content': '3'}]

    Raises:
        Unusable: `no_assistant_turn`, `empty_answer`, `empty_prompt`, `not_text`, `not_a_dialogue`, `unknown_role`.
    """
    conversation: list[Message] = []
    for message in FORMATS[fmt].to_messages(row):
        if conversation and conversation[-1]["role"] == message["role"]:
            message = _joined(conversation.pop(), message)
        conversation.append(message)
    while conversation and conversation[-1]["role"] != "assistant":
        conversation.pop()
    if not conversation:
        raise Unusable("no_assistant_turn")
    if any(m["role"] == "assistant" and not m["content"] for m in conversation):
        raise Unusable("empty_answer")
    if not any(m["role"] == "user" and (m["content"] or m.get("input") or m.get("context")) for m in conversation):
        raise Unusable("empty_prompt")
    return conversation


def _joined(first: Message, second: Message) -> Message:
    """Two turns of one speaker as one. Where one of two answers is not to be trained, neither is."""
    joined = {**first, **second}
    for key in ("content", "input", "context"):
        if key in joined:
            joined[key] = "\n\n".join(text for text in (first.get(key), second.get(key)) if text)
    return joined


# --------------------------------------------------------------------------------------------------------------------
# Sources: where the named data sets live
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One named data set.

    Args:
        format: a key of `FORMATS`.
        licence: an SPDX name, or the publisher's words.
        hub: the Hub id of the data set, or
        url: where its file is fetched from, or
        path: its file in this package.
        files: files inside the Hub repository for each split; None leaves the choice to the `datasets` library.
        homepage: where to read about it.
    """

    format: str
    licence: str
    homepage: str
    hub: str | None = None
    url: str | None = None
    path: Path | None = None
    files: Mapping[str, list[str]] | None = field(default=None)


QUICKSTART = Path(__file__).with_name("quickstart")  # the bundled rows, and a tokenizer trained on them
_HH_FOLDERS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
_BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"

SOURCES: dict[str, Source] = {
    # 15,011 rows written by Databricks employees, in eight categories; some carry a passage to read (context).
    "dolly-15k": Source(
        format="dolly",
        licence="CC-BY-SA-3.0",
        homepage="https://huggingface.co/datasets/databricks/databricks-dolly-15k",
        hub="databricks/databricks-dolly-15k",
    ),
    # 52,002 rows: Alpaca's instructions, answered by GPT-4.
    "alpaca-gpt4": Source(
        format="alpaca",
        licence="CC-BY-NC-4.0",
        homepage="https://huggingface.co/datasets/vicgalle/alpaca-gpt4",
        hub="vicgalle/alpaca-gpt4",
    ),
    # 52,002 rows: Stanford's instructions, answered by text-davinci-003.
    "alpaca": Source(
        format="alpaca",
        licence="CC-BY-NC-4.0",
        homepage="https://huggingface.co/datasets/tatsu-lab/alpaca",
        hub="tatsu-lab/alpaca",
    ),
    # About 161,000 dialogues with a preferred last answer. `red-team-attempts` has other columns and is left out.
    "hh-rlhf": Source(
        format="hh",
        licence="MIT",
        homepage="https://huggingface.co/datasets/Anthropic/hh-rlhf",
        hub="Anthropic/hh-rlhf",
        files={split: [f"{folder}/{split}.jsonl.gz" for folder in _HH_FOLDERS] for split in ("train", "test")},
    ),
    # 517,982 conversations with system prompts: the part of OpenOrca whose answers GPT-4 judged right.
    "slim-orca": Source(
        format="sharegpt",
        licence="MIT",
        homepage="https://huggingface.co/datasets/Open-Orca/SlimOrca",
        hub="Open-Orca/SlimOrca",
    ),
    # 1,100 rows from chapter 7 of "Build a Large Language Model (From Scratch)" by Sebastian Raschka.
    "llms-from-scratch": Source(
        format="alpaca",
        licence="Apache-2.0",
        homepage="https://github.com/rasbt/LLMs-from-scratch",
        url=_BOOK,
    ),
    # 2,822 rows made by `scripts/quickstart_data.py`: no network, learned from scratch in minutes on two CPU cores.
    "quickstart": Source(
        format="alpaca",
        licence="Apache-2.0",
        homepage="scripts/quickstart_data.py",
        path=QUICKSTART / "rows.jsonl",
    ),
}
