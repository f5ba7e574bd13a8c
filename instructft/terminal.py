"""`instructft chat`: a conversation in the terminal, or in a pipe."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from instructft.errors import UsageError
from instructft.generate import Chat

HELP = """\
/help               this list
/reset              forget the conversation
/system TEXT        set the system prompt (no TEXT: take it away) and start over
/temperature T      0 is greedy; /temp is the same
/exit               leave; /quit and Ctrl-D are the same
Ctrl-C stops an answer; the up arrow brings earlier lines back."""


def converse(chat: Chat, name: str) -> None:
    """Read turns until the end of the input, and answer each as it is generated.

    >>> converse(Chat("runs/quickstart"), "quickstart")  # with `What is the capital of France?` on stdin
    The capital of France is Paris.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        _say(f"{name} · /help lists the commands, /exit leaves")
    for text in _turns(terminal):
        try:
            if text.startswith("/"):
                if _command(chat, text):
                    return
            else:
                _answer(chat, text, terminal)
        except UsageError as error:
            _say(f"({error})")


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
            _say("(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            return
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(chat: Chat, text: str, terminal: bool) -> None:
    before, stopped = chat.left, threading.Event()
    pieces = chat.stream(text, stopped)
    if chat.left > before:
        _say(f"(the context is full: the oldest {chat.left - before} turns have left it)")
    said = False
    with _interrupting(stopped) if terminal else nullcontext():
        for piece in pieces:
            said = True
            print(piece, end="", flush=True)
    note = "(stopped)" if stopped.is_set() else "" if said else "(no answer)"
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


def _command(chat: Chat, text: str) -> bool:
    """Carry out a command; True when it is time to leave."""
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if word in ("/exit", "/quit"):
        return True
    if word == "/help":
        _say(HELP)
    elif word == "/reset":
        chat.reset()
        _say("(a new conversation)")
    elif word == "/system":
        chat.system = rest or None
        chat.reset()
        _say("(system prompt set; a new conversation)" if rest else "(no system prompt; a new conversation)")
    elif word in ("/temperature", "/temp"):
        try:
            value = float(rest)
            if not 0 <= value <= 10:
                raise ValueError
            chat.temperature = value
            _say(f"(temperature {value:g})")
        except ValueError:
            _say(f"(/temperature takes a number from 0 to 10, not {rest or 'nothing'})")
    else:
        _say(f"({word} is unknown; /help lists the commands)")
    return False
