"""Layouts of JSON that people have, under any of its endings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    ],
)
def test_what_is_no_layout_is_named_by_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(rows(path, ".jsonl", "rows.jsonl"))
    assert str(caught.value).startswith(("rows.jsonl, " + said, "rows.jsonl: " + said)), caught.value
