"""Finds rows that are nearly the same, by their tokens: MinHash with banding, then the exact overlap.

Two rows are near-duplicates when the sets of their runs of `RUN` tokens overlap by `THRESHOLD` or more (Jaccard). Runs
that stand in many rows, as the headings of a template and the wording of a task do, say nothing and are left out;
a row that has no others is compared whole. MinHash (Broder, 1997) finds candidates without comparing every pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np

RUN = 5  # tokens
THRESHOLD = 0.8  # share of runs in common
COMMON = 0.01  # a run in more than this share of the rows (and in three at least) is nobody's own
_SAMPLE = 5_000  # rows in which common runs are looked for
_BANDS, _PER_BAND = 6, 3  # a pair at 0.8 is missed with probability (1 - 0.8**3)**6 = 1.3 %, at 0.95 never

# `input_ids` and `labels` end to end, where each row starts, and its length: what `instructft.data.packing.flat` gives
FlatRows = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
# hashes of runs end to end, where each row's start, and how many it has
Runs = tuple[np.ndarray, np.ndarray, np.ndarray]


def near_duplicates(rows: FlatRows, held_out: Sequence[FlatRows]) -> np.ndarray:
    """Which of `rows` are nearly the same as one of `held_out`: (rows,) bool."""
    found = np.zeros(len(rows[2]), dtype=bool)
    mine, others = _runs(rows), [_runs(other) for other in held_out]
    common = _common([mine, *others])
    mine = _without(mine, common, rows)
    signatures = _signatures(*mine)
    for other, runs in zip(held_out, others, strict=True):
        theirs = _without(runs, common, other)
        known = lru_cache(maxsize=4096)(partial(_run_set, theirs))
        for band, their_band in zip(signatures.T, _signatures(*theirs).T, strict=True):
            buckets: dict[int, list[int]] = {}
            for i, value in enumerate(their_band.tolist()):
                buckets.setdefault(value, []).append(i)
            keys = np.fromiter(buckets, dtype=np.uint64, count=len(buckets))
            for i in np.flatnonzero(np.isin(band, keys) & ~found).tolist():
                own = _run_set(mine, i)
                found[i] = any(_overlap(own, known(j)) >= THRESHOLD for j in buckets[int(band[i])])
    return found


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
    return runs[times > max(2, COMMON * rows)]


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


def _signatures(hashes: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(rows, bands) uint64: rows that share a value in one band are likely alike."""
    rng = np.random.default_rng(0)
    bands = np.zeros((len(counts), _BANDS), dtype=np.uint64)
    if len(hashes) == 0:
        return bands
    for band in range(_BANDS):
        for _ in range(_PER_BAND):
            mixed = hashes * (rng.integers(1, 1 << 63, dtype=np.uint64) | np.uint64(1))
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            least = np.minimum.reduceat(mixed, np.minimum(starts, len(mixed) - 1))
            bands[:, band] = bands[:, band] * np.uint64(0x100000001B3) ^ least
    return bands


def _run_set(runs: Runs, row: int) -> set[int]:
    hashes, starts, counts = runs
    return set(hashes[starts[row] : starts[row] + counts[row]].tolist())


def _overlap(one: set[int], other: set[int]) -> float:
    both = len(one & other)
    return both / max(len(one) + len(other) - both, 1)
