"""A row is read exactly as it stands in its file, whatever type of file; a fault is named with its line."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import http.server
import io
import json
import lzma
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from instructft.data.files.kinds import SUFFIXES, suffix_of
from instructft.data.readers import ROW as COLUMN
from instructft.data.readers import opened, read_file, rows
from instructft.errors import DataError

# What libraries that guess types change: numbers, missing values, dates, booleans, white space, quotes.
AWKWARD = [
    {"instruction": "42", "output": "NA"},
    {"instruction": "2024-05-01", "output": "2024-05-01T10:00:00Z"},
    {"instruction": 'say "x", y', "output": "two\nlines\n\nand\tmore\r\n"},
    {"instruction": "null", "output": "true"},
    {"instruction": " 007 ", "output": "1e5"},
    {"instruction": "é🙂\u2028日本", "output": "[]"},
    {"instruction": "nan", "output": ""},
]


def packed(data, suffix):
    """Bytes as a packed file of this ending holds them."""
    if suffix.endswith(".gz"):
        return gzip.compress(data)
    if suffix.endswith(".bz2"):
        return bz2.compress(data)
    if suffix.endswith(".xz"):
        return lzma.compress(data)
    if suffix.endswith(".zst"):
        import pyarrow as pa

        return pa.compress(data, "zstd", asbytes=True)
    return data


def write(folder, suffix, content=AWKWARD):
    """Write rows to a file of a type."""
    path = folder / f"rows{suffix}"
    file = io.BytesIO()
    if suffix.startswith((".parquet", ".arrow")):
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pylist(content)
        if suffix.startswith(".parquet"):
            parquet.write_table(table, file)
        else:
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    elif suffix.startswith((".csv", ".tsv")):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(content[0]), delimiter="," if suffix.startswith(".csv") else "\t")
        writer.writeheader()
        writer.writerows(content)
        file.write(text.getvalue().encode())
    elif suffix == ".json":
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())
    else:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode())
    path.write_bytes(packed(file.getvalue(), suffix))
    return path


def read(path):
    """All rows of a file, as they come out of the `Dataset`."""
    raw = read_file(path, suffix_of(path.name), path.name)
    return [json.loads(text) for text in raw[COLUMN]]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_type_of_file_gives_the_rows_that_were_written(tmp_path, suffix):
    assert read(write(tmp_path, suffix)) == AWKWARD


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, suffix):
    path = write(tmp_path, suffix)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == AWKWARD


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_values_of_json_keep_their_type_row_by_row(tmp_path, suffix):
    mixed = [{"a": "5", "b": [1, {"c": None}]}, {"a": 5, "b": "x"}, {"a": None, "extra": 1.5}, {"a": 2**70}, {}]
    assert read(write(tmp_path, suffix, mixed)) == mixed


def test_a_json_file_may_hold_one_row_a_line_and_may_begin_with_white_space(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in AWKWARD), encoding="utf-8")
    assert read(path) == AWKWARD
    path.write_text(f"\n  {json.dumps(AWKWARD)}\n", encoding="utf-8")
    assert read(path) == AWKWARD


def test_empty_lines_and_windows_line_ends_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "1"}\r\n\r\n  \n{"a": "2"}')
    (tmp_path / "rows.csv").write_bytes(b"a,b\r\n1,\r\n\r\n2,x\r\n")
    assert read(tmp_path / "rows.jsonl") == [{"a": "1"}, {"a": "2"}]
    assert read(tmp_path / "rows.csv") == [{"a": "1", "b": ""}, {"a": "2", "b": "x"}]


def test_a_cell_may_be_longer_than_pythons_own_limit(tmp_path):
    row = [{"instruction": "a", "output": "x" * 200_000}]
    assert read(write(tmp_path, ".csv", row)) == row


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_changed_file_is_read_again_even_when_its_time_and_size_are_the_same(tmp_path, suffix):
    path = write(tmp_path, suffix, [{"a": "first"}])
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert read(path) == [{"a": "first"}]
    write(tmp_path, suffix, [{"a": "other"}])
    os.utime(path, ns=times)
    assert read(path) == [{"a": "other"}]


ROW = '{"instruction": "a", "output": "b"}'
BAD = [
    ("a.json", "", "a.json is empty"),
    ("a.jsonl", "\n\n", "a.jsonl holds no rows"),
    ("a.json", "[]", "a.json holds no rows"),
    ("a.csv", "instruction,output\n", "a.csv holds no rows"),
    ("a.json", '[{"a": 1},\n {"b": }]', "a.json, line 2, column 8: not JSON: Expecting value"),
    ("a.json", f"[{ROW}", "a.json, line 1, column 37: not JSON: Expecting ',' delimiter"),
    ("a.json", ROW, "a.json holds a JSON object, expected a list of rows"),
    ("a.json", '{"version": [1]}', "a.json holds a JSON object, expected a list of rows"),
    ("a.json", '{"version": 1,\n"d": {}}', "a.json holds a JSON object, expected a list of rows"),
    ("a.jsonl", f"{ROW[:-1]}\n{ROW}\n", "a.jsonl, line 2, column 1: not JSON: Expecting ',' delimiter"),
    ("a.jsonl", '\n{\n"a": 1\n}\n{\n"a": }\n', "a.jsonl, line 6, column 6: not JSON: Expecting value"),
    ("a.json", '"text"', "a.json holds a JSON text, expected a list of rows"),
    ("a.json", f"[{ROW}, 3]", "a.json: row 2 is a JSON number, expected an object"),
    ("a.json", f"[{ROW}, null]", "a.json: row 2 is a JSON null, expected an object"),
    ("a.jsonl", f'{ROW}\n\n{{"a",}}\n', "a.jsonl, line 3, column 5: not JSON: Expecting ':' delimiter"),
    ("a.jsonl", f"{ROW}\n[{ROW}]\n", "a.jsonl, line 2 is a JSON list, expected an object"),
    ("a.jsonl", f"{ROW}\n{ROW[:20]}", "a.jsonl, line 2, column"),
    (
        "a.jsonl",
        b'{"a": "b"}\n{"a": "\xff"}\n',
        "a.jsonl: line 2, byte 8 is not UTF-8 (found 0xff); save the file as UTF-8",
    ),
    ("a.json", b'[{"a": "\xe9"}]', "a.json: line 1, byte 9 is not UTF-8 (found 0xe9)"),
    ("a.csv", b"a,b\n1,\xe9\n", "a.csv: line 2, byte 3 is not UTF-8 (found 0xe9)"),
    ("a.jsonl", ROW.encode("utf-16"), "a.jsonl: line 1, byte 1 is not UTF-8 (found 0xff)"),
    ("a.jsonl.gz", b"not gzip", "a.jsonl.gz could not be read: Not a gzipped file"),
    (
        "a.jsonl.gz",
        gzip.compress(f"{ROW}\n".encode() * 99, mtime=0)[:40],
        "a.jsonl.gz could not be read: Compressed file ended",
    ),
    ("a.jsonl.gz", gzip.compress(b'{"a": "\xff"}\n', mtime=0), "a.jsonl.gz: line 1, byte 8 is not UTF-8"),
    ("a.json.zst", b"not zstd", "a.json.zst could not be read: "),
    ("a.json.xz", b"not xz", "a.json.xz could not be read: "),
    ("a.json.bz2", b"not bzip2", "a.json.bz2 could not be read: "),
    ("a.arrow", b"ARROW1 nothing", "a.arrow is not a whole Arrow file"),
    ("a.parquet", b"PAR1 nothing", "a.parquet is not a whole Parquet file"),
    ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv, line 3: found 3 cells, expected 2 as in the header"),
    ("a.csv", "a,b\n1,2,3\n4,5,6\n", "a.csv, line 2: found 3 cells, expected 2 as in the header"),
    ("a.csv", 'a,b\n"1\n2",3\n1\n', "a.csv, line 4: found 1 cells, expected 2 as in the header"),
    ("a.csv", 'a,b\n"1,2\n3,4\n', "a.csv, line 3: not CSV: unexpected end of data"),
    ("a.csv", "a,b,a\n1,2,3\n", "a.csv, line 1: the header names the column a twice"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):  # a failure leaves nothing in the cache that a second run would take for the file
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(message)


def test_rows_come_one_by_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{ROW}\n{{broken\n", encoding="utf-8")
    stream = rows(path, ".jsonl", "rows.jsonl")
    assert next(stream) == json.loads(ROW)
    with pytest.raises(DataError, match="line 2"):
        next(stream)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a/rows.JSONL.gz", ".jsonl.gz"),
        ("rows.v2.json", ".json"),
        ("https://example.org/x/rows.csv?raw=true&y=a.json", ".csv"),
        ("rows.txt", ".txt"),
        ("rows", ""),
    ],
)
def test_suffix_of(location, expected):
    assert suffix_of(location) == expected


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": "x"}, {"a": "y"}]',
        '\ufeff [\n {"a": "é \\ud83d\\ude00"}\r\n,\t{"a": "z", "a": "last", "n": NaN, "m": [1, {"b": null}]} ]\n ',
        '[{"a": 1e400}]',
    ],
)
def test_the_text_of_a_row_is_kept_as_it_stands(tmp_path: Path, text: str) -> None:
    """Rows of a list are not written anew; what they say is the same."""
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    kept = read_file(path, ".json", path.name)[COLUMN]
    whole = json.loads(text.removeprefix("\ufeff"))
    assert repr([json.loads(row) for row in kept]) == repr(whole) == repr(list(rows(path, ".json", path.name)))
    assert all(row in text for row in kept)


@pytest.mark.parametrize(
    "text", ["[{}, ]", "[{} {}]", "[{}", "[{}] x", "[{}, 5]", "{}{}", "[", "[,]", '[{"a": "\x01"}]']
)
def test_what_is_no_list_of_rows_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json"):
        read_file(path, ".json", path.name)


@contextmanager
def serving(answer):
    """The address of a server that does as it is told with every request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):  # the other side leaves
                answer(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        server.shutdown()


BODY = b'{"instruction": "a", "output": "b"}\n' * 20


def test_a_body_of_no_known_length_is_not_taken_for_the_whole_file():
    def short(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(BODY[: len(BODY) // 2])

    with serving(short) as url, pytest.raises(OSError, match="neither says how long the file is"), opened(url) as body:
        body.read()


def test_a_body_that_trickles_is_given_up(monkeypatch):
    monkeypatch.setattr("instructft.data.readers.PATIENCE", 0.2)

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BODY)))
        handler.end_headers()
        for byte in BODY:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)

    with serving(drip) as url, pytest.raises(OSError, match=r"it trickles: \d+ bytes in \d+ s"), opened(url) as body:
        body.read()


def test_chunks_and_known_lengths_are_read_whole():
    def chunked(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for part in (BODY[:100], BODY[100:], b""):
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))

    with serving(chunked) as url, opened(url) as body:
        assert body.read() == BODY
