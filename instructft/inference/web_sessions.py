"""What stands behind the chat page: one conversation a browser tab, one answer at a time, stopped when asked to.

Nothing here knows of the page: a `Talk` is asked, and yields what there is to see after each piece of an answer.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from instructft.errors import InstructftError
from instructft.inference.chat import Chat, Generator
from instructft.inference.generator import MAX_NEW_TOKENS, check_settings
from instructft.inference.reference_model import Beside
from instructft.prompt.render import Message

PACE = 0.05  # seconds between two looks at an answer: a page cannot draw more
MOST_TALKS = 500  # tabs; the one that was quiet for longest is forgotten
LEFT = "The turns above have left the model's context."


@dataclass(frozen=True)
class Settings:
    """How to answer; the defaults are those of `instructft chat`."""

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class Seen:
    """What there is to see: both conversations, a notice, and a question that goes back to who asked it."""

    tuned: list[Message]
    base: list[Message]
    notice: str = ""
    back: str = ""


@dataclass
class _Side:
    """One model's conversation, with the turns that have left its context and are still to be read."""

    name: str
    chat: Chat
    gone: list[Message] = field(default_factory=list)

    def seen(self, more: list[Message] | None = None) -> list[Message]:
        left: list[Message] = [*self.gone, {"role": "note", "content": LEFT}] if self.gone else []
        return [*left, *self.chat.turns, *(more or [])]

    def drop_last(self) -> str | None:
        """Take the last question and its answer away; the question."""
        if not self.chat.turns:
            return None
        question = str(self.chat.turns[-2]["content"])
        self.chat.turns = self.chat.turns[:-2]
        return question


class Talk:
    """The conversation of one tab."""

    def __init__(self, generator: Generator):
        self.generator = generator
        self.tuned, self.base = _Side("tuned", Chat(generator)), _Side("base", Chat(generator))
        self.comparing = False
        self.stopped = threading.Event()
        self.busy = threading.Lock()  # held while a question of this tab waits or is answered

    def seen(self, notice: str = "", back: str = "") -> Seen:
        """What there is to see now."""
        return Seen(self.tuned.seen(), self.base.seen() if self.comparing else [], notice, back)

    def reset(self) -> None:
        """Forget all turns, and end an answer that is being made."""
        self.stopped.set()
        # new ones: an answer that is being made is written into the old
        self.tuned, self.base = _Side("tuned", Chat(self.generator)), _Side("base", Chat(self.generator))

    def undo(self) -> str:
        """Take back the last question with its answers; returns the question, "" where there is none."""
        question = self.tuned.drop_last()
        if self.comparing and self.base.chat.turns and self.base.chat.turns[-2]["content"] == question:
            self.base.drop_last()
        return question or ""


