"""`instructft chat`: a conversation in the terminal, or in a pipe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

from instructft.errors import UsageError
from instructft.generate import Chat

HELP = """\
/help               this list
/reset              forget the conversation
/system TEXT        set the system prompt (no TEXT: take it away) and start over
/temperature T      0 is greedy; /temp is the same
/exit               leave; /quit and Ctrl-D are the same
Ctrl-C stops an answer."""


def converse(chat: Chat, name: str) -> None:
    """Read turns until the end of the input, and answer each as it is generated."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print(f"{name} · /help lists the commands, /exit leaves")
    for text in _turns(terminal):
        try:
            if text.startswith("/"):
                if _command(chat, text):
                    return
            else:
                _answer(chat, text)
        except UsageError as error:
            print(f"({error})")


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
            print("(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            return
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(chat: Chat, text: str) -> None:
    before, stopped = chat.left, threading.Event()
    pieces = chat.stream(text, stopped)
    try:
        for piece in pieces:
            if chat.left > before:
                print(f"(the context is full: the oldest {chat.left - before} turns have left it)")
                before = chat.left
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped.set()
        pieces.close()  # type: ignore[attr-defined]
        print(" (stopped)", end="")
    print()


def _command(chat: Chat, text: str) -> bool:
    """Carry out a command; True when it is time to leave."""
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if word in ("/exit", "/quit"):
        return True
    if word == "/help":
        print(HELP)
    elif word == "/reset":
        chat.reset()
        print("(a new conversation)")
    elif word == "/system":
        chat.system = rest or None
        chat.reset()
        print("(system prompt set; a new conversation)" if rest else "(no system prompt; a new conversation)")
    elif word in ("/temperature", "/temp"):
        try:
            value = float(rest)
            if not 0 <= value <= 10:
                raise ValueError
            chat.temperature = value
            print(f"(temperature {value:g})")
        except ValueError:
            print(f"(/temperature takes a number from 0 to 10, not {rest or 'nothing'})")
    else:
        print(f"({word} is unknown; /help lists the commands)")
    return False
