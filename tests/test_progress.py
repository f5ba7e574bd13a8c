"""Signs of life: on stderr alone, from one process alone, and none of what is over at once."""

from __future__ import annotations

import io
import sys

from instructft import progress
from instructft.progress import Progress, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_on_stderr_of_the_first_process_alone(capsys, monkeypatch):
    say("loading …")
    monkeypatch.setenv("RANK", "1")
    say("loading too …")
    assert capsys.readouterr() == ("", "loading …\n")


def test_quick_work_in_a_log_says_nothing(capsys):
    with Progress("answering", 3) as found:
        for _ in range(3):
            found.add()
    assert capsys.readouterr() == ("", "")


def test_long_work_in_a_log_is_told_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("answering", 40) as found:
        for _ in range(3):
            found.add(4)
    assert capsys.readouterr().err == "answering: 8 of 40 rows · 48 s left\n"


def test_in_a_terminal_the_line_moves_and_goes(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("answering", 2) as found:
        found.add()
    assert screen.getvalue() == "\r\x1b[2Kanswering: 1 of 2 rows\r\x1b[2K"
