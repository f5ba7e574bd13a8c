"""Rows of tokens in an Arrow table, as numpy sees them: some at a time, and never all of them in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

# Columns of values end to end, where each row starts in them, and its length.
FlatRows = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]

BLOCK = 1 << 20  # tokens that are looked at together
COLUMNS = ("input_ids", "labels")
PARTS = ("seq_lengths", "seq_starts")  # of rows that hold several documents or branches


class TokenRows:
    """The `input_ids` and `labels` of rows, where they lie. Use `tokens_of` or `flat_rows`.

    Args:
        pieces: values of a column end to end, piece by piece as the table has them.
        piece: (rows,) which of the pieces each row lies in.
        starts: (rows,) where it starts there.
        lengths: (rows,) int64.
    """

    def __init__(self, pieces: list[dict[str, np.ndarray]], piece: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        self._pieces, self._piece, self._starts = pieces, piece, starts
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def some(self, numbers: np.ndarray | slice) -> TokenRows:
        """These of the rows, in this order; no token is read."""
        return TokenRows(self._pieces, self._piece[numbers], self._starts[numbers], self.lengths[numbers])

    def flat(self, columns: tuple[str, ...] = COLUMNS) -> FlatRows:
        """All of the rows end to end, in memory."""
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        total = int(ends[-1]) if len(ends) else 0
        kinds = {name: self._pieces[0][name].dtype if self._pieces else np.dtype(np.int32) for name in columns}
        found = {name: np.empty(total, dtype=kind) for name, kind in kinds.items()}
        order = np.argsort(self._piece, kind="stable")
        borders = np.flatnonzero(np.diff(self._piece[order])) + 1
        for rows in np.split(order, borders) if len(order) else ():
            values = self._pieces[self._piece[rows[0]]]
            source = ranges(self._starts[rows], self.lengths[rows])
            target = ranges(starts[rows], self.lengths[rows])
            for name in columns:
                found[name][target] = values[name][source]
        return found, starts, self.lengths

    def blocks(self, tokens: int = BLOCK) -> Iterator[TokenRows]:
        """The rows in order, some at a time: about so many tokens."""
        for start, end in cuts(self.lengths, tokens):
            yield self.some(slice(start, end))


def tokens_of(dataset: Dataset, columns: tuple[str, ...] = COLUMNS) -> TokenRows:
    """The rows of a data set; its indices, which `select` makes, are followed.

    Args:
        columns: of lists that have one length in each row.
    """
    lists = {name: dataset.data.column(name).chunks for name in columns}
    pieces, piece, starts, lengths = [], [], [], []
    for chunks in zip(*lists.values(), strict=True):
        borders = {name: chunk.offsets.to_numpy() for name, chunk in zip(columns, chunks, strict=True)}
        first = {name: int(found[0]) for name, found in borders.items()}
        last = {name: int(found[-1]) for name, found in borders.items()}
        values = zip(columns, chunks, strict=True)
        pieces.append({name: chunk.values.to_numpy()[first[name] : last[name]] for name, chunk in values})
        ends = borders[columns[0]].astype(np.int64) - first[columns[0]]
        starts.append(ends[:-1])
        lengths.append(np.diff(ends))
        piece.append(np.full(len(ends) - 1, len(pieces) - 1, dtype=np.int32))
    none = np.zeros(0, dtype=np.int64)
    rows = TokenRows(
        pieces,
        np.concatenate([none.astype(np.int32), *piece]),
        np.concatenate([none, *starts]),
        np.concatenate([none, *lengths]),
    )
    if dataset._indices is None:
        return rows
    return rows.some(dataset._indices.column(0).to_numpy().astype(np.int64))


def flat_rows(columns: dict[str, np.ndarray], lengths: np.ndarray) -> TokenRows:
    """Rows that lie end to end in memory."""
    return TokenRows([columns], np.zeros(len(lengths), dtype=np.int32), np.cumsum(lengths) - lengths, lengths)


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
