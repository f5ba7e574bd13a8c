"""`instructft chat`: a conversation in the terminal, or in a pipe."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from instructft.errors import InstructftError
from instructft.inference.chat import Chat
from instructft.inference.terminal_commands import LEAVE, Commands


def converse(chat: Chat, name: str, base: str = "start") -> None:
    """Read turns until the end of the input, and answer each as it is generated.

    Args:
        name: the model as it was named: `/compare` finds there what it began from.
        base: the model that `/compare` asks; `start` is what the run began from.

    >>> converse(Chat("runs/quickstart"), "quickstart")  # with `What is the capital of France?` on stdin
    The capital of France is Paris.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        _say(f"{name} · /help lists the commands, /quit leaves")
    commands = Commands(chat, name, base, _say, lambda ask: _answer(chat, ask, terminal))
    for text in _turns(terminal):
        try:
            if text.startswith("/"):
                if commands.carry_out(text) is LEAVE:
                    return
            else:
                _answer(chat, partial(chat.stream, text), terminal)
        except InstructftError as error:  # also of a base that cannot be loaded; the conversation goes on
            _say(f"({error})")
        except KeyboardInterrupt:
            if not terminal:
                raise
            _say("(stopped)")


def _turns(terminal: bool) -> Iterator[str]:
    """Lines that are not empty: from a prompt with history and editing, or from a pipe."""
    read: Callable[[], str] = sys.stdin.readline
    if terminal:
        from prompt_toolkit import PromptSession

        session: PromptSession[str] = PromptSession()
        read = lambda: session.prompt("> ") + "\n"  # noqa: E731
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if not terminal:
                raise
            _say("(Ctrl-D or /quit leaves)")
            continue
        except EOFError:
            return
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(chat: Chat, ask: Callable[[threading.Event], Iterator[str]], terminal: bool) -> None:
    """Show an answer as it comes, and say where it was cut off."""
    before, stopped = chat.left, threading.Event()
    pieces: Any = ask(stopped)  # a generator, whose return value is the finish reason
    if chat.left > before:
        _say(f"(the context is full: the oldest {chat.left - before} turns have left it)")
    said, reason = False, None

    def noting() -> Iterator[str]:
        nonlocal reason
        reason = yield from pieces

    with _interrupting(stopped) if terminal else nullcontext():
        for piece in noting():
            said = True
            print(piece, end="", flush=True)
    note = "(stopped)" if stopped.is_set() else "" if said else "(no answer)"
    if terminal and said and not note and reason == "length":
        note = "(cut off; /max allows more tokens)"
    _say(f" {note}" if said and note else note)


@contextmanager
def _interrupting(stopped: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `stopped` and does nothing else, however often and whenever it comes.

    An exception would arrive anywhere, in the middle of a model's step or while the answer is put into the history.
    """
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(text, flush=True)
