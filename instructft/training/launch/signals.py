"""The signals that stop a run, for all who listen to them: the command, the launcher of several processes, training."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

AGAIN = 1.0  # seconds between two signals; what comes sooner is the same request, on another way
TWICE = (signal.SIGTERM, signal.SIGINT)  # of the others a second one says nothing new
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # not every system has the last two
SIGNALS: list[int] = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def listen(handler: Callable[[int, FrameType | None], Any], numbers: Sequence[int] = tuple(SIGNALS)) -> dict[int, Any]:
    """Let `handler` answer the signals that stop a run; signal -> who answered before, for `signal.signal`.

    SIGHUP stays ignored where it is: `nohup` asks for that. SIGINT is ignored in whatever a shell script starts in the
    background, where nobody asked for it, and is heard all the same.
    """
    hangup = getattr(signal, "SIGHUP", None)
    heard = [n for n in numbers if not (n == hangup and signal.getsignal(n) == signal.SIG_IGN)]
    return {number: signal.signal(number, handler) for number in heard}
