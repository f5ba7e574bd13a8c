"""Turns of a conversation in one row: what they share once, and each turn's own tokens as a branch that leaves it.

Two turns as they are served (capitals carry loss), and the row that they fold into. A branch begins with a copy of the
last token that it shares, so that labels shifted by one stay right everywhere::

    turn 1        a b c D E
    turn 2        a b c f g H
    input_ids     a b c D E c f g H
    position_ids  0 1 2 3 4 2 3 4 5      as they are served
    labels        . . . D E . . . H
    seq_lengths   5         4
    seq_starts    0         2            the position that the branch begins with; 0 begins another document

Positions say it all: a token is read by those behind it, up to where a position as small as its own comes again. So a
pack of documents is the case in which every branch begins at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

WORTH = 0.9  # of the tokens of rows of their own; turns that fold into more are not worth a mask


class Row(NamedTuple):
    """A row of turns, or of one: `input_ids` and `labels` (T,), length and first position of each of its parts."""

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: list[int]
    starts: list[int]


class Rows(NamedTuple):
    """Rows end to end: `input_ids` and `labels` (sum of sizes,), tokens and number of parts of each row, the rows of
    each conversation; and of all parts, end to end, the lengths and first positions."""

    input_ids: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    segments: np.ndarray
    each: np.ndarray
    seq_lengths: np.ndarray
    seq_starts: np.ndarray


def fold(turns: Sequence[tuple[np.ndarray, np.ndarray]], most: int) -> list[Row]:
    """Fold the turns of a conversation, in order, into as few rows as `most` tokens a row allow.

    Every turn is in one of the rows, and every token that carries loss carries it as often as before: what two turns
    would both be trained on is not shared.

    Args:
        turns: `input_ids` and `labels` of each, none longer than `most`.

    >>> no = IGNORE_INDEX
    >>> one, two = ([1, 2, 3, 4], [no, no, no, 4]), ([1, 2, 3, 5, 6], [no, no, no, no, 6])
    >>> row, = fold([tuple(map(np.array, one)), tuple(map(np.array, two))], most=100)
    >>> row.input_ids.tolist(), row.lengths, row.starts
    ([1, 2, 3, 4, 3, 5, 6], [4, 3], [0, 2])
    """
    rows: list[_Folding] = []
    for ids, labels in turns:
        if not rows or not rows[-1].add(ids, labels, most):
            rows.append(_Folding(ids, labels))
    return [row.done() for row in rows]


class _Folding:
    """A row that turns are added to."""

    def __init__(self, ids: np.ndarray, labels: np.ndarray):
        self.ids, self.labels = [ids], [labels.copy()]
        self.lengths, self.starts, self.total = [len(ids)], [0], len(ids)
        self.last = ids  # the turn before
        self.path = np.arange(len(ids))  # the slot of each of its tokens

    def add(self, ids: np.ndarray, labels: np.ndarray, most: int) -> bool:
        """Add a turn, unless the row would then be longer than `most`."""
        n = min(len(ids), len(self.last))
        have = np.concatenate(self.labels)
        differs = self.last[:n] != ids[:n]
        # no token is trained once where it would have been trained twice; a first one is never trained
        differs[1:] |= (labels[1:n] != IGNORE_INDEX) & (have[self.path[1:n]] != IGNORE_INDEX)
        shared = int(differs.argmax()) if differs.any() else n
        start = max(shared - 1, 0)
        own = 0 if shared == len(ids) else len(ids) - start
        if self.total + own > most:
            return False
        teaches = 1 + np.flatnonzero(labels[1:shared] != IGNORE_INDEX)
        have[self.path[teaches]] = labels[teaches]
        self.labels = [have]
        self.last, self.path = ids, self.path[: len(ids)]
        if own:
            branch = labels[start:].copy()
            branch[0] = IGNORE_INDEX
            self.ids.append(ids[start:])
            self.labels.append(branch)
            self.lengths.append(own)
            self.starts.append(start)
            # of the token that is copied the original is kept: it is what carries loss
            self.path = np.concatenate((self.path[:shared], self.total + shared - start + np.arange(len(ids) - shared)))
            self.total += own
        return True

    def done(self) -> Row:
        return Row(np.concatenate(self.ids), np.concatenate(self.labels), self.lengths, self.starts)


def fold_all(
    ids: np.ndarray, labels: np.ndarray, sizes: np.ndarray, each: np.ndarray, most: int, worth: float = WORTH
) -> Rows:
    """Fold the turns of many conversations, each by itself, where that leaves less than `worth` of their tokens.

    Args:
        ids, labels: of all turns, end to end.
        sizes: tokens of each turn.
        each: turns of each conversation.
        most: tokens of a row.
    """
    ends = np.cumsum(sizes)
    found: list[Row] = []
    rows_of = each.astype(np.int64)
    turn = 0
    for i, count in enumerate(each.tolist()):
        places = [slice(int(ends[k] - sizes[k]), int(ends[k])) for k in range(turn, turn + count)]
        alone = [Row(ids[place], labels[place], [place.stop - place.start], [0]) for place in places]
        turn += count
        if count > 1:
            folded = fold([(row.input_ids, row.labels) for row in alone], most)
            if sum(len(row.input_ids) for row in folded) < worth * sum(len(row.input_ids) for row in alone):
                alone = folded
        rows_of[i] = len(alone)
        found += alone
    none = np.zeros(0, dtype=np.int32)
    return Rows(
        np.concatenate([none, *(row.input_ids for row in found)]),
        np.concatenate([none, *(row.labels for row in found)]),
        np.array([len(row.input_ids) for row in found], dtype=np.int64),
        np.array([len(row.lengths) for row in found], dtype=np.int32),
        rows_of,
        np.array([n for row in found for n in row.lengths], dtype=np.int32),
        np.array([n for row in found for n in row.starts], dtype=np.int32),
    )


def last_readers(lengths: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    """The last slot that reads each slot: (width,) int64. A pad is read by itself alone.

    >>> last_readers([3, 2, 1], [0, 2, 0], width=7).tolist()
    [4, 4, 2, 4, 4, 5, 6]
    """
    last = np.arange(width)
    way: list[tuple[int, int, int]] = []  # slot, position and tokens of what the next token reads, end to end
    slot = 0
    for tokens, start in [*zip(map(int, lengths), map(int, starts), strict=True), (0, 0)]:
        while way and way[-1][1] + way[-1][2] > start:
            at, position, count = way.pop()
            kept = max(0, start - position)
            last[at + kept : at + count] = slot - 1
            if kept:
                way.append((at, position, kept))
        way.append((slot, start, tokens))
        slot += tokens
    return last


def unfolded(row: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """The turns of a folded row in rows of their own; each token carries loss in one of them.

    >>> no = IGNORE_INDEX
    >>> row = {"input_ids": [1, 2, 3, 2, 4], "labels": [no, no, 3, no, 4], "seq_lengths": [3, 2], "seq_starts": [0, 1]}
    >>> [turn["input_ids"] for turn in unfolded(row)]
    [[1, 2, 3], [1, 2, 4]]
    """
    ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
    last = last_readers(row["seq_lengths"], row["seq_starts"], len(ids))
    found = []
    for end in np.cumsum(row["seq_lengths"]) - 1:
        slots = np.flatnonzero((last >= end) & (np.arange(len(ids)) <= end))
        found.append({"input_ids": ids[slots].tolist(), "labels": labels[slots].tolist()})
        labels[slots] = IGNORE_INDEX
    return found


@dataclass(frozen=True)
class Masks:
    """How a model takes the mask of rows with branches; `instructft.models.branches.masks_for` finds it.

    Args:
        layers: layer type -> how far its tokens see: ("all", 0), ("window", tokens) or ("chunk", tokens).
        by_layer: the model takes a mask for each type of its layers, and not one for all.
        added: the mask is added to the scores, as `eager` wants it; else True where a token is seen.
    """

    layers: Mapping[str, tuple[str, int]] = field(default_factory=lambda: {"full_attention": ("all", 0)})
    by_layer: bool = False
    added: bool = False

    def __call__(self, positions: np.ndarray, last: np.ndarray) -> Any:
        """The mask of a batch, (B, 1, T, T): which slot (last axis) is seen from which.

        Args:
            positions: (B, T).
            last: (B, T), of `last_readers`.
        """
        import torch

        where, until = torch.from_numpy(positions)[:, None], torch.from_numpy(last)[:, None, None]
        slots = torch.arange(positions.shape[1])
        seen = (slots <= slots[:, None]) & (slots[:, None] <= until)  # (B, 1, T, T)
        masks = {name: self._made(seen, where, *how) for name, how in self.layers.items()}
        return masks if self.by_layer else next(iter(masks.values()))

    def _made(self, seen: torch.Tensor, where: torch.Tensor, how: str, tokens: int) -> torch.Tensor:
        import torch

        if how == "window":
            seen = seen & (where[..., None] - where[..., None, :] < tokens)
        elif how == "chunk":
            seen = seen & (where[..., None] // tokens == where[..., None, :] // tokens)
        if not self.added:
            return seen
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
