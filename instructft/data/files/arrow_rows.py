"""Rows of Parquet and Arrow files, as the values that JSON has: nobody guesses a type, and none is lost.

Text that was stored as JSON (a column of `datasets`' type `Json`, or Arrow's) is the value that the JSON says. What
JSON has no type for is text: a date `2024-05-01`, a time `2024-05-01T10:00:00`, a decimal `1.50`, bytes in UTF-8.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from instructft.data.files.kinds import refuse_bomb
from instructft.errors import DataError
from instructft.formatting import first_line

_ROWS_AT_ONCE = 1000
MOST_COLUMNS = 10_000  # each is looked at by name, in every row

Change = Callable[[Any], Any]  # a value that is not null, to the value that JSON has


def parquet_rows(file: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a Parquet file, a thousand at a time in memory."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        whole = parquet.ParquetFile(file)
        changes = _changes(whole.schema_arrow, name)
        read, size = 0, file.seek(0, io.SEEK_END)
        for batch in whole.iter_batches(batch_size=_ROWS_AT_ONCE):
            read += batch.nbytes
            refuse_bomb(read, size)
            yield from _rows(batch, changes)
    except (pa.ArrowException, SystemError) as error:
        raise DataError(f"{name} is not a whole Parquet file: {first_line(error)}") from error


def arrow_rows(file: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of an Arrow file (also `.feather`) or stream, as `save_to_disk` writes it."""
    import pyarrow as pa

    try:
        source = pa.PythonFile(file, mode="r")
        try:
            reader: Any = pa.ipc.open_stream(source)
            batches: Iterator[Any] = iter(reader)
        except pa.ArrowInvalid:  # not a stream: a file, whose index stands at its end
            file.seek(0)
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        changes = _changes(reader.schema, name)
        for batch in batches:
            batch.validate(full=True)  # a damaged file's offsets would be followed out of its memory
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from _rows(batch.slice(start, _ROWS_AT_ONCE), changes)
    except (pa.ArrowException, SystemError) as error:
        raise DataError(f"{name} is not a whole Arrow file: {first_line(error)}") from error


def _rows(batch: Any, changes: Mapping[str, Change]) -> Iterator[tuple[dict[str, Any], str]]:
    for row in batch.to_pylist():
        for column, change in changes.items():
            if row[column] is not None:
                row[column] = change(row[column])
        yield row, ""


def _changes(schema: Any, name: str) -> dict[str, Change]:
    """What is to be done to the values of each column; a column that needs nothing is not named."""
    if len(schema.names) > MOST_COLUMNS:
        raise DataError(f"{name} has {len(schema.names):,} columns, expected at most {MOST_COLUMNS:,}")
    features: Any = {}
    if b"huggingface" in (schema.metadata or {}):
        try:
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"] or {}
        except (ValueError, KeyError, TypeError):
            features = {}
    found = {field.name: _change(field.type, _below(features, field.name)) for field in schema}
    return {name: change for name, change in found.items() if change}


def _below(feature: Any, key: str) -> Any:
    return feature.get(key) if isinstance(feature, Mapping) else None


def _change(kind: Any, feature: Any) -> Change | None:
    """How a value of an Arrow type becomes one of JSON; `feature` is what `datasets` noted of it, if anything."""
    import pyarrow as pa

    is_json = isinstance(feature, Mapping) and feature.get("_type") == "Json"
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.json" or is_json:
            return _from_json
        kind = kind.storage_type
    if is_json:
        return _from_json
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind) or types.is_integer(kind):
        return None
    if types.is_float32(kind) or types.is_float64(kind) or types.is_null(kind) or types.is_string_view(kind):
        return None
    if types.is_float16(kind):
        return float
    if types.is_struct(kind):
        inside = {field.name: _change(field.type, _below(feature, field.name)) for field in kind}
        named = {name: change for name, change in inside.items() if change}
        return (lambda value: _in_struct(value, named)) if named else None
    if types.is_map(kind):
        change = _change(kind.item_type, None)
        return lambda pairs: {str(key): _or_null(value, change) for key, value in pairs}
    if hasattr(kind, "value_type"):  # the lists of Arrow
        of = feature[0] if isinstance(feature, list) and feature else _below(feature, "feature")
        inner = _change(kind.value_type, of)
        return (lambda values: [_or_null(value, inner) for value in values]) if inner else None
    return _as_text


def _in_struct(value: dict[str, Any], changes: Mapping[str, Change]) -> dict[str, Any]:
    return {name: _or_null(inner, changes.get(name)) for name, inner in value.items()}


def _or_null(value: Any, change: Change | None) -> Any:
    return value if value is None or change is None else change(value)


def _from_json(value: Any) -> Any:
    """The value that a JSON text says; a text that is no JSON stays what it is."""
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return f"<{len(value):,} bytes that are no text>"
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)
