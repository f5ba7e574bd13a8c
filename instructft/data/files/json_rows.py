"""Rows of JSON files: an object a line, objects over several lines, a list of them, or such a list under `data`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO, Any

from instructft.errors import DataError

Found = Iterator[tuple[dict[str, Any], str]]  # each row, and its JSON text as it stands in the file ("" where unknown)

# Keys under which people keep their rows in one large object.
WRAPPERS = ("data", "rows", "train", "examples", "records", "items", "instances", "samples", "entries", "dataset")
_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")  # of more rows

_AT_ONCE = 1 << 16  # characters
MOST = 1 << 28  # characters of a row, or of a line: no honest one has as many, and all of it would be in memory


def json_rows(file: IO[bytes], name: str, one_object_is_a_row: bool) -> Found:
    """The rows of a file, whatever of these layouts it has.

    Of a list, and with an object a line, few are in memory at a time.

    Raises:
        DataError: with the line and column of what is not JSON.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    head = text.read(_AT_ONCE)
    while not head.strip() and (more := text.read(_AT_ONCE)):
        head += more
    if head.lstrip().startswith("["):  # before a line is read, which may be all of the file
        yield from _list(head, text, name)
        return
    rest = bounded_lines(text, name)
    lines = enumerate(chain(io.StringIO(head + next(rest, ""), newline="\n"), rest), 1)
    number, line = next(((n, text) for n, text in lines if text.strip()), (0, ""))
    if not line:
        return
    before = "\n" * (number - 1)  # empty lines, which count where a place is named
    try:
        first = json.loads(line)
    except json.JSONDecodeError as error:
        if line[error.pos :].strip():
            raise _not_json(error, name, number) from error
        yield from _objects_over_lines(before + line + "".join(text for _, text in lines), name, one_object_is_a_row)
        return
    if not isinstance(first, dict):
        raise _no_object(first, f"{name}, line {number}", name if number == 1 and not one_object_is_a_row else "")
    second = next(((n, text) for n, text in lines if text.strip()), None)
    if second is None:
        yield from _one_object(first, line, name, one_object_is_a_row)
        return
    yield first, line
    yield from _line_by_line([second], name)
    yield from _line_by_line(lines, name)


def bounded_lines(text: IO[str], name: str) -> Iterator[str]:
    """The lines of a file, none of which has no end."""
    while line := text.readline(MOST):
        if len(line) == MOST:
            raise DataError(f"{name}: a line has more than {MOST:,} characters, expected a row on each")
        yield line


def _line_by_line(lines: Iterable[tuple[int, str]], name: str) -> Found:
    for number, line in lines:
        if line.strip():
            try:
                row = json.loads(line.rstrip())  # else an error at the end of a line is named one line later
            except json.JSONDecodeError as error:
                raise _not_json(error, name, number) from error
            yield _object(row, f"{name}, line {number}"), line


def _one_object(found: dict[str, Any], text: str, name: str, is_a_row: bool) -> Found:
    """A file of one object: the rows that it holds under one of `WRAPPERS`, else itself where that may be."""
    lists = {key: rows for key, rows in found.items() if isinstance(rows, list) and rows and _are_objects(rows)}
    for key in WRAPPERS:
        if key in lists:
            if others := [other for other in lists if other in (*WRAPPERS, *_SPLITS) and other != key]:
                raise DataError(
                    f"{name}: lists of rows under {', '.join(dict.fromkeys((key, *others)))}, expected one; write each "
                    "into a file of its own, and name those that are held out under data.validation or data.test"
                )
            yield from ((row, "") for row in lists[key])
            return
    if not is_a_row:
        keys = ", ".join(list(found)[:8]) or "none"
        raise DataError(
            f"{name} holds a JSON object, expected a list of rows: [{{…}}, {{…}}], a row a line, or "
            f'{{"data": [{{…}}, {{…}}]}}; its keys are {keys}'
        )
    yield found, text


def _are_objects(rows: list[Any]) -> bool:
    return all(isinstance(row, dict) for row in rows)


