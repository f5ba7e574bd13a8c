"""Reads a data file row by row, exactly as it stands there, or says at which line and why that is not possible.

Libraries that read JSON and CSV guess types: "42" becomes a number, "NA" a missing value, "2024-05-01" a time. Here
every value stays what it was, so that the same rows give the same tokens from every type of file, here or on the Hub,
read whole or streamed. The layouts themselves are in `instructft.data.files`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from instructft.data.arrow.store import cached, mapped, write
from instructft.data.files.arrow_rows import arrow_rows, parquet_rows
from instructft.data.files.csv_rows import csv_rows
from instructft.data.files.json_rows import json_rows
from instructft.data.files.kinds import kind_of, unpacked
from instructft.errors import DataError
from instructft.formatting import first_line
from instructft.prompt.layouts.transcripts import is_of_a_tree, trees

if TYPE_CHECKING:
    from datasets import Dataset

# The one column of a `Dataset` made from a file: each row as JSON text, so that Arrow has no type to guess.
ROW = "__row__"
PATIENCE, PACE = 20, 1024  # seconds, and bytes a second that a body must bring after these
_ROWS_AT_ONCE, _CHARACTERS_AT_ONCE = 1000, 1 << 23


class _Steady(io.RawIOBase):
    """A body that comes at a pace; one that trickles would hold a run for ever, since each wait by itself is short."""

    def __init__(self, answer: Any):
        self.answer, self.bytes, self.began = answer, 0, time.monotonic()

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def readinto(self, buffer: Any) -> int:
        # at most what has come: to fill the buffer would be to wait
        content = self.answer.read1(len(buffer))
        buffer[: len(content)] = content
        self.bytes += len(content)
        seconds = time.monotonic() - self.began
        if content and seconds > PATIENCE and self.bytes < PACE * seconds:
            raise OSError(f"it trickles: {self.bytes:,} bytes in {seconds:.0f} s; download it, and name it as path")
        return len(content)


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The body of a file on the web, which must be read to its end.

    Raises:
        OSError: bytes that were promised did not come.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "instructft"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.headers.get("Content-Length") is None and not getattr(answer, "chunked", False):
            raise OSError(
                "the server neither says how long the file is nor sends it in chunks, so nobody could tell whether all "
                "of it came; download it, and name it as path"
            )
        yield _Steady(answer)
        if missing := getattr(answer, "length", None):
            promised = int(answer.headers["Content-Length"])
            raise OSError(f"the connection broke after {promised - missing:,} of {promised:,} bytes")


def download(url: str) -> Path:
    """Fetch a file; with HF_HUB_OFFLINE=1 the copy of last time is taken.

    Raises:
        OSError: it could not be fetched whole.
    """
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "instructft-urls"
    copy = folder / hashlib.sha256(url.encode()).hexdigest()[:32]
    if config.HF_HUB_OFFLINE:
        if not copy.is_file():
            raise OSError("HF_HUB_OFFLINE is set, and there is no copy of the file from an earlier run")
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    whole = copy.with_suffix(f".{os.getpid()}")  # moved into place when it is: another process may read the copy
    try:
        with opened(url) as answer, whole.open("wb") as file:
            shutil.copyfileobj(answer, file)
        whole.replace(copy)
    finally:
        whole.unlink(missing_ok=True)
    return copy


def read_file(path: Path, suffix: str, name: str) -> Dataset:
    """The rows of a file as a `Dataset`, cached on disk by the file's content.

    Args:
        suffix: one of `SUFFIXES`.
        name: what the file is called in messages.

    Raises:
        DataError: the file cannot be read; with the line, column or row where there is one.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty")
    digest = hashlib.sha256(f"{suffix} 4 ".encode())  # the number changes when a reader below gives other rows
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    fingerprint = digest.hexdigest()[:32]
    return mapped(cached(fingerprint, lambda whole: _write(path, suffix, name, whole)), fingerprint)


def _write(source: Path, suffix: str, name: str, path: Path) -> None:
    """Write the rows of a file as an Arrow stream of one column, each row as JSON text."""
    import pyarrow as pa

    schema = pa.schema([(ROW, pa.string())])
    texts = (text or json.dumps(row) for row, text in _read(source, suffix, name))
    some = _some(texts)
    first = next(some, None)
    if first is None:
        raise DataError(f"{name} holds no rows")
    columns = (pa.array(found, type=pa.string()) for found in chain([first], some))
    write(path, schema, (pa.record_batch([column], schema=schema) for column in columns))


def _some(texts: Iterable[str]) -> Iterator[list[str]]:
    """The rows in lists of a thousand, or fewer where they are long."""
    found, size = [], 0
    for text in texts:
        found.append(text)
        size += len(text)
        if len(found) == _ROWS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield found
            found, size = [], 0
    if found:
        yield found


def columns_of(raw: Dataset) -> list[str]:
    """The columns of the first thousand rows."""
    names: dict[str, None] = {}  # a set that keeps its order
    for text in raw[:1000][ROW]:
        names.update(dict.fromkeys(json.loads(text)))
    return list(names)


def rows(path: Path, suffix: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, one after the other; of any but a list in JSON few are in memory at a time."""
    return (row for row, _ in _read(path, suffix, name))


def rows_of(file: IO[bytes], suffix: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of an open file, which must be able to `seek` where it is Parquet or Arrow."""
    return (row for row, _ in _taken(_READ[kind_of(suffix)](unpacked(file, suffix), name), name))


def _read(path: Path, suffix: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row, and its JSON text where it stands in the file as such, else ""."""
    import zlib
    from lzma import LZMAError

    try:
        with path.open("rb") as file:
            yield from _taken(_READ[kind_of(suffix)](unpacked(file, suffix), name), name)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {_not_utf8(path, suffix, error)}; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error, LZMAError) as error:  # a packed file that is none, or not whole
        raise DataError(f"{name} could not be read: {first_line(error)}") from error


def _taken(found: Iterator[tuple[dict[str, Any], str]], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a reader; what no parser takes is an error of the file, named by the rows before it.

    Where each is a message of a tree, as in OpenAssistant's flat files, a row is a tree.
    """
    count = 0
    try:
        first = next(found, None)
        if first is None:
            return
        found = chain([first], found)
        if is_of_a_tree(first[0]):
            yield from ((tree, "") for tree in trees((row for row, _ in found), name))
            return
        for count, one in enumerate(found, 1):  # noqa: B007
            yield one
    except UnicodeDecodeError:
        raise
    except RecursionError as error:
        raise DataError(f"{name}: row {count + 1} is nested too deep to be read") from error
    except ValueError as error:
        what = (
            "holds a number of too many digits" if "digits" in str(error) else f"is not to be read: {first_line(error)}"
        )
        raise DataError(f"{name}: row {count + 1} {what}") from error


_READ: dict[str, Callable[[Any, str], Iterator[tuple[dict[str, Any], str]]]] = {
    ".jsonl": partial(json_rows, one_object_is_a_row=True),
    ".ndjson": partial(json_rows, one_object_is_a_row=True),
    ".json": partial(json_rows, one_object_is_a_row=False),
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, separator="\t"),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}


def _not_utf8(path: Path, suffix: str, error: UnicodeDecodeError) -> str:
    """Name the first byte that is not UTF-8 by its place in the whole file: `error` counts within a block."""
    with path.open("rb") as file:
        for number, line in enumerate(unpacked(file, suffix), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                return f"line {number}, byte {found.start + 1} is not UTF-8 (found 0x{line[found.start]:02x})"
    return str(error)
