"""Endings and packings of files, and what is said of a file that is none of rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from instructft.data.files.kinds import OTHERS, SUFFIXES, kind_of, not_known, suffix_of
from instructft.data.readers import rows
from instructft.errors import DataError
from tests.data.test_readers import AWKWARD, packed


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a/rows.JSONL.gz", ".jsonl.gz"),
        ("rows.v2.json", ".json"),
        ("https://example.org/x/rows.csv?raw=true&y=a.json", ".csv"),
        ("https://example.org/x/rows.tsv.zst#top", ".tsv.zst"),
        ("what?.jsonl", ".jsonl"),
        ("many?.parquet", ".parquet"),
        ("hf://datasets/a/b@main/which#1?.csv", ".csv"),
        ("notes.txt.gz", ".txt.gz"),
        ("rows.txt", ".txt"),
        ("rows", ""),
    ],
)
def test_suffix_of(location: str, expected: str) -> None:
    assert suffix_of(location) == expected


def test_every_suffix_is_of_a_kind_and_found_again() -> None:
    for suffix in SUFFIXES:
        assert suffix_of(f"x{suffix}") == suffix
        assert suffix.startswith(kind_of(suffix))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_packed_file_under_a_plain_name_is_read(tmp_path: Path, suffix: str) -> None:
    import json

    path = tmp_path / "rows.jsonl"
    path.write_bytes(packed("".join(json.dumps(row) + "\n" for row in AWKWARD).encode(), suffix))
    assert list(rows(path, ".jsonl", "rows.jsonl")) == AWKWARD


def test_two_packed_parts_end_to_end_are_one_file(tmp_path: Path) -> None:
    import pyarrow as pa

    for suffix, pack in (("gz", gzip.compress), ("zst", lambda data: pa.compress(data, "zstd", asbytes=True))):
        path = tmp_path / f"rows.jsonl.{suffix}"
        path.write_bytes(pack(b'{"a": "1"}\n') + pack(b'{"a": "2"}\n'))
        assert list(rows(path, f".jsonl.{suffix}", path.name)) == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize("ending", [*OTHERS, ".txt.gz", ".docx", ""])
def test_what_is_not_read_is_told_with_a_way_out(ending: str) -> None:
    said = not_known(f"mine{ending}")
    assert said.startswith(f"mine{ending} ")
    assert "save" in said or "write" in said or "unpack" in said or "files may be .jsonl" in said or "export" in said


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_bomb_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr("instructft.data.files.kinds.LARGE", 1 << 20)
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(packed(b'{"instruction": "a", "output": "' + b"a" * (4 << 20) + b'"}\n', suffix))
    with pytest.raises(DataError, match=r"grow to more than 200 times the [0-9,]+ bytes that they were read from"):
        list(rows(path, f".jsonl{suffix}", path.name))
    honest = b"".join(b'{"instruction": "%d", "output": "%x"}\n' % (i, i * 7919) for i in range(40_000))
    path.write_bytes(packed(honest, suffix))
    assert len(list(rows(path, f".jsonl{suffix}", path.name))) == 40_000


def test_so_is_one_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr("instructft.data.files.kinds.LARGE", 1 << 20)
    path = tmp_path / "rows.parquet"
    table = pa.table({"instruction": ["a " * 500] * 4_000, "output": ["b"] * 4_000})
    parquet.write_table(table, path, compression="zstd")
    with pytest.raises(DataError, match="grow to more than 200 times"):
        list(rows(path, ".parquet", path.name))
