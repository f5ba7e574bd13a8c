"""Separators of CSV files, and cells that stay text."""

from __future__ import annotations

from pathlib import Path

import pytest

from instructft.data.readers import rows
from instructft.errors import DataError


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_header_tells_the_separator(tmp_path: Path, mark: str, suffix: str) -> None:
    if suffix == ".tsv" and mark != "\t":
        return
    path = tmp_path / f"rows{suffix}"
    path.write_text(f'"in, put"{mark}output\n"a{mark}b, c; d"{mark}NA\n', encoding="utf-8", newline="")
    assert list(rows(path, suffix, path.name)) == [{"in, put": f"a{mark}b, c; d", "output": "NA"}]


def test_a_line_for_excel_is_no_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sep=;\r\na;b\r\n1,5;2\r\n1;2;3\r\n", encoding="utf-8", newline="")
    found = rows(path, ".csv", "rows.csv")
    assert next(found) == {"a": "1,5", "b": "2"}
    with pytest.raises(DataError, match=r"rows\.csv, line 4: found 3 cells, expected 2 .* a semicolon"):
        next(found)


def test_one_column_needs_no_separator(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\n"a, b; c"\nd|e\n', encoding="utf-8")
    assert list(rows(path, ".csv", "rows.csv")) == [{"text": "a, b; c"}, {"text": "d|e"}]