class Desk:
    """The model, the one beside it, and every tab's conversation; answers one question after the other.

    >>> desk = Desk(Generator(model, tokenizer))
    >>> [seen.tuned[-1]["content"] for seen in desk.answer("tab 1", "What is the capital of France?", Settings())][-1]
    'The capital of France is Paris.'
    """

    def __init__(self, generator: Generator, beside: Beside | None = None):
        self.generator, self.beside = generator, beside
        self._turn = threading.Lock()  # a plain lock: a page's handler may go on in another thread
        self._talks: OrderedDict[str, Talk] = OrderedDict()
        self._table = threading.Lock()

    def talk(self, tab: str) -> Talk:
        """The conversation of a tab; a new one where it is not known."""
        with self._table:
            talk = self._talks.setdefault(tab, Talk(self.generator))
            self._talks.move_to_end(tab)
            for old in [name for name, other in self._talks.items() if not other.busy.locked()]:
                if len(self._talks) <= MOST_TALKS:
                    break
                del self._talks[old]
            return talk

    def forget(self, tab: str) -> None:
        """The tab was closed: end its answer and drop its conversation."""
        with self._table:
            talk = self._talks.pop(tab, None)
        if talk:
            talk.stopped.set()

    def stop(self, tab: str) -> None:
        """End the answer of a tab where it is, or before it begins; what there is of it stays."""
        self.talk(tab).stopped.set()

    def answer(self, tab: str, question: str, settings: Settings, compare: bool = False) -> Iterator[Seen]:
        """Ask the model, and with `compare` then the one beside it; yields what there is to see as it grows.

        A tab that asks while it is being answered is told so. What goes wrong on the way is a notice, not an error.
        """
        talk, question = self.talk(tab), question.strip()
        if not question:
            yield talk.seen()
            return
        if not talk.busy.acquire(blocking=False):
            yield talk.seen("One question at a time: the last one is still being answered.", back=question)
            return
        try:
            talk.stopped.clear()
            yield from self._in_turn(talk, question, settings, compare and self.beside is not None)
        finally:
            talk.busy.release()

    def _in_turn(self, talk: Talk, question: str, settings: Settings, compare: bool) -> Iterator[Seen]:
        asked: list[Message] = [{"role": "user", "content": question}]
        if compare and not talk.comparing:  # from here on each model goes on with its own answers
            talk.base.chat.turns, talk.base.gone = list(talk.tuned.chat.turns), list(talk.tuned.gone)
        talk.comparing = compare
        yield Seen(talk.tuned.seen(asked), talk.base.seen(asked) if compare else [])
        waited = False
        while not self._turn.acquire(timeout=0.2):
            if talk.stopped.is_set():
                yield talk.seen("Stopped before it was answered.", back=question)
                return
            if not waited:
                waited = True
                seen = Seen(talk.tuned.seen(asked), talk.base.seen(asked) if compare else [])
                yield Seen(seen.tuned, seen.base, "Waiting: the model is answering somebody else.")
        try:
            yield from self._both(talk, question, settings, compare)
        finally:
            self._turn.release()

    def _both(self, talk: Talk, question: str, settings: Settings, compare: bool) -> Iterator[Seen]:
        notices: list[str] = []
        asked: list[Message] = [{"role": "user", "content": question}]
        sides: list[tuple[_Side, AbstractContextManager[Generator]]] = [(talk.tuned, nullcontext(self.generator))]
        if compare and self.beside is not None:
            sides.append((talk.base, self.beside.answering()))
        answered = False
        for side, opened in sides:
            if talk.stopped.is_set():
                break
            first = side.name == "tuned"
            if not first:  # it may have to be loaded
                yield Seen(talk.tuned.seen(), side.seen(asked), " ".join([*notices, "The other model is asked …"]))
            try:
                with opened as generator:
                    side.chat.generator = generator
                    for answer in self._one(talk, side, question, settings, notices):
                        if talk.stopped.is_set():  # and perhaps forgotten
                            continue
                        answered = True
                        shown, notice = side.seen([*asked, {"role": "assistant", "content": answer}]), " ".join(notices)
                        other = talk.base.seen(asked) if compare else []
                        yield Seen(shown, other, notice) if first else Seen(talk.tuned.seen(), shown, notice)
            except InstructftError as error:
                notices.append(f"{side.name}: {error}." if compare else f"{error}.")
        if talk.stopped.is_set():
            notices.append("Stopped.")
        yield talk.seen(" ".join(notices), back="" if answered else question)

    def _one(self, talk: Talk, side: _Side, question: str, settings: Settings, notices: list[str]) -> Iterator[str]:
        """The answer of one model as far as it is there; turns that leave the context are told of in `notices`."""
        chat = side.chat
        check_settings(settings.max_new_tokens, settings.temperature, settings.top_p)
        chat.system, chat.temperature, chat.top_p = (
            settings.system.strip() or None,
            settings.temperature,
            settings.top_p,
        )
        chat.max_new_tokens = settings.max_new_tokens
        before = list(chat.turns)
        pieces = chat.stream(question, talk.stopped)
        if left := len(before) - len(chat.turns):
            side.gone += before[:left]
            full = f"The context is full: the oldest {left} turns have left it."
            notices += [full] if full not in notices else []
        answer, looked = "", 0.0
        for piece in pieces:
            answer += piece
            if time.monotonic() - looked >= PACE:
                looked = time.monotonic()
                yield answer
        if not answer.strip() and not talk.stopped.is_set():
            notices.append("An empty answer: it is no part of the conversation.")
