"""Rows of tokens in an Arrow table, as numpy sees them: views of its columns, where files that are mapped stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# Columns of values end to end, where each row starts in them, and its length.
FlatRows = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
Borders = tuple[np.ndarray, np.ndarray]  # where each row starts in its piece of a column, and its length

BLOCK = 1 << 20  # tokens that are looked at together
COLUMNS = ("input_ids", "labels")
LISTS = (*COLUMNS, "seq_lengths")  # what a row may hold; the last one where rows are packs


class TokenRows:
    """Lists of numbers of rows, where they lie. Use `tokens_of`, `slices_of` or `flat_rows`.

    `datasets` makes a list of Python numbers of every row, token by token, and a collator turns it back; for 32 packs
    of 1,024 tokens that takes longer than a GPU takes for the step of a small model. So a data loader takes this in
    place of a map-style data set: a row is a dict of views, and nothing is copied before a collator writes a batch.

    Args:
        pieces: values of each column end to end, piece by piece as the table has them.
        piece: (rows,) which of the pieces each row lies in.
        borders: of each column; `labels` may share those of `input_ids`.
        dataset: what the rows are of; a worker that is spawned maps its files anew.

    >>> from datasets import Dataset
    >>> rows = tokens_of(Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "labels": [[-100, 6], [-100, 8]]}))
    >>> rows[1]["labels"]
    array([-100,    8])
    """

    def __init__(
        self,
        pieces: list[dict[str, np.ndarray]],
        piece: np.ndarray,
        borders: dict[str, Borders],
        dataset: Dataset | None = None,
    ):
        self._pieces, self._piece, self._borders, self._dataset = pieces, piece, borders, dataset

    def __reduce__(self) -> Any:
        if self._dataset is not None:
            return tokens_of, (self._dataset,)
        return type(self), (self._pieces, self._piece, self._borders)

    def __len__(self) -> int:
        return len(self._piece)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        values, found = self._pieces[self._piece[row]], {}
        for name, (starts, lengths) in self._borders.items():
            start = int(starts[row])
            found[name] = values[name][start : start + int(lengths[row])]
        return found

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self[row] for row in rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row: (rows,) int64."""
        return self._borders["input_ids"][1]

    @property
    def documents(self) -> np.ndarray:
        """Documents of each pack: (rows,) int64."""
        return self._borders["seq_lengths"][1]

    def some(self, numbers: np.ndarray | slice) -> TokenRows:
        """These of the rows, in this order; no token is read."""
        borders: dict[str, Borders] = {}
        for name, (starts, lengths) in self._borders.items():
            shared = name in COLUMNS[1:] and starts is self._borders[COLUMNS[0]][0]
            borders[name] = borders[COLUMNS[0]] if shared else (starts[numbers], lengths[numbers])
        return TokenRows(self._pieces, self._piece[numbers], borders)

    def flat(self, columns: tuple[str, ...] = COLUMNS) -> FlatRows:
        """All of the rows end to end, in memory.

        Raises:
            DataError: a row has not as many labels as tokens.
        """
        lengths = self.lengths
        ends = np.cumsum(lengths)
        starts = ends - lengths
        total = int(ends[-1]) if len(ends) else 0
        kinds = {name: self._pieces[0][name].dtype if self._pieces else np.dtype(np.int32) for name in columns}
        found = {name: np.empty(total, dtype=kind) for name, kind in kinds.items()}
        for name in columns:
            if (theirs := self._borders[name][1]) is not lengths and not np.array_equal(theirs, lengths):
                row = int(np.flatnonzero(theirs != lengths)[0])
                raise DataError(f"row {row} has {lengths[row]} input_ids and {theirs[row]} {name}")
        if total and (self._piece == self._piece[0]).all() and self._end_to_end(columns):
            for name in columns:
                start = int(self._borders[name][0][0])
                found[name][:] = self._pieces[self._piece[0]][name][start : start + total]
            return found, starts, lengths
        order = np.argsort(self._piece, kind="stable")
        borders = np.flatnonzero(np.diff(self._piece[order])) + 1
        for rows in np.split(order, borders) if len(order) else ():
            values = self._pieces[self._piece[rows[0]]]
            target = ranges(starts[rows], lengths[rows])
            source, of = None, None
            for name in columns:
                if of is not self._borders[name][0]:
                    of = self._borders[name][0]
                    source = ranges(of[rows], lengths[rows])
                found[name][target] = values[name][source]
        return found, starts, lengths

    def _end_to_end(self, columns: tuple[str, ...]) -> bool:
        """Whether the rows, all of one piece, lie there as they come."""
        borders = {id(self._borders[name]): self._borders[name] for name in columns}.values()
        return all(bool((starts[1:] == starts[:-1] + lengths[:-1]).all()) for starts, lengths in borders)

    def blocks(self, tokens: int = BLOCK) -> Iterator[TokenRows]:
        """The rows in order, some at a time: about so many tokens."""
        for start, end in cuts(self.lengths, tokens):
            yield self.some(slice(start, end))


def tokens_of(dataset: Dataset) -> TokenRows:
    """The rows of a data set; its indices, which `select` makes, are followed."""
    names = [name for name in LISTS if name in dataset.column_names]
    none = np.zeros(0, dtype=np.int64)
    pieces: list[dict[str, np.ndarray]] = []
    piece = [none.astype(np.int32)]
    starts: dict[str, list[np.ndarray]] = {name: [none] for name in names}
    lengths: dict[str, list[np.ndarray]] = {name: [none] for name in names}
    for batch in dataset.data.table.select(names).to_batches():  # of columns in unlike chunks too, without a copy
        values = {}
        for name in names:
            column = batch.column(name)
            ends = column.offsets.to_numpy().astype(np.int64)
            values[name] = column.values.to_numpy()[ends[0] : ends[-1]]
            starts[name].append(ends[:-1] - ends[0])
            lengths[name].append(np.diff(ends))
        piece.append(np.full(batch.num_rows, len(pieces), dtype=np.int32))
        pieces.append(values)
    borders = {name: (np.concatenate(starts[name]), np.concatenate(lengths[name])) for name in names}
    if np.array_equal(borders["labels"][1], borders["input_ids"][1]):  # as in every row that can be trained
        borders["labels"] = borders["input_ids"]
    rows = TokenRows(pieces, np.concatenate(piece), borders, dataset)
    if dataset._indices is None:
        return rows
    chosen = rows.some(dataset._indices.column(0).to_numpy().astype(np.int64))
    chosen._dataset = dataset
    return chosen


def slices_of(dataset: Any) -> Any:
    """A map-style data set as `TokenRows`; a stream, and what is `TokenRows` already, as it is."""
    from datasets import Dataset

    return tokens_of(dataset) if isinstance(dataset, Dataset) else dataset


def flat_rows(columns: dict[str, np.ndarray], lengths: np.ndarray) -> TokenRows:
    """Rows that lie end to end in memory."""
    borders = (np.cumsum(lengths) - lengths, lengths)
    return TokenRows([columns], np.zeros(len(lengths), dtype=np.int32), dict.fromkeys(columns, borders))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of all ranges, end to end.

    >>> ranges(np.array([10, 3]), np.array([2, 3])).tolist()
    [10, 11, 3, 4, 5]
    """
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def cuts(sizes: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Where to cut rows of these sizes into pieces of at most `most` in all; one that is larger stands alone.

    >>> list(cuts(np.array([3, 3, 9, 1]), most=6))
    [(0, 2), (2, 3), (3, 4)]
    """
    ends, start = np.cumsum(sizes), 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield start, end
        start = end
