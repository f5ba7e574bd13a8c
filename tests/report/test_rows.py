"""`instructft rows`: what is printed, what is written for the next run, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.data.prepare import prepare
from instructft.errors import UsageError
from instructft.report.rows import tell_rows
from tests.report.conftest import ROWS

SHOWN = ("never_learned", "contradicting", "at_once")


def test_what_is_printed_can_be_read_and_does_no_harm(rows_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell_rows(rows_run, 2, False, None, ())
    out = capsys.readouterr().out
    assert f"{rows_run}: 6 training rows, 5 seen, 5 more than once" in out
    assert "1 never learned" in out
    assert "4.000 → 4.100" in out
    assert "rows.jsonl row 1" in out
    assert "user: What is the name? · assistant: It is Ada." in out
    assert "\u202e" not in out
    assert "not seen" in out or "row 6" not in out
    tell_rows(rows_run, 1, True, None, ())
    facts = json.loads(capsys.readouterr().out)
    assert [facts[kind]["rows"] for kind in SHOWN] == [1, 2, 1]
    assert len(facts["contradicting"]["examples"]) == 1
    assert len(facts["contradicting"]["ids"]) == 2
    assert facts["never_learned"]["examples"][0]["text"].startswith("user: What is the name?")


def test_rows_whose_data_is_gone_are_told_without_their_text(
    rows_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [{**ROWS[0], "output": "Bob."}, *ROWS[1:]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    for gone in (False, True):
        if gone:
            (tmp_path / "rows.jsonl").unlink()
        tell_rows(rows_run, 1, True, None, ())
        found = json.loads(capsys.readouterr().out)
        assert found["never_learned"]["examples"][0]["text"] == ""
        assert bool(found["contradicting"]["examples"][0]["text"]) is not gone


def test_ids_that_are_written_are_taken_by_the_next_run(
    rows_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "out.txt"
    tell_rows(rows_run, 1, False, listed, ("never_learned", "at_once"))
    assert f"Wrote {listed}: 2 ids" in capsys.readouterr().out
    assert [line[18:] for line in listed.read_text(encoding="utf-8").splitlines()[1:]] == [
        "never_learned  rows.jsonl row 1  user: What is the name? · assistant: It is Ada.",
        "at_once  rows.jsonl row 4  user: Say it twice. · assistant: It. It.",
    ]
    recipe = instructft.load_recipe(tmp_path / "rows.yaml", [f"data.exclude={listed}"])
    made = prepare(recipe, instructft.load_tokenizer(recipe))
    assert made.rows["train"] == 3
    assert made.dropped["excluded"] == 3  # the row that says the same as the fourth, too
    with pytest.raises(UsageError, match=r"--exclude: .*out\.txt is there already"):
        tell_rows(rows_run, 1, False, listed, ("never_learned",))


def test_of_an_order_of_all_rows_those_at_the_top_are_written(
    rows_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_rows(rows_run, 1, False, tmp_path / "out.txt", ("hardest", "longest"))
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert 1 <= len(lines) <= 2
    assert {line.split()[1] for line in lines} <= {"hardest", "longest"}


def test_nothing_to_write_writes_nothing(rows_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell_rows(rows_run, 0, False, tmp_path / "none.txt", ())
    assert "none.txt is not written" in capsys.readouterr().out
    assert not (tmp_path / "none.txt").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "rows.parquet").unlink(), r"holds no rows\.parquet: the run has not ended"),
        (lambda run: (run / "rows.parquet").write_bytes(b"PAR1"), r"rows\.parquet is damaged"),
        (lambda run: (run / "rows.parquet").write_bytes((run / "rows.parquet").read_bytes()[:300]), r"is damaged"),
    ],
)
def test_a_run_without_its_rows_is_refused(rows_run: Path, spoil: Callable[[Path], Any], says: str) -> None:
    spoil(rows_run)
    with pytest.raises(UsageError, match=says):
        tell_rows(rows_run, 1, False, None, ())


def test_kinds_that_there_are_not_are_refused(rows_run: Path) -> None:
    with pytest.raises(UsageError, match=r"--kinds: 'bad' is unknown; expected never_learned, contradicting"):
        tell_rows(rows_run, 1, False, None, ("bad",))
