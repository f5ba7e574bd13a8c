"""Packs end to end in one row of a fixed shape, as kernels take them that keep documents apart by their borders.

Two packs of 8 slots, with documents of 3 and 2 tokens, and of 7; `.` is padding, a document of its own::

    input_ids     a a a b b . . . c c c c c c c .      (1, 16)
    position_ids  0 1 2 0 1 0 1 2 0 1 2 3 4 5 6 0
    cu_seq_lens   0     3   5     8             15 16  and 16 again, up to a fixed number: documents without a token

Whatever the documents are, a compiled block meets one shape: of two batches no tensor differs in its size, but for the
supervised positions, whose number is a multiple of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.data.arrow.token_rows import TokenRows
from instructft.data.collator import checked
from instructft.errors import DataError
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

CHUNK = 4096  # supervised positions that an output head scores at once
SMALL_CHUNK = 64  # where a batch is hardly larger than a chunk
SPREAD = 5  # standard deviations by which a batch may hold more documents than the mean one
DOCUMENTS_IN_A_PACK = 8  # of a stream, whose packs nobody has counted yet


class FlatPacks:
    """Collate packs to one row of `packs * width` tokens.

    Args:
        pad_token_id: fills what a pack leaves of its width; never seen by a document, never trained.
        width: slots of a pack; `max_length_q` and `max_length_k` say it in place of the longest document.
        packs: of a batch; a last batch with fewer is filled up with padding.
        numbered: with `seq_idx` (1, T) int32, the number of its document at each token.
        documents: borders are filled up to this number, and one; a batch that holds more doubles it. `of` finds it.

    Returns (T = packs * width):
        `input_ids`, `labels` (-100 for no loss), `position_ids` and `attention_mask` (of ones: kernels that know
        borders need none, and GPT-2 would look for padding without), all (1, T) int64; `cu_seq_lens_q` and
        `cu_seq_lens_k` (documents + 1,) int32; `max_length_q` and `max_length_k`, ints; `supervised` (S,) int64,
        positions whose next token carries loss, and `supervised_labels` (S,) int64, that token: S is a multiple of
        4,096 (of 64 in a batch of less than 8,192 slots), filled up with position 0 and label -100.

    Raises:
        DataError: a pack without a token that carries loss, or longer than `width`.
    """

    def __init__(self, pad_token_id: int, width: int, packs: int, documents: int, *, numbered: bool = False):
        self.pad_token_id, self.width, self.packs, self.documents = pad_token_id, width, packs, documents
        self.numbered = numbered

    @classmethod
    def of(cls, rows: Any, pad_token_id: int, width: int, packs: int, *, numbered: bool = False) -> FlatPacks:
        """With as many borders as batches of these rows may be expected to hold at most, or a guess for a stream.

        Kernels allocate for every border, used or not, so that it is little above what batches do hold.
        """
        documents = packs * DOCUMENTS_IN_A_PACK
        if isinstance(rows, TokenRows):
            found = rows.documents + (rows.lengths < width)  # what a pack leaves is a document too
            usual = math.ceil(packs * found.mean() + SPREAD * math.sqrt(packs) * found.std())
            documents = min(usual, packs * int(found.max()))
        return cls(pad_token_id, width, packs, documents, numbered=numbered)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        width, packs = self.width, max(self.packs, len(rows))
        total = packs * width
        ids = np.full((packs, width), self.pad_token_id, dtype=np.int64)
        labels = np.full((packs, width), IGNORE_INDEX, dtype=np.int64)
        lengths: list[Any] = []  # of all documents, pack by pack
        for i, row in enumerate(rows):
            row_ids, row_labels = checked(row, i)
            n = len(row_ids)
            if n > width:
                raise DataError(f"row {i} of the batch is a pack of {n} tokens, where {width} are the most")
            ids[i, :n], labels[i, :n] = row_ids, row_labels
            lengths += [row["seq_lengths"], [width - n] if n < width else []]
        lengths.append([width] * (packs - len(rows)))
        documents = np.concatenate(lengths).astype(np.int64)
        ends = np.cumsum(documents)
        starts = ends - documents
        flat_labels = labels.reshape(-1)
        flat_labels[starts] = IGNORE_INDEX  # nothing is predicted across a border
        while len(documents) > self.documents:
            self.documents *= 2
        borders = np.full(self.documents + 1, total, dtype=np.int32)
        borders[: len(starts)] = starts
        labels_of_all = torch.from_numpy(flat_labels)[None]
        supervised, supervised_labels = whole_chunks(labels_of_all)
        cu_seq_lens = torch.from_numpy(borders)
        numbers = np.repeat(np.arange(len(documents), dtype=np.int32), documents)
        return {
            **({"seq_idx": torch.from_numpy(numbers)[None]} if self.numbered else {}),
            "input_ids": torch.from_numpy(ids.reshape(1, -1)),
            "labels": labels_of_all,
            "position_ids": torch.from_numpy(np.arange(total) - np.repeat(starts, documents))[None],
            "attention_mask": torch.ones((1, total), dtype=torch.long),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": width,
            "max_length_k": width,
            "supervised": supervised,
            "supervised_labels": supervised_labels,
        }


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of labels (B, T) the flat positions whose next token carries loss, and that token, (S,) each; waits for a GPU.

    >>> import torch
    >>> supervised_positions(torch.tensor([[-100, 7, 8], [5, -100, 9]]))
    (tensor([0, 1, 4]), tensor([7, 8, 9]))
    """
    from torch.nn.functional import pad

    following = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    where = (following != IGNORE_INDEX).nonzero()[:, 0]
    return where, following[where]


def whole_chunks(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`supervised_positions`, filled up with position 0 and label -100 to as many as a head scores at once.

    >>> import torch
    >>> positions, labels = whole_chunks(torch.tensor([[-100, 7, -100, 8]]))
    >>> positions[:3].tolist(), labels[:3].tolist(), len(labels)
    ([0, 2, 0], [7, 8, -100], 64)
    """
    from torch.nn.functional import pad

    positions, following = supervised_positions(labels)
    chunk = CHUNK if labels.numel() >= 2 * CHUNK else SMALL_CHUNK
    more = max(chunk, math.ceil(len(positions) / chunk) * chunk) - len(positions)
    return pad(positions, (0, more)), pad(following, (0, more), value=IGNORE_INDEX)


def rows_in(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Rows (packs) of a batch, and the slots of each.

    >>> import torch
    >>> rows_in({"input_ids": torch.zeros(4, 16)})
    (4, 16)
    """
    count, slots = batch["input_ids"].shape
    if "supervised" not in batch:
        return count, slots
    width = batch["max_length_q"]
    return slots // width, width


def some_rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Rows (packs) `start` to `stop` of a batch, as a batch."""
    count, width = rows_in(batch)
    if "supervised" not in batch:
        return {name: {kind: mask[start:stop] for kind, mask in value.items()} if isinstance(value, Mapping)
                else value[start:stop] if getattr(value, "shape", ())[:1] == (count,) else value
                for name, value in batch.items()}  # fmt: skip
    part = slice(start * width, min(stop, count) * width)
    found = {name: value[:, part] if getattr(value, "ndim", 0) == 2 else value for name, value in batch.items()}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):  # what lies outside becomes documents without a token
        found[name] = (batch[name] - part.start).clamp(0, part.stop - part.start)
    found["supervised"], found["supervised_labels"] = whole_chunks(found["labels"])
    return found
