"""`train.log` holds what was printed, to be read: whole lines, no secrets, and no trouble with it ends a run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from instructft.errors import UsageError
from instructft.report import train_log
from instructft.report.logs import keep_printed, lasting_output, take_troubles
from instructft.report.train_log import NAME, TrainLog


def kept(*texts: str, tmp_path: Path) -> list[str]:
    """The lines below the head of what is left of some texts."""
    log = TrainLog()
    stream = log.stream()
    for text in texts[: len(texts) // 2]:  # some before there is a file
        stream.feed(text)
    log.begin(tmp_path / NAME)
    for text in texts[len(texts) // 2 :]:
        stream.feed(text)
    log.finish()
    return (tmp_path / NAME).read_text(encoding="utf-8").splitlines()[4:]


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (["one\n", "two\n"], ["one", "two"]),
        (["one\r\n", "tw", "o"], ["one", "two"]),
        (["10%\r", "20%\r", "30%\n"], ["30%"]),
        (["\x1b[1;31mred\x1b[0m \x1b]0;title\x07text\n", "a\x1b", "[2", "Kb\n"], ["red text", "b"]),
        (["a\n", "b\n", "c\n", "d\x1b[2A", "e\n"], ["a", "e"]),
        (["a\x07\x00b\n", "\u202eback\u2028\n"], ["ab", "\\u202eback\\u2028"]),
        (["tab\there\n", "ab\bc\n"], ["tab\there", "ac"]),
    ],
)
def test_lines_are_kept_as_a_terminal_shows_them_at_last(tmp_path: Path, texts: list[str], lines: list[str]) -> None:
    assert kept(*texts, tmp_path=tmp_path) == lines


def test_a_moving_bar_leaves_what_it_showed_last(tmp_path: Path) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=60)
    with Progress(console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("steps", total=3)
        for step in range(3):
            console.print(f"step {step}")
            progress.update(task, advance=1, refresh=True)
    assert [line for line in kept(written.getvalue(), tmp_path=tmp_path) if line] == ["step 0", "step 1", "step 2"]


def fail(run: Path, error: Exception) -> None:
    with lasting_output():
        keep_printed(run)
        raise error


def test_both_streams_are_kept_and_a_resumed_run_appends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("first", "second"):
        with lasting_output():
            print(what, "early")
            keep_printed(tmp_path)
            with lasting_output():  # training in a command has one of its own
                print(what, "error", file=sys.stderr)
            print(what, "late")
    for error in (UsageError("no such thing"), ZeroDivisionError("unforeseen")):
        with pytest.raises(type(error)):
            fail(tmp_path, error)
    lines = (tmp_path / NAME).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("first", "second"))] == [
        "first early", "first error", "first late", "second early", "second error", "second late"
    ]  # fmt: skip
    assert "instructft: no such thing" in lines
    assert lines[-1].startswith("ZeroDivisionError")
    assert sum(line.startswith("# 20") for line in lines) == 4
    assert capsys.readouterr() == (
        "first early\nfirst late\nsecond early\nsecond late\n",
        "first error\nsecond error\n",
    )


def test_the_head_says_what_was_typed_where_and_from_which_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        author = {**os.environ, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a"}
        subprocess.run(["git", *words], check=True, env={**author, "GIT_COMMITTER_EMAIL": "a@b"})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    typed = ["train", "my recipe.yaml", "hub.token=K3y", "hf_abcdefgh", "--api-key", "K3y"]
    monkeypatch.setattr(sys, "argv", ["/x/instructft/__main__.py", *typed])
    head = list(train_log.head())
    assert head[1] == "# instructft train 'my recipe.yaml' 'hub.token=…' 'hf_…' --api-key '…'"
    assert head[2] == f"# in {tmp_path} · commit {commit[:12]}"
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    assert list(train_log.head())[2] == f"# in {tmp_path}"


def test_secrets_are_blotted_out_of_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    (line,) = kept("", "key 0123456789abcdef, hf_AbCdEf123456, ghp_0123456789abcdef0123\n", tmp_path=tmp_path)
    assert line == "key …, hf_…, ghp_…"


class Full:
    """A file on a full disk."""

    def write(self, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    def tell(self) -> int:
        return 0

    def close(self) -> None:
        pass


def test_a_full_disk_ends_the_log_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_troubles()
    with lasting_output():
        keep_printed(tmp_path)
        log: Any = train_log_of_now()
        log._file = Full()
        print("one")
        print("two")
    assert take_troubles()[NAME] == "train.log: [Errno 28] No space left on device; the run goes on"
    with lasting_output():
        keep_printed(tmp_path / "gone")
        print("three")
    assert "No such file" in take_troubles()[NAME]
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def train_log_of_now() -> TrainLog:
    from instructft.report import logs

    assert logs._printed is not None
    return logs._printed


def test_a_log_without_an_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_log, "MOST", 2_000)
    lines = kept("", "word " * 20 + "\n", *["word " * 20 + "\n"] * 100, tmp_path=tmp_path)
    assert lines[-1].startswith("[from here on left out")
    assert (tmp_path / NAME).stat().st_size < 3_000
