"""Rows of a data set as slices of its Arrow columns: a batch is fetched without making a Python number."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

COLUMNS = ("input_ids", "labels", "seq_lengths", "seq_starts")  # the last two where rows are packs, or turns folded


class RowSlices:
    """What a data loader takes in place of a map-style data set: each row a dict of views into Arrow's memory.

    `datasets` makes a list of Python numbers of every row, token by token, and a collator turns it back; for 32 packs
    of 1,024 tokens that takes longer than a GPU takes for the step of a small model. Here nothing is copied before the
    collator writes a batch, and files that Arrow has mapped stay where they are.

    >>> from datasets import Dataset
    >>> rows = RowSlices(Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "labels": [[-100, 6], [-100, 8]]}))
    >>> rows[1]["labels"]
    array([-100,    8])
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._columns = {name: _Lists(dataset.data.column(name)) for name in COLUMNS if name in dataset.column_names}
        # a data set that is a selection from a larger one, or another order of it: row -> row of the table
        chosen = dataset._indices
        self._rows = None if chosen is None else chosen.column(0).to_numpy()

    def __reduce__(self) -> Any:
        return type(self), (self.dataset,)  # a worker that is spawned maps the files anew

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        place = int(row if self._rows is None else self._rows[row])
        return {name: column[place] for name, column in self._columns.items()}

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self[row] for row in rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row: (rows,) int64."""
        return self._lengths("input_ids")

    @property
    def documents(self) -> np.ndarray:
        """Documents of each pack: (rows,) int64."""
        return self._lengths("seq_lengths")

    def _lengths(self, name: str) -> np.ndarray:
        found = self._columns[name].lengths()
        return found if self._rows is None else found[self._rows]


class _Lists:
    """A column of lists: row i of a chunk is `values[offsets[i] : offsets[i + 1]]`."""

    def __init__(self, column: pa.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        self._first = np.cumsum([0, *map(len, chunks)])[:-1].tolist()  # the first row of each chunk

    def __getitem__(self, row: int) -> np.ndarray:
        i = bisect_right(self._first, row) - 1
        offsets, values = self._chunks[i]
        row -= self._first[i]
        found: np.ndarray = values[offsets[row] : offsets[row + 1]]
        return found

    def lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(offsets) for offsets, _ in self._chunks] or [np.arange(0)]).astype(np.int64)


def row_slices(dataset: Any) -> Any:
    """A map-style data set as `RowSlices`; a stream, and what is sliced already, as it is."""
    from datasets import Dataset

    return RowSlices(dataset) if isinstance(dataset, Dataset) else dataset
