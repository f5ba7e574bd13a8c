"""Rows of tokens are those of the data set, wherever they lie and however it came to be, and nothing is copied."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk

from instructft.data.arrow.token_rows import cuts, flat_rows, slices_of, tokens_of
from instructft.data.packing import pack
from instructft.errors import DataError
from tests.helpers.plain_batches import random_rows

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


def test_labels_that_do_not_fit_their_tokens_are_never_read_as_if_they_did() -> None:
    rows = tokens_of(Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2, 9], [3]]}))
    assert [row["labels"].tolist() for row in rows.__getitems__([0, 1])] == [[1, 2, 9], [3]]
    with pytest.raises(DataError, match="row 0 has 2 input_ids and 3 labels"):
        rows.flat()


# --------------------------------------------------------------------------------------------------------------------
# As a data loader takes them
# --------------------------------------------------------------------------------------------------------------------


def random(packed: bool = False, seed: int = 0) -> Dataset:
    return Dataset.from_list(random_rows(20, packed, seed=seed))


def on_disk(folder: Path) -> Dataset:
    random().save_to_disk(folder / "set")
    found = load_from_disk(folder / "set")
    assert found.cache_files  # mapped
    return found


def wide() -> Dataset:
    """Columns whose chunks begin at other rows."""
    rest = random().remove_columns("labels")
    labels = concatenate_datasets([random().select_columns("labels").select(range(n, n + 10)) for n in (0, 10)])
    return concatenate_datasets([rest, labels], axis=1)


KINDS: dict[str, Any] = {
    "plain": lambda _: random(),
    "packs": lambda _: pack(random(), capacity=40),
    "chunks": lambda _: concatenate_datasets([random(seed=seed) for seed in range(4)]),
    "chunks with an empty one": lambda _: concatenate_datasets([random(), random().select([]), random(seed=1)]),
    "a range": lambda _: random().select(range(5, 15)),
    "a selection": lambda _: random().select([7, 3, 3, 19]),
    "another order": lambda _: concatenate_datasets([random(), random(seed=1)]).shuffle(seed=1).select(range(30)),
    "mapped": on_disk,
    "mapped, another order": lambda folder: on_disk(folder).shuffle(seed=1),
    "more columns": lambda _: random().add_column("text", ["x"] * 20),
    "chunks of unequal columns": lambda _: wide(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_the_rows(kind: str, tmp_path: Path) -> None:
    dataset = KINDS[kind](tmp_path)
    rows = tokens_of(dataset)
    assert len(rows) == len(dataset)
    wanted = [{name: value for name, value in row.items() if name != "text"} for row in dataset]
    found = rows.__getitems__(range(len(dataset)))
    assert [{name: value.tolist() for name, value in row.items()} for row in found] == wanted
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in wanted]
    if "seq_lengths" in dataset.column_names:
        assert rows.documents.tolist() == [len(row["seq_lengths"]) for row in wanted]
    again = pickle.loads(pickle.dumps(rows))  # as a worker that is spawned gets it
    assert all(np.array_equal(again[i]["labels"], rows[i]["labels"]) for i in range(len(rows)))


def test_nothing_is_copied(tmp_path: Path) -> None:
    """Two rows lie in one buffer, of the columns and of the files that Arrow has mapped."""
    for dataset in (random(), on_disk(tmp_path), random().shuffle(seed=0)):
        rows = tokens_of(dataset)
        buffer = dataset.data.column("input_ids").chunk(0).values.to_numpy()
        assert all(np.shares_memory(rows[i]["input_ids"], buffer) for i in range(len(rows)))


def test_what_is_no_table_stays_as_it_is() -> None:
    stream = random().to_iterable_dataset()
    assert slices_of(stream) is stream
    rows = slices_of(random())
    assert slices_of(rows) is rows
