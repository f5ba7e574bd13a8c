"""`instructft chat`: a conversation in the terminal, or in a pipe, and its commands.

What a model writes is shown, never obeyed: its control characters are printed as signs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from instructft.errors import InstructftError, ModelFileError, UsageError
from instructft.formatting import short
from instructft.inference.chat import Chat
from instructft.inference.reference_model import ReferenceModel, check_base
from instructft.prompt.token_view import visible

HELP = """\
/help               this list
/reset              forget the conversation
/undo               take the last question and its answer back
/retry              answer the last question again
/system TEXT        set the system prompt (no TEXT: take it away) and start over
/temperature T      0 is greedy; /temp is the same
/top_p P            of the likeliest tokens that make up this share one is drawn
/max N              tokens in an answer, at most
/base MODEL         what /compare asks; start: what the model was trained from
/compare [TEXT]     what the model was trained from answers, and what this one does; no TEXT: to the last question
/save FILE.jsonl    the conversation as a row to train on
/plain              answers as they stand, or again with their Markdown drawn
/quit               leave; /exit and Ctrl-D are the same
Ctrl-C stops an answer; the up arrow brings earlier lines back, also those of other days. A line that ends in \\ goes
on in the next one, as Alt-Enter does; what is pasted may have several lines."""

LEAVE = object()  # what a command returns when it is time to leave

Ask = Callable[[threading.Event], Iterator[str]]


def converse(chat: Chat, name: str, base: str = "start", plain: bool = False) -> None:
    """Read turns until the end of the input, and answer each as it is generated.

    Args:
        name: the model as it was named: `/compare` finds there what it began from.
        base: the model that `/compare` asks; `start` is what the run began from.
        plain: show answers as they stand, without drawing their Markdown.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        _say(f"{name} · /help lists the commands, /quit leaves")
    commands = Commands(chat, name, base, _say, lambda ask: _answer(chat, ask, terminal, commands.plain), plain)
    for text in _turns(terminal):
        try:
            if text.startswith("/"):
                if commands.carry_out(text) is LEAVE:
                    return
            else:
                _answer(chat, partial(chat.stream, text), terminal, commands.plain)
        except InstructftError as error:  # also of a base that cannot be loaded; the conversation goes on
            if isinstance(error, ModelFileError) and not terminal and not text.startswith("/"):
                raise  # nobody is there to ask something else
            _say(f"({error})")
        except KeyboardInterrupt:
            if not terminal:
                raise
            _say("(stopped)")


def _turns(terminal: bool) -> Iterator[str]:
    """Turns that are not empty: from a prompt with history and editing, or the lines of a pipe."""
    read: Callable[[], str] = sys.stdin.readline
    if terminal:
        read = _prompt()
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # what is no UTF-8 is asked with a sign in its place
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
            yield as_text(line.strip())


