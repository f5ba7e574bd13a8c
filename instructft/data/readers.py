"""Reads a data file row by row, exactly as it stands there, or says at which line and why that is not possible.

Libraries that read JSON and CSV guess types: "42" becomes a number, "NA" a missing value, "2024-05-01" a time. Here
every value stays what it was, so that the same rows give the same tokens from every type of file.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from instructft.errors import DataError
from instructft.formatting import first_line

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".csv", ".parquet")

# The column of a `Dataset` made from a JSON or CSV file: each row as JSON text, so that Arrow has no type to guess.
ROW = "__row__"
_ROWS_AT_ONCE = 1000


def suffix_of(location: str) -> str:
    """The ending of a path or URL by which a file is read; for an unknown one what stands behind the last dot.

    >>> suffix_of("https://example.org/rows.jsonl.gz?download=true")
    '.jsonl.gz'
    """
    name = Path(location.split("?")[0]).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), Path(name).suffix)


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The body of a file on the web, which must be read to its end.

    Raises:
        OSError: bytes that were promised did not come.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "instructft"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        yield answer
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
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty")
    if suffix == ".parquet":
        return _parquet_file(path, name)
    digest = hashlib.sha256(f"{suffix} 2 ".encode())  # the number changes when a reader below gives other rows
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    fingerprint = digest.hexdigest()[:32]
    table = _cached(fingerprint, lambda whole: _write(path, suffix, name, whole))
    return Dataset(MemoryMappedTable.from_file(str(table)), fingerprint=fingerprint)


def _cached(fingerprint: str, make: Callable[[Path], None]) -> Path:
    """The file of this fingerprint in the cache, made first if it is not there."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "instructft-files"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{fingerprint}.arrow"
    if not copy.is_file():
        whole = folder / f"{fingerprint}.{os.getpid()}"  # moved into place when it is: others may read the copy
        try:
            make(whole)
            whole.replace(copy)
        finally:
            whole.unlink(missing_ok=True)
    return copy


def _write(source: Path, suffix: str, name: str, path: Path) -> None:
    """Write the rows of a file as an Arrow stream of one column, each row as JSON text."""
    import pyarrow as pa

    schema = pa.schema([(ROW, pa.string())])
    texts = (text or json.dumps(row) for row, text in _read(source, suffix, name))
    first = list(islice(texts, _ROWS_AT_ONCE))
    if not first:
        raise DataError(f"{name} holds no rows")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while first:
            writer.write_batch(pa.record_batch([pa.array(first, type=pa.string())], schema=schema))
            first = list(islice(texts, _ROWS_AT_ONCE))


def columns_of(raw: Dataset) -> list[str]:
    """The columns of the rows, for a JSON file those of its first thousand rows."""
    if ROW not in raw.column_names:
        return list(raw.column_names)
    names: dict[str, None] = {}  # a set that keeps its order
    for text in raw[:1000][ROW]:
        names.update(dict.fromkeys(json.loads(text)))
    return list(names)


def rows(path: Path, suffix: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, one after the other; of any but `.json` few are in memory at a time."""
    return (row for row, _ in _read(path, suffix, name))


def rows_of(file: IO[bytes], suffix: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of an open file."""
    return (row for row, _ in _READ[suffix](_unzipped(file, suffix), name))


def _read(path: Path, suffix: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row, and its JSON text where it stands in the file as such, else ""."""
    try:
        with path.open("rb") as file:
            yield from _READ[suffix](_unzipped(file, suffix), name)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {_not_utf8(path, suffix, error)}; save the file as UTF-8") from error
    except (OSError, EOFError) as error:  # a gzip file that is none, or not whole
        raise DataError(f"{name} could not be read: {error}") from error


def _unzipped(file: IO[bytes], suffix: str) -> Any:
    return gzip.GzipFile(fileobj=file) if suffix.endswith(".gz") else file


def _jsonl(file: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{name}, line {number}, column {error.colno}: not JSON: {error.msg}") from error
            yield _object(row, f"{name}, line {number}"), line


def _json(file: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    text = file.read().decode("utf-8-sig")
    if found := _objects(text):
        yield from found
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text[: error.pos]:  # one object a line: JSONL under another name
            yield from _jsonl(io.BytesIO(text.encode()), name)
            return
        where = f"{name}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not JSON: {error.msg}") from error
    if not isinstance(content, list):
        raise DataError(f"{name} holds a JSON {_kind(content)}, expected a list of rows: [{{…}}, {{…}}]")
    for number, row in enumerate(content, 1):
        yield _object(row, f"{name}: row {number}"), ""


def _objects(text: str) -> list[tuple[dict[str, Any], str]]:
    """The rows of a list of objects, each with the text it stands in; none where it is anything else."""
    found = []
    decode = json.JSONDecoder().raw_decode
    at, between = _behind_space(text, 0), "["
    while text[at : at + 1] == between:
        start = _behind_space(text, at + 1)
        try:
            row, end = decode(text, start)
        except json.JSONDecodeError:
            return []
        if not isinstance(row, dict):
            return []
        found.append((row, text[start:end]))
        at, between = _behind_space(text, end), ","
    return found if text[at : at + 1] == "]" and _behind_space(text, at + 1) == len(text) else []


def _behind_space(text: str, at: int) -> int:
    """The next position in `text`, from `at` on, that JSON does not take for white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {_kind(row)}, expected an object with the row's columns: {{…}}")
    return row


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _csv(file: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    csv.field_size_limit(1 << 30)  # characters in a cell; Python's own limit is shorter than a long conversation
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise DataError(f"{name}, line 1: the header names the column {', '.join(twice)} twice")
        begins = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{name}, line {begins}: found {len(cells)} cells, expected {len(header)} as in the header; "
                    'a cell that holds a comma, a quote or a line break stands in "…", with each quote in it doubled'
                )
            if cells:
                yield dict(zip(header, cells, strict=True)), ""
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not CSV: {error}") from error


def _parquet(file: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from ((row, "") for row in batch.to_pylist())
    except pa.ArrowException as error:
        raise DataError(f"{name} is not a whole Parquet file: {first_line(error)}") from error


_READ = {".jsonl.gz": _jsonl, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _not_utf8(path: Path, suffix: str, error: UnicodeDecodeError) -> str:
    """Name the first byte that is not UTF-8 by its place in the whole file: `error` counts within a block."""
    with path.open("rb") as file:
        for number, line in enumerate(_unzipped(file, suffix), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                return f"line {number}, byte {found.start + 1} is not UTF-8 (found 0x{line[found.start]:02x})"
    return str(error)


def _parquet_file(path: Path, name: str) -> Dataset:
    """The rows of a Parquet file with its own types, which nobody guessed."""
    import pyarrow as pa
    from datasets import load_dataset
    from pyarrow import parquet

    try:
        parquet.ParquetFile(path).close()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a whole Parquet file: {first_line(error.__cause__ or error)}") from error
    return load_dataset("parquet", data_files=str(path), split="train")
