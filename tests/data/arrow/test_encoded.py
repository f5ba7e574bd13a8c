"""Rows are encoded once, in as many processes as there are, and what is trained of them are borders in one file."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

import instructft
from instructft.data.arrow import encoded as module
from instructft.data.arrow import store
from instructft.data.arrow.encoded import encode_part, fold_part, has_turns, notes, trained_rows, verdicts
from instructft.data.load import load_parts
from instructft.data.prepare import prepare
from instructft.data.tokenize import schema
from tests.helpers.rows import made_up, prepared


def test_several_processes_give_what_one_gives(recipe, monkeypatch):
    one = prepared(recipe(made_up(60), name="one"))
    monkeypatch.setattr(module, "_ROWS_PER_PROCESS", 20)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(module, "cores", lambda: 3)
    asked: list[tuple[int, int]] = []
    many_of = module.in_order
    monkeypatch.setattr(module, "in_order", lambda work, n, procs: asked.append((n, procs)) or many_of(work, n, procs))
    many = prepared(recipe(made_up(60), name="many", overrides=["data.max_length=127"]))
    assert asked == [(9, 3)]
    assert many.fingerprint == one.fingerprint
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_cache_serves_every_later_run_whatever_came_between(recipe, monkeypatch):
    first, other = (recipe(made_up(30), overrides=[f"data.max_length={n}"]) for n in (120, 100))
    made = [prepared(one).fingerprint for one in (first, other)]
    monkeypatch.setattr(module, "_encode", lambda *_: pytest.fail("encoded again"))
    packed = recipe(made_up(30), overrides=["data.max_length=120", "data.packing=true", "data.seed=5"])
    for one, expected in ((first, made[0]), (other, made[1]), (packed, None)):
        found = prepare(one, instructft.load_tokenizer(one)).fingerprint
        assert expected in (None, found)


def test_long_rows_are_encoded_fewer_at_a_time(recipe, monkeypatch):
    rows = made_up(40)
    rows[20]["output"] = "word " * 30_000
    part = load_parts(recipe(rows))[0]
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", 1 << 14)
    found = module._pieces(part.raw)
    assert (20, 21) in found
    assert found[0] == (0, 20)
    assert found[-1][1] == 40


def encoded(tmp_path, rows):
    """Encoded rows of (turns, verdict, note), two to a batch; tokens count up."""
    batches, token = [], 0
    for some in (rows[i : i + 2] for i in range(0, len(rows), 2)):
        ids = []
        for turns, *_ in some:
            ids.append(list(range(token, token + sum(turns))))
            token += sum(turns)
        columns = [ids, ids, [t for t, *_ in some], [v for _, v, _ in some], [0] * len(some), [n for *_, n in some]]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema(), strict=True)]
        batches.append(pa.record_batch(arrays, schema=schema()))
    store.write(tmp_path / "rows.arrow", schema(), batches)
    return store.mapped(tmp_path / "rows.arrow", "rows")


def test_each_turn_is_a_row_and_no_token_moves(tmp_path):
    found = encoded(tmp_path, [([3, 2], "", ""), ([], "no_loss", ""), ([4], "", "")])
    before = pa.total_allocated_bytes()
    rows, each = trained_rows(found)
    assert [row["input_ids"] for row in rows] == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    assert rows["labels"][:] == rows["input_ids"][:]
    assert each.tolist() == [2, 0, 1]
    assert pa.total_allocated_bytes() - before < 1000
    parts, each = trained_rows(found, most=2)
    assert [row["input_ids"] for row in parts] == [[0, 1], [2], [3, 4], [5, 6], [7, 8]]
    assert each.tolist() == [3, 0, 2]
    assert parts._fingerprint != rows._fingerprint


def test_verdicts_and_notes_keep_their_rows(tmp_path):
    rows = [([1], "", ""), ([], "a", "first"), ([], "b", "second"), ([1], "", ""), ([], "a", "third")]
    found = encoded(tmp_path, rows)
    verdict, lost = verdicts(found)
    assert verdict.tolist() == ["", "a", "b", "", "a"]
    assert lost.tolist() == [0] * 5
    assert list(notes(found, np.flatnonzero(verdict != ""))) == ["first", "second", "third"]
    assert list(notes(found, np.array([2, 4]))) == ["second", "third"]


def test_what_is_encoded_is_mapped_from_a_file(recipe):
    mine = recipe(made_up(30))
    found = encode_part(load_parts(mine)[0], mine, instructft.load_tokenizer(mine))
    assert found.cache_files
    assert found.features["input_ids"].feature.dtype == "int32"


def test_folded_rows_say_of_which_parts_they_are(tmp_path, monkeypatch):
    """Raw rows keep their places; one process or several, whatever is folded together."""
    rows = [([4, 4], "", ""), ([], "no_loss", ""), ([2], "", ""), ([4, 4, 4], "", ""), ([3], "", "")]
    ids = [[1, 2, 3, 4, 1, 2, 3, 5], [], [6, 7], [1, 2, 8, 9, 1, 2, 8, 7, 1, 2, 8, 6], [4, 4, 4]]
    labels = [[-100, -100, -100, i] * (len(row) // 4) if len(row) > 3 else row for row in ids for i in [9]]
    found = Dataset.from_dict({"input_ids": ids, "labels": labels, "turns": [turns for turns, *_ in rows]})
    kinds = {name: pa.list_(pa.int64() if name == "turns" else pa.int32()) for name in found.column_names}
    found = Dataset(found.data.table.cast(pa.schema(kinds)), fingerprint="raw")
    assert has_turns(found, np.array([0, 1]))
    assert not has_turns(found, np.array([1, 2, 4]))
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
    monkeypatch.setattr(module, "_ROWS_PER_PROCESS", 2)
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    folded, each = trained_rows(fold_part(found, 100, 1.0))
    assert each.tolist() == [1, 0, 1, 1, 1]
    assert folded["input_ids"][:] == [[1, 2, 3, 4, 3, 5], [6, 7], [1, 2, 8, 9, 8, 7, 8, 6], [4, 4, 4]]
    assert folded["seq_lengths"][:] == [[4, 2], [2], [4, 2, 2], [3]]
    assert folded["seq_starts"][:] == [[0, 2], [0], [0, 2, 2], [0]]
    alone, each = trained_rows(found, parts=True)
    assert each.tolist() == [2, 0, 1, 3, 1]
    assert alone["seq_lengths"][:] == [[len(row)] for row in alone["input_ids"][:]]
    assert alone["seq_starts"][:] == [[0]] * 7
