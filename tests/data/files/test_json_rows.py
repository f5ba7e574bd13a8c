"""Layouts of JSON that people have, under any of its endings."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from instructft.data.files import json_rows
from instructft.data.readers import rows
from instructft.errors import DataError

TWO = [{"a": "1", "b": {"c": ["x"]}}, {"a": "2", "b": {"c": []}}]
LAYOUTS = {
    "lines": "\n".join(json.dumps(row) for row in TWO),
    "list": json.dumps(TWO),
    "list over lines": "\n" + json.dumps(TWO, indent=2) + "\n\n",
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in TWO),
    "objects over lines, windows": "\r\n".join(json.dumps(row, indent=2) for row in TWO).replace("\n", "\r\n"),
    "data": json.dumps({"version": "1.0", "data": TWO}),
    "data over lines": json.dumps({"version": "1.0", "data": TWO}, indent=1),
    "rows": json.dumps({"rows": TWO}) + "\n",
    "train, with a mark": "\ufeff" + json.dumps({"train": TWO}),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_its_rows(tmp_path: Path, layout: str, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(LAYOUTS[layout], encoding="utf-8", newline="")
    assert list(rows(path, suffix, path.name)) == TWO


@pytest.mark.parametrize("indent", [None, 2])
def test_one_row_in_a_file_of_lines_is_a_row(tmp_path: Path, indent: int | None) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}]}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row, indent=indent), encoding="utf-8")
    assert list(rows(path, ".jsonl", "one.jsonl")) == [row]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1} {"a": 2}', "line 1, column 10: not JSON: Extra data"),
        ('{\n"a": 1\n} {\n"a": 2\n}', "line 3, column 3: not JSON: Extra data"),
        ('{\n"a": 1\n}\n\n[\n]', "line 5 is a JSON list, expected an object"),
        ('{\n"a": 1,\n', "line 3, column 1: not JSON"),
        ('\n\n{"a": 1}\n{"a": \n', "line 4, column 6: not JSON: Expecting value"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2, column 1: not JSON: Extra data"),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', "lists of rows under train, test, expected one; write each"),
        (
            '{"v": 1, "rows": [{"a": 1}],\n"data": [{"a": 2}]}',
            "lists of rows under data, rows, expected one; write each",
        ),
    ],
)
def test_what_is_no_layout_is_named_by_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(rows(path, ".jsonl", "rows.jsonl"))
    assert str(caught.value).startswith(("rows.jsonl, " + said, "rows.jsonl: " + said)), caught.value


LIST = json.dumps([{"a": f"one\n{i}", "b": {"c": []}} for i in range(9)], indent=1)


@pytest.mark.parametrize("at_once", [1, 2, 7, 100])
@pytest.mark.parametrize("newline", ["\n", " "])
@pytest.mark.parametrize("text", [LIST, LIST + " x", LIST[:-2], LIST[:300], LIST[:-2] + ", 7]", LIST[:-1] + ",]", "[]"])
def test_a_list_is_read_in_stretches_and_its_faults_keep_their_place(tmp_path, monkeypatch, text, newline, at_once):
    monkeypatch.setattr(json_rows, "_AT_ONCE", at_once)
    path = tmp_path / "rows.json"
    path.write_text(text := text.replace("\n", newline), encoding="utf-8")
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        said = f"rows.json, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
    else:
        said = "rows.json: row 10 is a JSON number, expected an object with the row's columns: {…}"
        if all(isinstance(row, dict) for row in expected):
            assert list(rows(path, ".json", path.name)) == expected
            return
    with pytest.raises(DataError) as raised:
        list(rows(path, ".json", path.name))
    assert str(raised.value) == said


def test_the_first_row_of_a_long_list_needs_little_of_it() -> None:
    file = io.BytesIO(json.dumps([{"a": "x" * 1000}] * 3000).encode())
    found = json_rows.json_rows(file, "rows.json", False)
    row, text = next(found)
    assert row == json.loads(text)
    assert file.tell() < 300_000 < len(file.getvalue())


@pytest.mark.parametrize(
    ("suffix", "content", "said"),
    [
        (".jsonl", '{"a": "', "a line has more than 200,000 characters"),
        (".jsonl", '{"a": 1}\n{"a": "', "a line has more than 200,000 characters"),
        (".json", '[{"a": 1}, {"a": "', "row 2 is not to be read: it has more than 200,000 characters"),
        (".csv", "a,b\n1,", "a line has more than 200,000 characters"),
    ],
)
def test_a_row_without_end_is_not_taken_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, content: str, said: str
) -> None:
    monkeypatch.setattr(json_rows, "MOST", 200_000)
    path = tmp_path / f"rows{suffix}"
    with path.open("wb") as file:
        file.write(content.encode())
        file.truncate(1 << 34)  # that nobody reads
    with pytest.raises(DataError, match=said):
        list(rows(path, suffix, "rows"))
