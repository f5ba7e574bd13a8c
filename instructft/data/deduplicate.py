"""Finds rows that are nearly the same as held-out ones, by their tokens.

Two rows are nearly the same when the sets of their runs of `RUN` tokens overlap by `THRESHOLD` or more (Jaccard), or
when one stands whole in the other, as a dialogue does that was extended: all its runs, `ENOUGH` of them, but for fewer
than `RUN` at its edges (another token within it takes `RUN` away); or when what is answered in both, and the question
before it, are nearly the same, under another system message. Runs that stand in many rows, as the headings of a
template and the wording of a task do, say nothing and are left out; a row that has no others is compared whole. The
runs of the held-out rows are an index, so that no pair of rows that share nothing is looked at. It lies in a file
where it is large, and other rows pass it a block at a time: memory does not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from instructft.data.arrow.store import scratch
from instructft.data.arrow.token_rows import BLOCK, FlatRows, TokenRows, ranges
from instructft.prompt.loss_mask import IGNORE_INDEX

RUN = 5  # tokens
THRESHOLD = 0.8  # share of runs in common
ENOUGH = 12  # runs of its own that a row must have to be found inside another
COMMON = 0.01  # a run in more than this share of the rows (and in more than `_FEW`) is nobody's own
_FEW = 8  # copies of one row in a small data set are no wording of the task
_SAMPLE = 5_000  # rows in which common runs are looked for
_MOST_OWNERS = 32  # held-out rows looked at for one run
_SORTED_AT_ONCE = 1 << 22  # runs
_FILTER = 26  # bits of a run, at most, by which most that no held-out row has are passed over
_SLOTS = 6  # bits more than it takes to number all runs: one in 64 of the others gets through
_CACHED = 1 << 16  # runs that a processor has at hand
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Known:
    """Held-out rows, and which other rows are nearly the same as one of them."""

    def __init__(self, held_out: Sequence[TokenRows]):
        self._exact: dict[bytes, int] = {}  # what all tokens of a row are known by -> its number
        for number, tokens in enumerate(text for rows in held_out for text in _tokens(rows)):
            self._exact.setdefault(tokens, number)
        self._share = _SAMPLE // (1 + len(held_out))
        self._wording = [_seen(rows, self._share) for rows in held_out]
        self._runs, self._owner, self._answers, self._sizes = _index(held_out)
        self._bits = min(_FILTER, len(self._runs).bit_length() + _SLOTS)  # pages of memory that few rows need not touch
        self._filter = np.zeros(1 << self._bits, dtype=bool)
        for start in range(0, len(self._runs), BLOCK):
            self._filter[_stretch(self._runs[start : start + BLOCK], self._bits)] = True

    def among(self, rows: TokenRows) -> np.ndarray:
        """Which of `rows` are nearly the same as a held-out one: (rows,) bool."""
        return self.matches(rows) >= 0

    def matches(self, rows: TokenRows) -> np.ndarray:
        """For each of `rows` the number of the held-out row that it is nearly the same as, or -1: (rows,) int64.

        Held-out rows are numbered through all that were given.
        """
        found = np.fromiter((self._exact.get(tokens, -1) for tokens in _tokens(rows)), dtype=np.int64, count=len(rows))
        common = _common([_seen(rows, self._share), *self._wording])
        sizes = self._sizes.copy()  # (2, held-out rows): runs of its own that each has, in all and in its answers
        first, many = self._place(common)
        places = ranges(first, many)
        sizes[0] -= np.bincount(self._owner[places], minlength=sizes.shape[1])
        sizes[1] -= np.bincount(self._owner[places[self._answers[places]]], minlength=sizes.shape[1])
        start = 0
        for block in rows.blocks():
            self._match(block.flat(), common, sizes, found[start : start + len(block)])
            start += len(block)
        return found

    def _match(self, rows: FlatRows, common: np.ndarray, sizes: np.ndarray, found: np.ndarray) -> None:
        """Write into `found` which held-out rows some rows are nearly the same as."""
        runs, _, counts = _runs(rows)
        row_of = np.repeat(np.arange(len(counts)), counts)
        maybe = np.flatnonzero(self._filter[_stretch(runs, self._bits)])
        maybe = maybe[~_is_in(runs[maybe], common)]
        maybe = maybe[_is_in(runs[maybe], self._runs)]
        if not len(maybe):
            return
        answers = _in_answers(rows, counts)
        candidates = np.zeros(len(counts), dtype=bool)
        candidates[row_of[maybe]] = True
        theirs = np.flatnonzero(candidates[row_of])
        once = theirs[_once_a_row(row_of[theirs], runs[theirs])]
        once = once[~_is_in(runs[once], common)]
        size_of = np.array([np.bincount(row_of[some], minlength=len(counts)) for some in (once, once[answers[once]])])
        once = maybe[_once_a_row(row_of[maybe], runs[maybe])]
        first, many = self._place(runs[once])
        many = np.minimum(many, _MOST_OWNERS)
        owner = self._owner[ranges(first, many)].astype(np.int64)
        pairs, pair_of = np.unique(np.repeat(row_of[once], many) * sizes.shape[1] + owner, return_inverse=True)
        in_answers = np.repeat(answers[once], many)
        shared = np.array([np.bincount(pair_of[some], minlength=len(pairs)) for some in (slice(None), in_answers)])
        of, held = np.divmod(pairs, sizes.shape[1])
        alike = (found[of] < 0) & _alike(shared, size_of[:, of], sizes[:, held])
        rows_alike, first = np.unique(of[alike], return_index=True)
        found[rows_alike] = held[alike][first]

    def _place(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each run stands in the index, and how many rows have it."""
        order = np.argsort(runs)
        first, many = np.empty(len(runs), dtype=np.int64), np.empty(len(runs), dtype=np.int64)
        first[order] = np.searchsorted(self._runs, runs[order], "left")
        many[order] = np.searchsorted(self._runs, runs[order], "right") - first[order]
        return first, many


