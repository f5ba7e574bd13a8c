"""Finds rows that are nearly the same as held-out ones, by their tokens.

Two rows are nearly the same when the sets of their runs of `RUN` tokens overlap by `THRESHOLD` or more (Jaccard), or
when one stands whole in the other, as a dialogue does that was extended: all its runs, `ENOUGH` of them, but for fewer
than `RUN` at its edges (another token within it takes `RUN` away). Runs that stand in many rows, as the headings of a
template and the wording of a task do, say nothing and are left out; a row that has no others is compared whole. The
runs of the held-out rows are an index, so that no pair of rows that share nothing is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

RUN = 5  # tokens
THRESHOLD = 0.8  # share of runs in common
ENOUGH = 12  # runs of its own that a row must have to be found inside another
COMMON = 0.01  # a run in more than this share of the rows (and in more than `_FEW`) is nobody's own
_FEW = 8  # copies of one row in a small data set are no wording of the task
_SAMPLE = 5_000  # rows in which common runs are looked for
_MOST_OWNERS = 32  # held-out rows looked at for one run

# `input_ids` and `labels` end to end, where each row starts, and its length: what `instructft.data.packing.flat` gives
FlatRows = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
# hashes of runs end to end, where each row's start, and how many it has
Runs = tuple[np.ndarray, np.ndarray, np.ndarray]


class Known:
    """Held-out rows, and which other rows are nearly the same as one of them."""

    def __init__(self, held_out: Sequence[FlatRows]):
        self._held, self._runs = list(held_out), [_runs(rows) for rows in held_out]
        self._exact: dict[bytes, int] = {}  # all tokens of a row -> its number
        for number, tokens in enumerate(text for rows in self._held for text in _tokens(rows)):
            self._exact.setdefault(tokens, number)

    def among(self, rows: FlatRows) -> np.ndarray:
        """Which of `rows` are nearly the same as a held-out one: (rows,) bool."""
        return self.matches(rows) >= 0

    def matches(self, rows: FlatRows) -> np.ndarray:
        """For each of `rows` the number of the held-out row that it is nearly the same as, or -1: (rows,) int64.

        Held-out rows are numbered through all that were given.
        """
        found = np.array([self._exact.get(tokens, -1) for tokens in _tokens(rows)], dtype=np.int64)
        mine = _runs(rows)
        common = _common([mine, *self._runs])
        mine = _without(mine, common, rows)
        theirs = [_without(runs, common, held) for runs, held in zip(self._runs, self._held, strict=True)]
        index, owner, sizes = _index(theirs)
        row_of, hashes = _once_a_row(mine)
        size_of = np.bincount(row_of, minlength=len(found))
        first = np.searchsorted(index, hashes, "left")
        many = np.minimum(np.searchsorted(index, hashes, "right") - first, _MOST_OWNERS)
        ends = np.cumsum(many)
        at = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - many, many) + np.repeat(first, many)
        pairs, shared = np.unique(np.repeat(row_of, many) * max(len(sizes), 1) + owner[at], return_counts=True)
        for pair, count in zip(pairs.tolist(), shared.tolist(), strict=True):
            row, held = divmod(pair, max(len(sizes), 1))
            if found[row] < 0 and _alike(count, int(size_of[row]), int(sizes[held])):
                found[row] = held
        return found


def _alike(shared: int, one: int, other: int) -> bool:
    """Whether rows of so many runs, that share so many, are nearly the same, or one holds the other."""
    smaller = min(one, other)
    if shared >= THRESHOLD * (one + other - shared):
        return True
    return smaller >= ENOUGH and smaller - shared < min(RUN, smaller // 10 + 1)


def chosen(rows: FlatRows, numbers: np.ndarray) -> FlatRows:
    """Some of the rows, end to end."""
    columns, starts, lengths = rows
    lengths = lengths[numbers]
    ends = np.cumsum(lengths)
    at = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    at += np.repeat(starts[numbers], lengths)
    return {name: column[at] for name, column in columns.items()}, ends - lengths, lengths


def _tokens(rows: FlatRows) -> Iterator[bytes]:
    columns, starts, lengths = rows
    ids = np.ascontiguousarray(columns["input_ids"], dtype=np.int32)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        yield ids[start : start + length].tobytes()


def _once_a_row(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """(row, run) of every run of every row, each once, in the order of rows."""
    hashes, _, counts = runs
    row_of = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((hashes, row_of))
    row_of, hashes = row_of[order], hashes[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (row_of[1:] != row_of[:-1]) | (hashes[1:] != hashes[:-1])
    return row_of[new], hashes[new]


def _index(held: Sequence[Runs]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All runs of held-out rows, sorted, with the row of each; and how many different ones each row has."""
    owners, hashes, before = [], [], 0
    for runs in held:
        row_of, found = _once_a_row(runs)
        owners.append(row_of + before)
        hashes.append(found)
        before += len(runs[2])
    owner, every = np.concatenate(owners), np.concatenate(hashes)
    order = np.argsort(every, kind="stable")
    return every[order], owner[order], np.bincount(owner, minlength=before)


def _runs(rows: FlatRows) -> Runs:
    """Hashes of all runs of tokens of each row; a row that is shorter than a run has none."""
    columns, starts, lengths = rows
    ids = columns["input_ids"].astype(np.uint64) + np.uint64(1)
    padded = np.concatenate([ids, np.zeros(RUN - 1, dtype=np.uint64)])
    hashes = np.zeros(len(ids), dtype=np.uint64)
    for k in range(RUN):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + padded[k : k + len(ids)]
    counts = np.maximum(lengths - RUN + 1, 0)  # a run does not reach into the next row
    position = np.arange(len(ids)) - np.repeat(starts, lengths)
    return hashes[position < np.repeat(counts, lengths)], np.cumsum(counts) - counts, counts


def _common(all_runs: Sequence[Runs]) -> np.ndarray:
    """The runs that stand in many rows, sorted: (n,) uint64."""
    share = _SAMPLE // len(all_runs)
    seen, rows = [], 0
    for hashes, _, counts in all_runs:
        row_of = np.repeat(np.arange(min(len(counts), share), dtype=np.uint64), counts[:share])
        hashes = hashes[: len(row_of)]
        # a run counts once in a row, however often it stands there
        _, first = np.unique(hashes ^ (row_of * np.uint64(0x9E3779B97F4A7C15)), return_index=True)
        seen.append(hashes[first])
        rows += min(len(counts), share)
    runs, times = np.unique(np.concatenate(seen), return_counts=True)
    return runs[times > max(_FEW, COMMON * rows)]


def _without(runs: Runs, common: np.ndarray, rows: FlatRows) -> Runs:
    """Leave common runs out; a row with none of its own is stood for by one hash of all its tokens."""
    hashes, _, counts = runs
    columns, starts, lengths = rows
    row_of = np.repeat(np.arange(len(counts)), counts)
    own = ~np.isin(hashes, common)
    left = np.bincount(row_of[own], minlength=len(counts))
    bare = np.flatnonzero(left == 0)
    ids = columns["input_ids"]
    whole = [hash(ids[starts[i] : starts[i] + lengths[i]].tobytes()) & 0xFFFFFFFFFFFFFFFF for i in bare]
    merged = np.concatenate([hashes[own], np.array(whole, dtype=np.uint64)])
    order = np.argsort(np.concatenate([row_of[own], bare]), kind="stable")
    counts = np.maximum(left, 1)
    return merged[order], np.cumsum(counts) - counts, counts
