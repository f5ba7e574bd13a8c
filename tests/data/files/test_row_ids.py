"""A row has one id wherever it stands; a list of ids leaves rows out, and says which of them nobody has."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import instructft
from instructft.data.files.row_ids import read_excluded, row_id
from instructft.data.load import load_parts
from instructft.data.prepare import prepare
from instructft.data.streaming import prepare_stream
from instructft.errors import DataError
from tests.helpers.rows import made_up, prepared

HELD = "data.splits={validation: 0.1, test: 0}"


def test_a_row_has_the_same_id_in_every_type_of_file(recipe, tmp_path):
    rows = [{"instruction": f"Frage {i}?", "output": "Grüße 👋", "input": ""} for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "spaced.json").write_text(json.dumps(rows, indent=3, ensure_ascii=False), encoding="utf-8")
    for entry in (rows, {"path": str(tmp_path / "rows.parquet")}, {"path": str(tmp_path / "spaced.json")}):
        part = load_parts(recipe(entry))[0]
        assert part.ids(np.arange(12)) == [row_id(row) for row in rows]
    assert len({row_id(row) for row in rows}) == 12


def test_rows_are_left_out_and_counted_and_others_keep_their_split(recipe, tmp_path):
    rows = made_up(40)
    before = prepared(recipe(rows, overrides=[HELD]))
    train = load_parts(recipe(rows, overrides=[HELD]))[0].rows["train"].tolist()
    listed = tmp_path / "out.txt"
    gone = [row_id(rows[number]) for number in train[:3]]
    listed.write_text(f"# a comment\n\n{gone[0]}  never learned\n{gone[1].upper()}\n{gone[2]}\n{'0' * 16}\n")
    mine = recipe(rows, overrides=[HELD, f"data.exclude={listed}"])
    made = prepared(mine)
    assert made.dropped["excluded"] == 3
    assert made.rows["train"] == before.rows["train"] - 3
    assert made.splits["validation"]["input_ids"][:] == before.splits["validation"]["input_ids"][:]
    said = dict(made.account(128))
    assert "3 left out by data.exclude" in said["dropped"]
    assert said["exclude"] == f"1 of the 4 ids in out.txt match no training row: {'0' * 16}"
    assert made.fingerprint != before.fingerprint


def test_a_row_that_is_left_out_may_say_what_nothing_reads(recipe, tmp_path):
    rows = [*made_up(20), {"instruction": "Q?", "output": "A.", "mood": "x"}]
    listed = tmp_path / "out.txt"
    listed.write_text(row_id(rows[-1]))
    splits = "data.splits={validation: 0, test: 0}"
    with pytest.raises(DataError, match="mood"):
        prepared(recipe(rows, overrides=[splits]))
    assert prepared(recipe(rows, overrides=[splits, f"data.exclude={listed}"])).rows["train"] == 20


def test_a_stream_leaves_the_same_rows_out(recipe, tmp_path):
    rows = made_up(30)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    listed = tmp_path / "out.txt"
    listed.write_text("\n".join(row_id(row) for row in rows[:4]))
    more = ["data.splits={validation: 0, test: 0}", "train.max_steps=1"]
    made = []
    for overrides in (more, [*more, f"data.exclude={listed}"]):
        mine = recipe({"path": str(path), "streaming": True}, overrides=overrides)
        made.append(prepare_stream(mine, instructft.load_tokenizer(mine)))
    assert [len(list(one.splits["train"])) for one in made] == [30, 26]
    assert made[1].dropped["excluded"] == 4
    assert made[0].fingerprint != made[1].fingerprint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0123456789abcdef\nrow 17\n", r"line 2: found 'row', expected a row id of 16 hexadecimal digits"),
        ("# nothing\n", r"holds no row id"),
        (b"\xff\xfe", r"cannot be read"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, text, says):
    path = tmp_path / "out.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=rf"(?s)data\.exclude: .*{says}"):
        read_excluded(str(path))


def test_a_list_that_is_not_there_is_said_with_the_recipe(recipe):
    with pytest.raises(instructft.InstructftError, match=r"data\.exclude: there is no"):
        recipe(made_up(10), overrides=["data.exclude=gone.txt"])


def test_all_rows_left_out_is_an_error(recipe, tmp_path):
    rows, listed = made_up(5), tmp_path / "out.txt"
    listed.write_text("\n".join(map(row_id, rows)))
    mine = recipe(rows, overrides=["data.splits={validation: 0, test: 0}", f"data.exclude={listed}"])
    with pytest.raises(DataError, match=r"no row .*left out by data\.exclude"):
        prepare(mine, instructft.load_tokenizer(mine))