def as_text(typed: str) -> str:
    """What was typed, as text that can be encoded: half a character, or a byte that is none, becomes a sign for it.

    >>> as_text("Caf\\udce9?")
    'Caf\ufffd?'
    """
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _prompt() -> Callable[[], str]:
    """Reads one turn from the terminal, which may have several lines; earlier ones come back with the arrow up."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # typed ahead of the prompt, while the terminal makes a line feed of Enter
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    place = history_file()
    history: History = FileHistory(str(place)) if place else InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=history, key_bindings=keys, multiline=True, prompt_continuation="  "
    )
    return lambda: session.prompt("> ") + "\n"


def history_file() -> Path | None:
    """Where lines that were typed are kept from one chat to the next, for this user's eyes alone; None: nowhere.

    `INSTRUCTFT_HISTORY` names another file, or none where it is empty.
    """
    named = os.environ.get("INSTRUCTFT_HISTORY")
    if named == "":
        return None
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    place = Path(named or f"{state}/instructft/chat-history").expanduser()
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(place, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
        place.chmod(0o600)
    except OSError:  # a home that cannot be written is no reason not to talk
        return None
    return place


def _answer(chat: Chat, ask: Ask, terminal: bool, plain: bool = True) -> None:
    """Show an answer as it comes, and say where it was cut off."""
    before, stopped = chat.left, threading.Event()
    pieces: Any = ask(stopped)  # a generator, whose return value is the finish reason
    if chat.left > before:
        _say(f"(the context is full: the oldest {chat.left - before} turns have left it)")
    said, reason = False, None
    show: Callable[[str], None] = partial(print, end="", flush=True)
    drawn = Drawn() if terminal and not plain else None

    def noting() -> Iterator[str]:
        nonlocal reason
        reason = yield from pieces

    with _interrupting(stopped) if terminal else nullcontext():
        for piece in noting():
            said = True
            (drawn.add if drawn else show)(visible(piece))
    if drawn:
        drawn.close()
    note = "(stopped)" if stopped.is_set() else "" if said else "(no answer)"
    if terminal and said and not note and reason == "length":
        full = chat.room <= chat.max_new_tokens
        context = f"the context of {chat.generator.context:,} tokens is full; /reset begins anew"
        note = f"(cut off: {context})" if full else "(cut off; /max allows more tokens)"
    _say(f" {note}" if said and note else note)


_MARKS = re.compile(r"^ {0,3}(#{1,6} |[-*+] |\d+[.)] |>|```|~~~|\|)|\*\*\S|__\S|`[^`]+`|\[[^\]]+\]\(", re.MULTILINE)


class Drawn:
    """An answer whose Markdown is drawn, block by block: each is shown as it comes, and drawn anew when it is whole.

    A block that holds no Markdown stays as it came; so does one that is higher than the window.
    """

    def __init__(self, console: Any = None):
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self.block = ""  # what was shown since the last one that is whole

    def add(self, text: str) -> None:
        """Show more of the answer."""
        self.block += text
        self._write(text)
        while (end := self._end()) is not None:
            rest = self.block[end:]
            self._draw(self.block[:end], rest)
            self.block = rest

    def close(self) -> None:
        """Draw what is left."""
        self._draw(self.block, "")
        self.block = ""

    def _end(self) -> int | None:
        """Where the first whole block ends, behind its empty line; a fence holds empty lines of its own."""
        fence, at = "", 0
        for line in self.block.splitlines(keepends=True):
            mark = line.strip()[:3]
            if mark in ("```", "~~~") and (not fence or fence == mark):
                fence = "" if fence else mark
            at += len(line)
            if not line.strip() and not fence and self.block[:at].strip() and line.endswith("\n"):
                return at
        return None

    def _draw(self, block: str, rest: str) -> None:
        from rich.cells import cell_len

        shown = block + rest
        width, height = self.console.size
        rows = sum(max(1, -(-cell_len(line.expandtabs(8)) // width)) for line in shown.split("\n")) - 1
        if not _MARKS.search(block) or rows >= height - 1:
            return
        self._write((f"\x1b[{rows}A" if rows else "") + "\r\x1b[J")
        self.console.print(markdown(block.strip("\n")))
        trailing = block.endswith("\n")
        self._write("\n" + rest if trailing and rest else "\n" if trailing else "")

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()


def markdown(text: str) -> Any:
    """Text as rich draws Markdown; tags stay as they were written, and so do the ends of lines."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    found = Markdown(text, hyperlinks=False)
    found.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    for token in found.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return found


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
    print(visible(text), flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Commands: each takes one line, and answers with one
# --------------------------------------------------------------------------------------------------------------------


class Commands:
    """What can be done with a conversation besides talking.

    Args:
        name: the model as it was named; what it began from is found there.
        base: the model that `/compare` asks.
        say: prints a line.
        show: prints an answer as it comes, and lets it be stopped.
        plain: answers are shown as they stand; `/plain` changes it.
    """

    def __init__(
        self,
        chat: Chat,
        name: str,
        base: str,
        say: Callable[[str], None],
        show: Callable[[Ask], None],
        plain: bool = False,
    ):
        self.chat, self.name, self.base, self.say, self.show = chat, name, base, say, show
        self.plain = plain
        self._reference: ReferenceModel | None = None
        self._all: dict[str, Callable[[str], object]] = {
            "/help": lambda _: say(HELP),
            "/reset": self._reset,
            "/undo": self._undo,
            "/retry": self._retry,
            "/system": self._system,
            "/temperature": self._temperature,
            "/temp": self._temperature,
            "/top_p": self._top_p,
            "/top-p": self._top_p,
            "/max": self._max,
            "/max_new_tokens": self._max,
            "/max-new-tokens": self._max,
            "/base": self._base,
            "/plain": self._plain,
            "/compare": self._compare,
            "/save": self._save,
            "/exit": lambda _: LEAVE,
            "/quit": lambda _: LEAVE,
        }

    def carry_out(self, text: str) -> object:
        """Carry out a command; `LEAVE` when it is time to leave.

        Raises:
            InstructftError: it cannot be done; the conversation is as it was.
        """
        word, _, rest = text.partition(" ")
        command = self._all.get(word)
        if command is None:
            self.say(f"({word} is unknown; /help lists the commands)")
            return None
        return command(rest.strip())

    def _reset(self, _: str) -> None:
        self.chat.reset()
        self.say("(a new conversation)")

    def _undo(self, _: str) -> None:
        question = self.chat.undo()
        self.say("(there is nothing to take back)" if question is None else f"(taken back: {short(question, 60)})")

    def _retry(self, _: str) -> None:
        if self.chat.turns and not self.chat.temperature:
            self.say("(temperature 0 gives the same answer again; /temp 0.7 varies it)")
        self.show(self.chat.retry)

    def _system(self, text: str) -> None:
        self.chat.system = text or None
        self.chat.reset()
        self.say("(system prompt set; a new conversation)" if text else "(no system prompt; a new conversation)")

    def _temperature(self, text: str) -> None:
        value = _number(text)
        if value is None or not 0 <= value <= 10:
            self.say(f"(/temperature takes a number from 0 to 10, not {text or 'nothing'})")
            return
        self.chat.temperature = value
        self.say(f"(temperature {value:g})")

    def _top_p(self, text: str) -> None:
        value = _number(text)
        if value is None or not 0 < value <= 1:
            self.say(f"(/top_p takes a number above 0 and up to 1, not {text or 'nothing'})")
            return
        self.chat.top_p = value
        self.say(f"(top_p {value:g})" if self.chat.temperature else f"(top_p {value:g}, once /temp is above 0)")

    def _max(self, text: str) -> None:
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            self.say(f"(/max takes a number of tokens, 1 or more, not {text or 'nothing'})")
            return
        self.chat.max_new_tokens = int(text)
        self.say(f"(at most {int(text)} tokens in an answer)")

    def _base(self, text: str) -> None:
        if text:
            check_base(self.name, text)
            self.base, self._reference = text, None
        self.say(f"(/compare asks {self.base})")

    def _plain(self, _: str) -> None:
        self.plain = not self.plain
        self.say("(answers as they stand)" if self.plain else "(answers with their Markdown drawn)")

    def _compare(self, text: str) -> None:
        """The base is asked what this model was asked: the same conversation, up to the last question."""
        chat = self.chat
        if not text and not chat.turns:
            self.say("(/compare takes a question, or comes after one)")
            return
        if self._reference is None:
            self._reference = ReferenceModel.of(self.name, self.base, chat.generator)
        if text:
            self.say("tuned:")
            before = chat.turns
            self.show(lambda stopped: chat.stream(text, stopped))
            if chat.turns == before:  # no answer: there is no turn of it to ask the base
                history = [*chat.messages, {"role": "user", "content": text}]
            else:
                history = chat.messages[:-1]
        else:
            history = chat.messages[:-1]
            self.say(f"tuned:\n{chat.turns[-1]['content']}")
        self.say("base:")
        settings = (chat.max_new_tokens, chat.temperature, chat.top_p)
        with self._reference.answering() as base:
            self.show(lambda stopped: base.stream(history, *settings, stopped))

    def _save(self, text: str) -> None:
        if not text.endswith(".jsonl"):
            self.say(f"(/save takes a file name that ends in .jsonl, not {text or 'nothing'})")
            return
        if not self.chat.turns:
            self.say("(there is no conversation to save)")
            return
        path = Path(text).expanduser()
        try:
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"messages": self.chat.conversation}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise UsageError(f"{path} exists already; name another file") from None
        except OSError as error:
            raise UsageError(f"{path} could not be written: {error.strerror}") from error
        self.say(f"(saved to {path})")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
