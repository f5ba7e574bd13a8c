"""The rows of `instructft generate`: read from JSONL, each as it goes out again, with the conversation it asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructft.errors import DataError
from instructft.prompt.render import Message

ADDED = ("response", "finish_reason")
BASE_ADDED = ("base_response", "base_finish_reason")


@dataclass(frozen=True)
class Asked:
    """A row that can be asked.

    Args:
        line: its line in the input, from 1.
        row: as it goes to the output, before the answer is added.
        messages: the conversation to be answered.
    """

    line: int
    row: dict[str, Any]
    messages: list[Message]


@dataclass(frozen=True)
class SetAside:
    """A line that cannot be asked, and why."""

    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}{self.reason}"


def read_rows(source: Path, added: tuple[str, ...] = ADDED) -> tuple[list[Asked], list[SetAside]]:
    """The rows of a JSONL file, and the lines that are none: not JSON, or without a prompt.

    >>> read_rows(Path("questions.jsonl"))  # {"prompt": "Hi"}
    ([Asked(line=1, row={'prompt': 'Hi'}, messages=[{'role': 'user', 'content': 'Hi'}])], [])

    Raises:
        DataError: there is no such file, or not one row in it can be asked.
    """
    if not source.is_file():
        raise DataError(f"--input: there is no file {source}")
    rows: list[Asked] = []
    bad: list[SetAside] = []
    # Not `splitlines`: JSON may hold U+2028 and its like inside a text.
    for number, line in enumerate(source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
            rows.append(Asked(number, _kept(row, added), _asked(row)))
            continue
        except json.JSONDecodeError as error:
            reason = f", column {error.colno}: not JSON: {error.msg}"
        except UnicodeDecodeError as error:
            reason = f": not UTF-8 at byte {error.start + 1}"
        except RecursionError:
            reason = ": nested too deeply"
        except DataError as error:
            reason = f": {error}"
        bad.append(SetAside(number, reason, line.decode("utf-8", errors="replace").rstrip("\r")))
    if not rows:
        raise DataError(f"{source} holds no rows" + (f" that can be asked\n{first_ten(bad)}" if bad else ""))
    return rows, bad


def first_ten(bad: list[SetAside]) -> str:
    """Ten of them, a line each, and how many more there are."""
    more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    return "\n".join(f"  {one}" for one in bad[:10]) + more


def _no_constant(name: str) -> None:
    raise DataError(f"not JSON: {name} is no number there")


def _kept(row: Any, added: tuple[str, ...]) -> dict[str, Any]:
    """The row with names of its own for what the output adds; nothing that came in is written over.

    >>> _kept({"prompt": "Hi", "response": "Hello"}, ADDED)
    {'prompt': 'Hi', 'input_response': 'Hello'}
    """
    if not isinstance(row, dict):
        raise DataError("expected an object with messages, prompt or instruction")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    kept = {}
    for name, value in row.items():
        free = name
        while free in added or (free != name and free in row):
            free = f"input_{free}"
        kept[free] = value
    return kept


def _asked(row: dict[str, Any]) -> list[Message]:
    """The conversation that a row asks to continue."""
    messages = row.get("messages")
    if messages is None:
        for key, extras in (("prompt", ()), ("instruction", ("input", "context"))):
            if isinstance(row.get(key), str) and row[key].strip():
                given = {extra: row[extra] for extra in extras if row.get(extra)}
                messages = [{"role": "user", "content": row[key], **given}]
                break
    if not isinstance(messages, list) or not messages:
        raise DataError("found no prompt; expected messages, prompt, or instruction with optional input or context")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError("a message needs a role and a content, both text")
        if message.get("role") not in ("system", "user", "assistant"):
            raise DataError(f"role {message.get('role')!r} is unknown; expected system, user or assistant")
        for extra in ("input", "context"):
            if not isinstance(message.get(extra, ""), str):
                raise DataError(f"{extra} is not text")
    if messages[-1]["role"] != "user":
        raise DataError("the last message is not the user's, so there is nothing to answer")
    return messages
