"""A file of the cache is there whole or not at all, and its rows are not in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from instructft.data.arrow import store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "instructft-files"


def written(path: Path, rows: int = 1000, batches: int = 10) -> None:
    schema = pa.schema([("n", pa.int64())])
    made = (pa.record_batch([pa.array(np.arange(rows) + i * rows)], schema=schema) for i in range(batches))
    store.write(path, schema, made)


def test_a_file_is_made_once_and_mapped() -> None:
    path = store.cached("abc", written)
    assert store.cached("abc", lambda _: pytest.fail("made again")) == path
    before = pa.total_allocated_bytes()
    dataset = store.mapped(path, "abc")
    assert len(dataset) == 10_000
    assert dataset[9_999] == {"n": 9_999}
    assert pa.total_allocated_bytes() - before < 10_000  # of 80,000 bytes


def test_a_file_that_is_not_finished_is_none(cache: Path) -> None:
    def broken(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        store.cached("abc", broken)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("in_memory", [10, 1000])
def test_a_scratch_array_is_zeros_to_write_on_and_leaves_no_file(cache: Path, in_memory: int) -> None:
    found = store.scratch(100, np.int32, in_memory)
    assert found.tolist() == [0] * 100
    found[3:5] = 7
    assert found.sum() == 14
    assert isinstance(found, np.memmap) == (in_memory < 100)
    assert not cache.exists() or list(cache.iterdir()) == []
