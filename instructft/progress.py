"""Signs of life on stderr: what is being done, and how far it is. A line that moves in a terminal, few lines in a log.

What a command prints for others to read (stdout of `--json`, of a chat in a pipe) stays free of them, and of several
processes the first one alone speaks.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from instructft.formatting import clock

REDRAWN, TOLD = 0.1, 10.0  # seconds between two looks of a line in a terminal, between two lines of a log
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate reads them


def is_first() -> bool:
    """Whether this process is the first of those that a launcher has started, or the only one."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def say(text: str) -> None:
    """One line on stderr, at once.

    Example::

        say("loading torch and transformers …")
    """
    if is_first():
        plain = not str(getattr(sys.stderr, "encoding", None) or "utf-8").lower().startswith("utf")
        print(text.replace("…", "...") if plain else text, file=sys.stderr, flush=True)


class Progress:
    """How far something is that may take long: `Progress("answering", 400)`, then `add` as rows are done.

    In a terminal a line that goes when the work is done; in a log a line every ten seconds, and none of what is quick.

    Example::

        with Progress("answering", 400) as progress:
            progress.add(3)
        # answering: 3 of 400 rows · 1 min 19 s left

    Args:
        shown: False keeps it silent.
    """

    def __init__(self, what: str, total: int, unit: str = "rows", shown: bool = True):
        self.shown = shown and is_first()
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._moves = sys.stderr.isatty()
        self._began = time.monotonic()
        self._shown = self._began - TOLD if self._moves else self._began
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._drawn:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self._shown < (REDRAWN if self._moves else TOLD) or not self.shown:
            return
        self._shown = now
        text = self._text(now - self._began)
        if self._moves:
            self._drawn = True
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        else:
            say(text)

    def _text(self, seconds: float) -> str:
        text = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}"
        left = seconds * (self.total - self.done) / self.done if self.done else 0.0
        return f"{text} · {clock(left)} left" if left >= 1 else text