def _objects_over_lines(text: str, name: str, one_object_is_a_row: bool) -> Found:
    """Objects of several lines each, one after the other."""
    decode = json.JSONDecoder().raw_decode
    at, found = _behind_space(text, 0), []
    while at < len(text):
        try:
            row, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise _not_json(error, name, 1) from error
        line = text.count("\n", 0, at) + 1
        found.append((_object(row, f"{name}, line {line}"), text[at:end]))
        at = _behind_space(text, end)
        if at < len(text) and "\n" not in text[end:at]:
            raise _not_json(json.JSONDecodeError("Extra data", text, at), name, 1)
    if len(found) == 1:
        yield from _one_object(*found[0], name, one_object_is_a_row)
    else:
        yield from found


def _list(text: str, rest: IO[str], name: str) -> Found:
    """The rows of a list of objects, each with the text it stands in; of the text a stretch is in memory at a time.

    Args:
        text: how the list begins; `rest` reads on.
    """
    window = _Window(text, rest)
    decode, between, count = json.JSONDecoder().raw_decode, "[", 0
    while window.at_space() == between:
        start = window.skip()
        try:
            row, end = decode(window.text, start) if window.text.startswith("{", start) else (None, 0)
        except json.JSONDecodeError:
            if window.more():  # the row may go on behind what was read
                continue
            row = None
        if row is None:
            break
        yield row, window.text[start:end]
        window.at, between, count = end, ",", count + 1
    before = "[0" if count else ""
    if count and window.at_space() == "]":
        window.at += 1
        if not window.at_space():
            return
        before = "[0]"
    text = window.to_the_end(before)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(error, name, 1) from error
    for number, row in enumerate(content[1:] if count else content, count + 1):
        yield _object(row, f"{name}: row {number}"), ""


class _Window:
    """A text that is read from a file as it is needed, and let go behind `at`; where that is in the file is kept."""

    def __init__(self, text: str, rest: IO[str]):
        self.text, self.at, self._rest = text, 0, rest
        self._lines = self._column = 0  # of the text that was let go

    def more(self) -> bool:
        """Read on, as much again as there is already; whether there was more."""
        self._let_go()
        if len(self.text) >= MOST:
            raise ValueError(f"it has more than {MOST:,} characters")
        new = self._rest.read(max(_AT_ONCE, len(self.text)))
        self.text += new
        return bool(new)

    def _let_go(self) -> None:
        gone = self.text[: self.at]
        lines = gone.count("\n")
        self._column = len(gone) - gone.rfind("\n") - 1 if lines else self._column + len(gone)
        self._lines += lines
        self.text, self.at = self.text[self.at :], 0

    def at_space(self) -> str:
        """The next character that is no white space, "" at the end; `at` is moved to it."""
        while (at := _behind_space(self.text, self.at)) == len(self.text):
            self.at = at
            if not self.more():
                return ""
        self.at = at
        return self.text[at]

    def skip(self) -> int:
        """Where the next value begins behind the character at `at`, which stays."""
        while (start := _behind_space(self.text, self.at + 1)) == len(self.text) and self.more():
            pass
        return start

    def to_the_end(self, instead: str) -> str:
        """All that was not let go, at its line and column, with other text instead of what was."""
        self._let_go()
        gap = "\n" * self._lines + " " * (self._column - (0 if self._lines else len(instead)))
        return instead + gap + self.text + self._rest.read()


def _behind_space(text: str, at: int) -> int:
    """The next position in `text`, from `at` on, that JSON does not take for white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _not_json(error: json.JSONDecodeError, name: str, line: int) -> DataError:
    return DataError(f"{name}, line {error.lineno + line - 1}, column {error.colno}: not JSON: {error.msg}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _no_object(row, where)
    return row


def _no_object(value: Any, where: str, whole: str = "") -> DataError:
    """What to say of a value where a row should stand; `whole` names a file that holds nothing else."""
    if whole:
        return DataError(f"{whole} holds a JSON {_kind(value)}, expected a list of rows: [{{…}}, {{…}}]")
    return DataError(f"{where} is a JSON {_kind(value)}, expected an object with the row's columns: {{…}}")


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")
