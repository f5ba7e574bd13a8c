"""`train.log`: what a run printed, to be read later: whole lines, nothing that moves a cursor, and no secrets.

Above it stand the command line, the host, the date and the commit of the code that was there. It is appended to when a
run is resumed, and it never leaves this machine (`instructft.hub.files`).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from instructft.redaction import environment_secrets, redact, without_secrets
from instructft.version import __version__

NAME = "train.log"
MOST = 64 << 20  # bytes; what prints more than that is not read
_EARLY = 10_000  # lines that are kept until there is a run folder
_TAKEN_BACK = 50  # lines that a moving bar may reach up
_CONTROL = re.compile(
    r"\x1b\[([0-9;?]*)([@-~])"  # moves the cursor, colours, erases
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles and links
    r"|\x1b[@-Z\\^_]|[\x00-\x1f\x7f]"
)
_CUT_OFF = re.compile(r"\x1b(?:\[[0-9;?]*|\][^\x07\x1b]{0,2000})?$")  # a sequence that the next text will end


class TrainLog:
    """Takes what is printed, and writes it to a file once there is one.

    Example::

        log = TrainLog()
        log.stream().feed("loss 1\\rloss 2\\n")
        log.begin(Path("runs/a/train.log"))  # its last line is `loss 2`
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._early: deque[str] = deque(maxlen=_EARLY)
        self._begins: deque[int] = deque(maxlen=_TAKEN_BACK)  # where the last lines begin in the file
        self._room = MOST
        self._streams: list[Stream] = []
        self._secrets = environment_secrets()
        self.lock = threading.RLock()  # uploads print from a thread of their own

    def stream(self) -> Stream:
        """What one stream's text is given to: standard output, standard error."""
        self._streams.append(Stream(self))
        return self._streams[-1]

    def begin(self, path: Path) -> None:
        """Open the file, with a head and what was printed until now.

        Raises:
            OSError: it cannot be written.
        """
        with self.lock:
            self._file = path.open("ab", buffering=0)
            self._room = MOST - path.stat().st_size
            lines, self._early = [*([""] if path.stat().st_size else []), *head(), "", *self._early], deque()
            self.lines(lines)

    def lines(self, texts: Iterable[str]) -> None:
        """Add several lines."""
        for text in texts:
            self.line(text)

    def line(self, text: str) -> None:
        """Add a line.

        Raises:
            OSError: it cannot be written; nothing more is, then.
        """
        with self.lock:
            if self._file is None:
                self._early.append(text)
                return
            content = self._as_kept(text).encode("utf-8", "backslashreplace") + b"\n"
            if self._room <= 0:
                return
            self._room -= len(content)
            if self._room <= 0:
                content = f"[from here on left out: this file has {MOST >> 20} MiB]\n".encode()
            self._begins.append(self._file.tell())
            try:
                self._file.write(content)
            except OSError:
                self.close()
                self._room = 0
                raise

    def _as_kept(self, text: str) -> str:
        text = redact(text)
        for secret in self._secrets:
            text = text.replace(secret, "…")
        if not text.isprintable():
            from instructft.prompt.token_view import visible

            text = visible(text)
        return text

    def take_back(self, lines: int) -> None:
        """Forget the last lines: a bar of several lines is drawn anew above itself."""
        with self.lock:
            for _ in range(lines):
                if self._file is None:
                    if self._early:
                        self._early.pop()
                elif self._begins:
                    self._file.truncate(self._begins.pop())

    def close(self) -> None:
        """Write what ends without a new line, and close the file."""
        with self.lock:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def finish(self) -> None:
        """Close it at the end of a run, with what no new line ended."""
        with self.lock:
            for stream in self._streams:
                stream.end()
            self.close()


class Stream:
    """A stream's text, a line at a time, as a terminal would show it at last."""

    def __init__(self, log: TrainLog):
        self._log, self._line, self._over, self._held = log, "", False, ""

    def feed(self, text: str) -> None:
        """Take the next text; what a carriage return goes back over is replaced."""
        with self._log.lock:
            text, self._held = self._held + text, ""
            if cut := _CUT_OFF.search(text):
                text, self._held = text[: cut.start()], cut[0]
            at = 0
            for found in _CONTROL.finditer(text):
                self._add(text[at : found.start()])
                at = found.end()
                self._control(found)
            self._add(text[at:])

    def end(self) -> None:
        """Give the line that no new line ended."""
        if self._line.strip():
            self._control(re.compile("\n").match("\n"))  # type: ignore[arg-type]

    def _add(self, text: str) -> None:
        if text and self._over:
            self._line, self._over = "", False
        self._line += text

    def _control(self, found: re.Match[str]) -> None:
        what = found[0]
        if what == "\n":
            line, self._line, self._over = self._line, "", False
            self._log.line(line.rstrip(" "))
        elif what == "\r":
            self._over = True
        elif what == "\t":
            self._add(what)
        elif what == "\b":
            self._line = self._line[:-1]
        elif what.startswith("\x1b[") and what.endswith("K"):
            if self._over or what == "\x1b[2K":
                self._line = ""
        elif what.startswith("\x1b[") and what.endswith(("A", "F")):
            self._line = ""
            number = what[2:-1]
            self._log.take_back(int(number) if number.isdigit() else 1)


def head() -> Iterator[str]:
    """Above each start: what was run when, by what, where, and from which code."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    program = "instructft" if Path(sys.argv[0]).name in ("__main__.py", "instructft") else sys.argv[0]
    yield f"# {now} · {socket.gethostname()} · instructft {__version__} · Python {platform.python_version()}"
    yield f"# {shlex.join(without_secrets([program, *sys.argv[1:]]))}"
    yield f"# in {os.getcwd()}{_commit()}"


def _commit() -> str:
    """The commit of the folder that one stands in, and whether files differ from it; "" outside of git."""

    def git(*words: str) -> str:
        command = ["git", "-c", "core.fsmonitor=false", *words]  # which would run a program of the repository's
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" · commit {commit}" + (", with changes" if changed else "")
