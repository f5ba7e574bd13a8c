"""`rows.parquet`: which rows were never learned, contradict others, or were known when they came."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from instructft.report.row_file import Rows, read_rows

SHOWN = ("never_learned", "contradicting", "at_once")


def numbers(rows: Rows) -> dict[str, list[int]]:
    return {kind: found.tolist() for kind, found in rows.kinds().items()}


def test_rows_are_told_by_how_they_were_learned(rows_run: Path) -> None:
    rows = read_rows(rows_run)
    assert rows.columns["row"].tolist() == [1, 2, 3, 4, 5, 6]
    assert set(rows.columns["source"].tolist()) == {"rows.jsonl"}  # and no folder of this machine
    found = numbers(rows)
    assert {kind: found[kind] for kind in SHOWN} == {
        "never_learned": [0], "contradicting": [1, 2], "at_once": [3]
    }  # fmt: skip
    assert found["hardest"] == [0, 2, 1, 4, 3]
    assert found["longest"][0] == 2
    assert rows.columns["id"][3] == rows.columns["id"][4]  # they say the same
    assert len(set(rows.columns["id"].tolist())) == 5


def test_a_prompt_that_is_answered_alike_contradicts_nothing_and_no_prompt_is_no_prompt() -> None:
    columns = {
        "prompt": np.array([1, 1, 0, 0, 5, 7, 5, 7], dtype=np.uint64),
        "answer": np.array([9, 9, 8, 7, 6, 5, 4, 3], dtype=np.uint64),
        "loss_first": np.full(8, 3.0), "loss_last": np.array([1, 1, 1, 1, 0.2, 0.9, 3.0, 1.1]),
        "step_first": np.ones(8), "step_last": np.ones(8), "tokens": np.ones(8),
    }  # fmt: skip
    rows = Rows(columns, 0)
    # first the prompt whose answers all have a high loss
    assert numbers(rows)["contradicting"] == [5, 7, 4, 6]
    assert numbers(rows)["never_learned"] == []  # none was seen twice
