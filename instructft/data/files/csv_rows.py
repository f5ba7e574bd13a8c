"""Rows of CSV and TSV files: every cell is the text that stands there, whatever separates the cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from instructft.data.files.json_rows import bounded_lines
from instructft.errors import DataError

_SEPARATORS = (",", ";", "\t", "|")  # in a tie the first
_TOLD = re.compile(r'"?sep=(.)"?\r?\n?$')  # a first line by which Excel is told
_SAID = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a bar"}


def csv_rows(file: IO[bytes], name: str, separator: str | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a file with a header; the separator is the one that the header has most of.

    Raises:
        DataError: with the line of a row that has other cells than the header, or is not CSV.
    """
    csv.field_size_limit(1 << 30)  # characters in a cell; Python's own limit is shorter than a long conversation
    lines = bounded_lines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), name)
    skipped = 0
    first = next(lines, "")
    if told := _TOLD.match(first):
        separator, first, skipped = told[1], next(lines, ""), 1
    separator = separator or max(_SEPARATORS, key=lambda mark: _cells(first, mark))
    reader = csv.reader(chain([first], lines), strict=True, delimiter=separator)
    try:
        header = next((cells for cells in reader if cells), [])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise DataError(f"{name}, line {skipped + 1}: the header names the column {', '.join(twice)} twice")
        begins = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{name}, line {begins + skipped}: found {len(cells)} cells, expected {len(header)} as in the "
                    f"header; a cell that holds {_SAID.get(separator, separator)}, a quote or a line break stands in "
                    '"…", with each quote in it doubled'
                )
            if cells:
                yield dict(zip(header, cells, strict=True)), ""
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num + skipped}: not CSV: {error}") from error


def _cells(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=separator), []))
    except csv.Error:
        return 0
