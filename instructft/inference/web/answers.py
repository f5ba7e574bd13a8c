"""Answers of the chat page, and what is kept of a conversation: in memory, in the browser, as a row to train on.

The model never reads what the page shows: the exact turns stand here, and all that is shown is made from them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from instructft.errors import InstructftError
from instructft.inference.chat import Chat
from instructft.inference.generator import MAX_NEW_TOKENS, Generator
from instructft.inference.reference_model import START, ReferenceModel
from instructft.prompt.conversation import Message
from instructft.prompt.token_view import visible

PACE = 0.05  # seconds between two looks at an answer: a page cannot draw more
_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`))", re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """How to answer; the defaults are those of `instructft chat`."""

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class Answer:
    """What a model said to a question, as the model said it; one without text is no part of the conversation."""

    text: str = ""
    whole: bool = False  # it came to its own end: neither cut off nor stopped
    left: int = 0  # messages that did not fit into the context with it
    notes: tuple[str, ...] = ()  # what is to be said beside it


@dataclass(frozen=True)
class Turn:
    """A question, the answer, and what the model that it is compared with answered, if it was asked."""

    question: str = ""
    answer: Answer = Answer()
    base: Answer | None = None

    @property
    def of_base(self) -> Answer:
        """What the other model reads as its answer: its own, or where it was not asked that of the first model."""
        return self.base or self.answer


# --------------------------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------------------------


def reply(
    generator: Generator,
    turns: Sequence[Turn],
    question: str,
    settings: Settings,
    reference: ReferenceModel | None = None,
) -> Iterator[Turn]:
    """Answer a question, and with `reference` ask that model the same: the turn, as it grows.

    Each of the two reads its own answers. What goes wrong is said beside the answer; the conversation goes on.
    """
    turn = Turn(question)
    for answer in _answers(generator, [(t.question, t.answer.text) for t in turns], question, settings):
        turn = replace(turn, answer=answer)
        yield turn
    if reference is None:
        return
    yield replace(turn, base=Answer(notes=(f"{name_of(reference)} is asked …",)))  # it may have to be loaded
    try:
        with reference.answering() as base:
            for answer in _answers(base, [(t.question, t.of_base.text) for t in turns], question, settings):
                yield replace(turn, base=answer)
    except InstructftError as error:
        yield replace(turn, base=Answer(notes=(f"{error}.",)))


def name_of(reference: ReferenceModel) -> str:
    """The model that is compared with, as the page calls it."""
    return "What it began from" if reference.base == START else visible(reference.base)


def _answers(
    generator: Generator, said: Sequence[tuple[str, str]], question: str, settings: Settings
) -> Iterator[Answer]:
    answer = Answer()
    try:
        chat = Chat(
            generator,
            system=settings.system.strip() or None,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        for asked, answered in said:
            if answered:
                chat.turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        pieces = chat.stream(question)
        answer = Answer(left=chat.left)
        for text in _growing(pieces):
            answer = replace(answer, text=text.strip())
            yield answer
        if not answer.text:
            answer = replace(answer, notes=("No answer: it is no part of the conversation.",))
        elif chat.finish_reason == "length":
            answer = replace(answer, notes=("Cut off: the settings allow more tokens.",))
        answer = replace(answer, whole=chat.finish_reason == "stop")
    except InstructftError as error:
        answer = replace(answer, notes=(f"{error}.",))
    yield answer


def _growing(pieces: Iterator[str]) -> Iterator[str]:
    text, shown = "", 0.0
    with closing(pieces):  # type: ignore[type-var]  # a generator: left early, it ends the model's work
        for piece in pieces:
            text += piece
            if time.monotonic() - shown >= PACE:
                shown = time.monotonic()
                yield text
    yield text


# --------------------------------------------------------------------------------------------------------------------
# What the page shows
# --------------------------------------------------------------------------------------------------------------------


def drawn(turn: Turn, before: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages that show the answer of a turn."""
    return _drawn(turn.answer, max((earlier.answer.left for earlier in before), default=0))


def all_drawn(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages that show a conversation."""
    messages = []
    for i, turn in enumerate(turns):
        messages += [_asked(turn), *drawn(turn, turns[:i])]
    return messages


def base_drawn(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages that show the same conversation with the model that it is compared with."""
    messages, left = [], 0
    for turn in turns:
        messages.append(_asked(turn))
        if turn.base is None:
            messages.append(_note("It was not asked, and reads the other answer."))
        else:
            messages += _drawn(turn.base, left)
            left = max(left, turn.base.left)
    return messages


def _asked(turn: Turn) -> dict[str, Any]:
    return {"role": "user", "content": turn.question}


def _drawn(answer: Answer, left: int) -> list[dict[str, Any]]:
    shown = []
    if answer.left > left:
        shown.append(_note(f"The context is full: the oldest {answer.left} turns have left it."))
    if answer.text:
        # as a text part: Gradio takes the indentation off a plain string
        shown.append({"role": "assistant", "content": [{"type": "text", "text": markdown(answer.text)}]})
    return [*shown, *map(_note, answer.notes)]


def _note(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "metadata": {"title": visible(text)}}


def markdown(text: str) -> str:
    r"""Markdown that draws no HTML and no picture; what stands in code is left as it is, so that it can be copied.

    >>> markdown("**<b>** `<b>` ![x](http://y)")
    '**&lt;b>** `<b>` !\\[x](http://y)'
    """
    parts = _CODE.split(visible(text))
    for i in range(0, len(parts), 3):
        parts[i] = parts[i].replace("&", "&amp;").replace("<", "&lt;").replace("![", "!\\[")
    return "".join(part for i, part in enumerate(parts) if i % 3 < 2 and part)


# --------------------------------------------------------------------------------------------------------------------
# What is kept
# --------------------------------------------------------------------------------------------------------------------


def row(turns: Sequence[Turn], system: str = "") -> str:
    """The conversation as a line of JSON to train on; "" where there is none.

    An answer that is not whole carries `weight` 0: learned, it would teach to stop in the middle.

    >>> row([Turn("Hi", Answer("Hello!", whole=True))])
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}\\n'
    """
    messages: list[Message] = []
    for turn in turns:
        if turn.answer.text:
            answer: Message = {"role": "assistant", "content": turn.answer.text}
            messages += [
                {"role": "user", "content": turn.question},
                answer if turn.answer.whole else {**answer, "weight": 0},
            ]
    first: list[Message] = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return json.dumps({"messages": [*first, *messages]}, ensure_ascii=False) + "\n" if messages else ""


def to_json(turns: Sequence[Turn], settings: Settings, compare: bool) -> str:
    """What the browser keeps of a conversation while its tab is open."""
    return json.dumps({"turns": [asdict(turn) for turn in turns], "settings": asdict(settings), "compare": compare})


def from_json(text: str | None) -> tuple[list[Turn], Settings, bool] | None:
    """What `to_json` wrote; None for anything else, for a browser's store can hold what anybody wrote there."""
    try:
        kept = json.loads(text or "")
        turns = [
            Turn(str(t["question"]), _answer(t["answer"]), None if t["base"] is None else _answer(t["base"]))
            for t in kept["turns"]
        ]
        given = kept["settings"]
        settings = Settings(
            str(given["system"]), float(given["temperature"]), float(given["top_p"]), int(given["max_new_tokens"])
        )
        return turns, settings, bool(kept["compare"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _answer(kept: Any) -> Answer:
    return Answer(str(kept["text"]), bool(kept["whole"]), int(kept["left"]), tuple(map(str, kept["notes"])))
