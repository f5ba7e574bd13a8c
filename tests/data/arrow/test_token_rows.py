"""Rows of tokens are found wherever they lie: in several tables, in slices of them, behind indices."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets

from instructft.data.arrow.token_rows import cuts, flat_rows, tokens_of

ROWS = [list(range(100 * i, 100 * i + (i * 7) % 5)) for i in range(20)]


def made(rows: list[list[int]], at_once: int) -> Dataset:
    tables = [
        pa.table({name: pa.array(rows[i : i + at_once], pa.list_(pa.int32())) for name in ("input_ids", "labels")})
        for i in range(0, len(rows), at_once)
    ]
    return Dataset(pa.concat_tables(tables))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d,
        lambda d: d.select([5, 3, 3, 19, 0]),
        lambda d: d.select(range(4, 17)),
        lambda d: d.select(range(4, 17)).select([12, 0, 1]),
        lambda d: concatenate_datasets([d.select([2, 1]), d, d.select(range(3))]),
        lambda d: d.select([]),
    ],
)
def test_rows_are_what_the_data_set_gives(change) -> None:
    dataset = change(made(ROWS, 6))
    rows = tokens_of(dataset)
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in dataset]
    columns, starts, lengths = rows.flat()
    for name in ("input_ids", "labels"):
        found = [columns[name][a : a + n].tolist() for a, n in zip(starts, lengths, strict=True)]
        assert found == [row[name] for row in dataset]


@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_blocks_hold_every_row_once_and_few_at_a_time(tokens: int) -> None:
    blocks = [block.lengths for block in tokens_of(made(ROWS, 6)).blocks(tokens)]
    assert np.concatenate(blocks).tolist() == [len(row) for row in ROWS]
    assert all(len(block) == 1 or block.sum() <= tokens for block in blocks)


def test_some_rows_of_some_rows() -> None:
    ids = np.arange(10, dtype=np.int32)
    rows = flat_rows({"input_ids": ids, "labels": -ids}, np.array([3, 2, 5]))
    columns, _, lengths = rows.some(np.array([2, 0])).some(np.array([1, 0])).flat()
    assert columns["input_ids"].tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert lengths.tolist() == [3, 5]
    assert columns["labels"].tolist() == [0, -1, -2, -5, -6, -7, -8, -9]


def test_cuts_lose_no_row() -> None:
    sizes = np.random.default_rng(0).integers(0, 30, 200)
    found = list(cuts(sizes, 40))
    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == 200
    assert all(sizes[a:b].sum() <= 40 for a, b in found)
