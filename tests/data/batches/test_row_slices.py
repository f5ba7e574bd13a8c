"""Rows as slices are the rows of the data set, however it came to be, and nothing is copied."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk

from instructft.data.batches.row_slices import RowSlices, row_slices
from instructft.data.packing import pack
from tests.helpers.plain_batches import random_rows


def made(packed: bool = False, seed: int = 0) -> Dataset:
    return Dataset.from_list(random_rows(20, packed, seed=seed))


def on_disk(folder: Path) -> Dataset:
    made().save_to_disk(folder / "set")
    found = load_from_disk(folder / "set")
    assert found.cache_files  # mapped
    return found


def wide() -> Dataset:
    """Columns whose chunks begin at other rows."""
    rest = made().remove_columns("labels")
    labels = concatenate_datasets([made().select_columns("labels").select(range(n, n + 10)) for n in (0, 10)])
    return concatenate_datasets([rest, labels], axis=1)


KINDS: dict[str, Any] = {
    "plain": lambda _: made(),
    "packs": lambda _: pack(made(), capacity=40),
    "chunks": lambda _: concatenate_datasets([made(seed=seed) for seed in range(4)]),
    "chunks with an empty one": lambda _: concatenate_datasets([made(), made().select([]), made(seed=1)]),
    "a range": lambda _: made().select(range(5, 15)),
    "a selection": lambda _: made().select([7, 3, 3, 19]),
    "another order": lambda _: concatenate_datasets([made(), made(seed=1)]).shuffle(seed=1).select(range(30)),
    "mapped": on_disk,
    "mapped, another order": lambda folder: on_disk(folder).shuffle(seed=1),
    "more columns": lambda _: made().add_column("text", ["x"] * 20),
    "chunks of unequal columns": lambda _: wide(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_the_rows(kind: str, tmp_path: Path) -> None:
    dataset = KINDS[kind](tmp_path)
    rows = RowSlices(dataset)
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
    for dataset in (made(), on_disk(tmp_path), made().shuffle(seed=0)):
        rows = RowSlices(dataset)
        buffer = dataset.data.column("input_ids").chunk(0).values.to_numpy()
        assert all(np.shares_memory(rows[i]["input_ids"], buffer) for i in range(len(rows)))


def test_what_is_no_table_stays_as_it_is() -> None:
    stream = made().to_iterable_dataset()
    assert row_slices(stream) is stream
    rows = row_slices(made())
    assert row_slices(rows) is rows
