"""Suites of questions whose answers are judged by rules: those that ship in `suites/`, and files of the same layout.

A line of a suite is a question that says itself how it is judged::

    {"id": "facts-1", "suite": "facts", "messages": [{"role": "user", "content": "What is the capital of France?"}],
     "check": {"contains": ["Paris"]}, "max_new_tokens": 24, "known": true}

`check` is one of `instructft.evaluation.answer_checks`. Of a row that says `known` only that counts which the model
before training knew: several answers that it draws are all right. `suites/further/` holds more questions of some, which
are asked where those before them cannot tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from instructft.errors import DataError, UsageError
from instructft.evaluation.answer_checks import passes, problem
from instructft.formatting import nearest
from instructft.prompt.conversation import Message

FOLDER = Path(__file__).parent / "suites"
KEYS = ("id", "suite", "messages", "check", "max_new_tokens", "known")
MAX_NEW_TOKENS = 64  # of a row that says nothing else
MOST_TOKENS = 2048  # that a row may ask for
MOST_ROWS = 100_000
ROLES = ("system", "user", "assistant")


class Question(NamedTuple):
    """A row of a suite."""

    id: str
    suite: str
    messages: list[Message]  # the last one is the user's
    check: Mapping[str, Any]
    max_new_tokens: int
    known: bool  # counted only where the model before training knew the answer

    def right(self, answer: str) -> bool:
        """Whether an answer is what is asked for."""
        return passes(answer, self.check)


def shipped() -> list[str]:
    """The names of the suites that ship.

    >>> shipped()
    ['arithmetic', 'facts', 'format', 'json', 'memory', 'refusal']
    """
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def further(names: Sequence[str]) -> list[Question]:
    """More questions of the suites that ship among these names; none: of all that ship.

    >>> len(further(["facts"])), len(further(["json"])) > 200
    (0, True)
    """
    paths = [FOLDER / "further" / f"{name}.jsonl" for name in names or shipped() if name in shipped()]
    return [question for path in paths if path.is_file() for question in _rows(path)]


def read_suites(names: Sequence[str]) -> tuple[list[Question], list[str]]:
    """The questions of suites and files, and the names that are neither: tasks of another tool, perhaps.

    Args:
        names: of suites that ship, or paths of `.jsonl` files; none: all that ship.

    Raises:
        UsageError: a file that is not there, or the same suite twice.
        DataError: a row that cannot be used; names the file and its line.
    """
    questions: list[Question] = []
    others: list[str] = []
    for name in names or shipped():
        path = FOLDER / f"{name}.jsonl" if name in shipped() else Path(name).expanduser()
        if path.suffix != ".jsonl":
            if path.exists() or path.suffix or "/" in name:
                raise UsageError(
                    f"--suite: {name} is no .jsonl file; a suite has a question with its check on each line"
                )
            if meant := nearest(name, shipped(), cutoff=0.75):
                raise UsageError(f"--suite: there is no suite {name}{meant}")
            others.append(name)
            continue
        if not path.is_file():
            raise UsageError(f"--suite: there is no file {name}{nearest(Path(name).stem, shipped())}")
        found = list(_rows(path))
        if not found:
            raise DataError(f"--suite: {name} is empty")
        if both := {one.suite for one in found} & {one.suite for one in questions}:
            raise UsageError(f"--suite: {name} holds {min(both)}, which another one holds too; name each once")
        questions += found
    return questions, others


def _rows(path: Path) -> Iterator[Question]:
    ids: dict[str, int] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"--suite: {path.name}, line {number}"
            if number > MOST_ROWS:
                raise DataError(f"{where}: expected at most {MOST_ROWS:,} rows")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is no JSON ({error})") from error
            question = _question(row, path.stem, number, where)
            if (first := ids.setdefault(question.id, number)) != number:
                raise DataError(f"{where}: id {question.id} stands in line {first} already")
            yield question


def _question(row: Any, stem: str, number: int, where: str) -> Question:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {row!r}, expected an object with messages and check")
    if unknown := [key for key in row if key not in KEYS]:
        raise DataError(f"{where}: unknown key {unknown[0]}{nearest(unknown[0], KEYS)}; known are {', '.join(KEYS)}")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(_is_message(one) for one in messages):
        raise DataError(
            f'{where}: messages: expected a list of {{"role": …, "content": …}} with roles {", ".join(ROLES)}'
        )
    if messages[-1]["role"] != "user":
        raise DataError(f"{where}: messages: the last one is of the {messages[-1]['role']}, expected the user's")
    if wrong := problem(row.get("check")):
        raise DataError(f"{where}: check: {wrong}")
    tokens, known = row.get("max_new_tokens", MAX_NEW_TOKENS), row.get("known", False)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MOST_TOKENS:
        raise DataError(f"{where}: max_new_tokens: found {tokens!r}, expected 1 to {MOST_TOKENS}")
    if not isinstance(known, bool):
        raise DataError(f"{where}: known: found {known!r}, expected true or false")
    name, suite = row.get("id", f"{stem}-{number}"), row.get("suite", stem)
    if not isinstance(name, str) or not isinstance(suite, str) or not suite.strip():
        raise DataError(f"{where}: id and suite are texts; found {name!r} and {suite!r}")
    return Question(name, suite, [dict(one) for one in messages], row["check"], tokens, known)


def _is_message(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and set(one) == {"role", "content"}
        and one["role"] in ROLES
        and isinstance(one["content"], str)
    )