def _alike(shared: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether rows of so many runs, that share so many, are nearly the same, one holds the other, or both answer one
    question in the same way. Each (2, pairs): in all, and from the first answer on."""
    smaller = np.minimum(one[0], other[0])
    inside = (smaller >= ENOUGH) & (smaller - shared[0] < np.minimum(RUN, smaller // 10 + 1))
    asked = shared[0] - shared[1] >= RUN
    answered = (shared[1] >= ENOUGH) & (shared[1] >= THRESHOLD * (one[1] + other[1] - shared[1]))
    same: np.ndarray = (shared[0] >= THRESHOLD * (one[0] + other[0] - shared[0])) | inside | (asked & answered)
    return same


def _tokens(rows: TokenRows) -> Iterator[bytes]:
    """What all tokens of each row are known by."""
    for block in rows.blocks():
        columns, starts, lengths = block.flat(("input_ids",))
        ids = np.ascontiguousarray(columns["input_ids"], dtype=np.int32)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            yield blake2b(ids[start : start + length].tobytes(), digest_size=16).digest()


def _is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which of the values are among others, which are sorted."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    if len(ordered) < _CACHED:
        return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    order = np.argsort(values)  # neighbours one after the other: fewer pages of memory, or of a file, are read
    found = np.empty(len(values), dtype=bool)
    at = np.minimum(np.searchsorted(ordered, values[order]), len(ordered) - 1)
    found[order] = ordered[at] == values[order]
    return found


def _once_a_row(row_of: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Where every run of every row stands for the first time, in the order of rows."""
    order = np.lexsort((hashes, row_of))
    row_of, hashes = row_of[order], hashes[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (row_of[1:] != row_of[:-1]) | (hashes[1:] != hashes[:-1])
    return order[new]


def _in_answers(rows: FlatRows, counts: np.ndarray) -> np.ndarray:
    """Which runs of rows begin with the first token that carries loss, or behind it: (runs,) bool."""
    columns, starts, lengths = rows
    carries = np.flatnonzero(columns["labels"] != IGNORE_INDEX)
    first = np.append(carries, len(columns["labels"]))[np.searchsorted(carries, starts)]
    ahead = np.minimum(first - starts, lengths)  # tokens of each row before that one
    position = ranges(np.zeros(len(counts), dtype=np.int64), counts)
    found: np.ndarray = position >= np.repeat(ahead, counts)
    return found


def _index(held: Sequence[TokenRows]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All runs of held-out rows, sorted, with the row of each and whether it is in an answer; and how many different
    ones each row has: (2, rows), in all and in its answers.

    Runs are dealt out by their first bits to as many stretches of the index as it takes to sort each in memory.
    """
    total = sum(int(np.maximum(rows.lengths - RUN + 1, 0).sum()) for rows in held)
    bits = max(0, (total // _SORTED_AT_ONCE).bit_length())
    runs, owner, answers = scratch(total, np.uint64), scratch(total, np.int32), scratch(total, np.bool_)
    sizes = np.zeros((2, sum(map(len, held))), dtype=np.int64)
    ends = np.zeros(1 << bits, dtype=np.int64)
    if bits:
        for hashes, _, _ in _runs_of(held):
            ends += np.bincount(_stretch(hashes, bits), minlength=1 << bits)
        ends = np.concatenate(([0], np.cumsum(ends)[:-1]))
    for hashes, rows, in_answers in _runs_of(held):
        of = _stretch(hashes, bits)
        order = np.argsort(of, kind="stable")
        many = np.bincount(of, minlength=1 << bits)
        at = ranges(ends, many)
        runs[at], owner[at], answers[at] = hashes[order], rows[order], in_answers[order]
        ends += many
    start = length = 0
    for end in ends.tolist():
        order = np.argsort(runs[start:end], kind="stable")
        hashes, rows, in_answers = runs[start:end][order], owner[start:end][order], answers[start:end][order]
        new = np.ones(len(hashes), dtype=bool)
        new[1:] = (rows[1:] != rows[:-1]) | (hashes[1:] != hashes[:-1])
        hashes, rows, in_answers = hashes[new], rows[new], in_answers[new]
        here = slice(length, length + len(rows))
        runs[here], owner[here], answers[here] = hashes, rows, in_answers
        sizes[0] += np.bincount(rows, minlength=sizes.shape[1])
        sizes[1] += np.bincount(rows[in_answers], minlength=sizes.shape[1])
        start, length = end, length + len(rows)
    return runs[:length], owner[:length], answers[:length], sizes


def _stretch(hashes: np.ndarray, bits: int) -> np.ndarray:
    return (hashes >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(hashes), dtype=np.int64)


def _runs_of(held: Sequence[TokenRows]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All runs of rows, some at a time, the number of the row of each, and whether it is in an answer."""
    before = 0
    for rows in held:
        for block in rows.blocks():
            rows_here = block.flat()
            hashes, _, counts = _runs(rows_here)
            numbers = np.repeat(np.arange(before, before + len(counts), dtype=np.int32), counts)
            yield hashes, numbers, _in_answers(rows_here, counts)
            before += len(block)


def _runs(rows: FlatRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of all runs of tokens of each row, end to end, where each row's start, and how many it has; a row that is
    shorter than a run has none."""
    columns, starts, lengths = rows
    ids = columns["input_ids"].astype(np.uint64) + np.uint64(1)
    padded = np.concatenate([ids, np.zeros(RUN - 1, dtype=np.uint64)])
    hashes = np.zeros(len(ids), dtype=np.uint64)
    for k in range(RUN):
        hashes = hashes * _MIX + padded[k : k + len(ids)]
    counts = np.maximum(lengths - RUN + 1, 0)  # a run does not reach into the next row
    position = np.arange(len(ids)) - np.repeat(starts, lengths)
    return hashes[position < np.repeat(counts, lengths)], np.cumsum(counts) - counts, counts


def _seen(rows: TokenRows, share: int) -> tuple[np.ndarray, int]:
    """The runs of the first rows, each as often as rows have it, and how many rows were looked at."""
    first = rows.some(slice(0, share))
    seen = [np.zeros(0, dtype=np.uint64)]
    for block in first.blocks():
        hashes, _, counts = _runs(block.flat(("input_ids",)))
        seen.append(hashes[_once_a_row(np.repeat(np.arange(len(counts)), counts), hashes)])
    return np.concatenate(seen), len(first)


def _common(seen: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """The runs that stand in many rows, sorted: (n,) uint64."""
    runs, times = np.unique(np.concatenate([found for found, _ in seen]), return_counts=True)
    return runs[times > max(_FEW, COMMON * sum(rows for _, rows in seen))]
