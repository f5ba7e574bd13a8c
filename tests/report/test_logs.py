"""Tests of `instructft.report.logs`: a damaged line is left out and named, and a log that fails ends nothing."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from instructft.report.logs import append_log, attempt, keep_until, lasting_output, read_log, take_troubles

DAMAGE = [b'{"step": 1, "lo', b"Hi", b"", b"[]", b'{"loss": 1}', b'{"step": "1"}', b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_line_is_left_out_and_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 2}\n{"step": 3}\n{"step": 4'
    path.write_bytes(content)
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    kept, said = keep_until(2, path)
    assert kept == [{"step": 1, "loss": 2.0}, {"step": 2}]
    assert "metrics.jsonl: line 2: damaged, and left out" in said
    assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n{"step": 2}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content


def test_of_a_sound_log_nothing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')  # cut short by a kill
    assert keep_until(1, path) == ([{"step": 1}], "")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_log_that_cannot_be_written_is_kept_to_be_told(tmp_path: Path) -> None:
    take_troubles()
    assert not append_log(tmp_path / "none" / "samples.jsonl", [{"step": 1}])
    assert "the run goes on" in take_troubles()["samples.jsonl"]
    assert attempt("a", "b", lambda: None)
    assert not take_troubles()


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_output_that_is_lost_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    take_troubles()
    monkeypatch.setattr(sys, "stdout", Closed())
    with lasting_output():
        print("one")
        print("two", flush=True)
    assert "standard output" in take_troubles()["output"]


def test_a_library_that_closes_what_stood_for_stderr_closes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """absl keeps the stream that it finds at its import, and closes it at exit unless it is the standard one."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with lasting_output():
        found = sys.stderr
    found.close()
    assert not stream.closed


LOGGED = {step: {"step": step, "loss": 1.0 / step} for step in (1, 2, 3)}
SOUND = "".join(f'{{"step": {step}, "loss": {1 / step}, "tokens_per_second": 9.5}}\n' for step in (1, 2, 3))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: text.replace('"loss": 0.5', '"loss": 0.8'), "line 2: damaged"),
        (lambda text: text.replace('"step": 2', '"step": 3'), "line 2: damaged"),
        (lambda text: text.replace('"step": 2', '"step": 7'), "1 line is written again, as the checkpoint has it"),
        (lambda text: text.replace('"loss": 0.5, ', ""), "line 2: damaged"),
        (lambda text: text.replace('{"step": 2', "{"), "line 2: damaged"),
        (lambda text: text + text.splitlines(keepends=True)[1], "line 2: damaged"),
        (
            lambda text: "".join(text.splitlines(keepends=True)[::2]),
            "1 line is written again, as the checkpoint has it",
        ),
        (lambda text: "", "3 lines are written again"),
        (lambda text: text[:-9], "1 line is written again, as the checkpoint has it"),
    ],
)
def test_what_a_checkpoint_has_of_a_log_is_written_again(tmp_path: Path, damage: Any, line: str) -> None:
    """Also where a line is JSON still, and says something else than was logged."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(damage(SOUND) + '{"step": 4, "loss": 0.25}\n')
    kept, said = keep_until(3, path, logged=LOGGED)
    assert [{key: record[key] for key in ("step", "loss")} for record in kept] == list(LOGGED.values())
    assert read_log(path) == kept
    assert line in said
    assert keep_until(3, path, logged=LOGGED) == (kept, "")


def test_what_a_log_has_beside_the_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    more = '{"step": 4, "train_loss": 2.0}\n'  # logged after the last checkpoint was saved
    path.write_text(SOUND + more)
    assert keep_until(4, path, logged=LOGGED)[1] == ""
    assert path.read_text() == SOUND + more
