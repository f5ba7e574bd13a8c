"""Signals are heard wherever a run is started, but for the one that `nohup` takes away."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from instructft.training.launch.signals import SIGNALS, listen

ALL = [signal.Signals(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ignored", [None, *ALL])
def test_what_was_ignored_is_heard_but_for_a_terminal_that_may_go(ignored: signal.Signals | None) -> None:
    for number in ALL:
        signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)
    came: list[int] = []
    before = listen(lambda number, _: came.append(number))
    heard = [number for number in ALL if not number == ignored == getattr(signal, "SIGHUP", None)]
    assert list(before) == heard
    for number in heard:
        os.kill(os.getpid(), number)
    assert came == heard
    if ignored in heard:
        assert before[ignored] == signal.SIG_IGN
