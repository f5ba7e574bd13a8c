"""The loss of each training row at its first and its last sight, kept from losses that training computes anyway.

A row of the data may be trained as several rows (its turns, the parts of a document), in packs with others, more than
once in an epoch, on any process. What is followed is each of these once, as a document::

    slots of a pack      a a a a b b b c c c c c . .      a batch says of every slot whose it is: `row_of` (B, T) int32
    documents            7       2     5                  -1: padding
    of rows of the data  3       0     3                  rows 3 and 0; the loss of row 3 is the mean over 7 and 5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

ROW_OF = "row_of"  # in a batch: the document of each slot
NUMBER = "number"  # in a row on its way to a batch: its place in the training set
_AT_ONCE = 1 << 18  # slots of batches that wait on a CPU; a few megabytes
MOST = 4_000_000  # documents that are followed: 16 bytes each in every checkpoint of every process


@dataclass(frozen=True)
class Origins:
    """Where the training rows come from.

    Args:
        part: (documents,), which of the recipe's data sets each is of.
        row: (documents,), the number of its row there, as `Part.place` takes it.
        documents: (entries,), the documents of all training rows (packs), end to end.
        lengths: (entries,), tokens of each.
        each: (training rows,), how many entries each holds.
    """

    part: np.ndarray
    row: np.ndarray
    documents: np.ndarray
    lengths: np.ndarray
    each: np.ndarray

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, np.ndarray, np.ndarray]], lengths: np.ndarray) -> Origins:
        """Of rows that are not packed.

        Args:
            pieces: of each data set in order its number, of each of its training rows the number in all that the set
                is trained as, and of each of those the number of its row in the data.
            lengths: tokens of the training rows.
        """
        part, row, documents, known = [], [], [], 0
        for number, rows, raw in pieces:
            once, place = np.unique(rows, return_inverse=True)  # a row that is repeated is one document
            part.append(np.full(len(once), number, dtype=np.int32))
            row.append(raw[once])
            documents.append((place.reshape(-1) + known).astype(np.int32))
            known += len(once)
        return cls(
            np.concatenate(part),
            np.concatenate(row),
            np.concatenate(documents),
            np.asarray(lengths, dtype=np.int64),
            np.ones(len(lengths), dtype=np.int64),
        )

    def packed(self, order: np.ndarray, per_pack: np.ndarray) -> Origins:
        """The same in packs: `order` and `per_pack` as `instructft.data.packing.arrange` gives them."""
        return Origins(self.part, self.row, self.documents[order], self.lengths[order], per_pack)


class Numbered:
    """Rows that say their place in the training set."""

    def __init__(self, rows: Any):
        self.rows = rows

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, for who puts them in order: (rows,) int64."""
        lengths: np.ndarray = self.rows.lengths
        return lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], NUMBER: number}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [self[number] for number in numbers]


class SaysWhose:
    """A collator whose batches say of each slot whose it is: `row_of`, shaped as `labels`, so that whatever divides a
    batch divides it too."""

    def __init__(self, collate: Any, origins: Origins):
        self.collate = collate
        self.pad_to_multiple_of = getattr(collate, "pad_to_multiple_of", None)
        ends = np.cumsum(origins.each)
        self.starts, self.ends = ends - origins.each, ends
        self.documents, self.lengths = origins.documents, origins.lengths

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        batch = self.collate([{name: value for name, value in row.items() if name != NUMBER} for row in rows])
        shape = tuple(batch["labels"].shape)
        found = np.full(shape, -1, dtype=np.int32)
        slots, at = found.reshape(-1), 0
        # a row of the batch each, or all packs end to end in one: with their padding, or without
        width = shape[1] if shape[0] == len(rows) else batch["max_length_q"] if "supervised" in batch else None
        for i, row in enumerate(rows):
            number, tokens = row[NUMBER], len(row["input_ids"])
            start = at if width is None else i * width
            entries = slice(self.starts[number], self.ends[number])
            documents, lengths = self.documents[entries], self.lengths[entries]
            slots[start : start + tokens] = documents[0] if len(documents) == 1 else np.repeat(documents, lengths)
            at += tokens
        return {**batch, ROW_OF: torch.from_numpy(found)}


class Seen(NamedTuple):
    """Of each document the mean loss over its supervised tokens at its first and its last sight, and the steps of
    these: (documents,) each, a step of -1 where it was not seen."""

    first: np.ndarray
    last: np.ndarray
    first_step: np.ndarray
    last_step: np.ndarray


class RowHistory:
    """Follows the losses of documents through a run, on one process.

    Nothing that is trained depends on it: no number is drawn, no device is waited for, and the losses are those of the
    training step itself, dropout included.

    >>> import torch
    >>> history = RowHistory(Origins.of([(0, np.arange(2), np.arange(2))], np.array([3, 2])))
    >>> row_of = torch.tensor([[0, 0, 0], [1, 1, -1]], dtype=torch.int32)
    >>> history.see(torch.tensor([[0.0, -2.0], [-4.0, 0.0]]), torch.tensor([[False, True], [True, False]]), row_of, 1)
    >>> history.seen().first.tolist()
    [2.0, 4.0]
    """

    def __init__(self, origins: Origins):
        self.origins = origins
        self.since = 0  # steps that were done before it began: a checkpoint of an older version holds none
        many = len(origins.part)
        self._kept: list[Any] = [np.zeros(many, np.float32), np.zeros(many, np.float32)]
        self._kept += [np.full(many, -1, np.int32), np.full(many, -1, np.int32)]
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = []
        self._slots = 0  # of the batches that wait

    def see(self, log_probs: torch.Tensor, mask: torch.Tensor, row_of: torch.Tensor, step: int) -> None:
        """Take in a batch.

        Args:
            log_probs: (B, T - 1), of the token that each position predicts.
            mask: (B, T - 1), where that token carries loss.
            row_of: (B, T).
            step: the one that is being trained, from 1.
        """
        if log_probs.device.type == "cpu":
            self._see_here(log_probs, mask, row_of, step)
        else:
            self._see_there(log_probs.detach(), mask, row_of, step)

    def _see_here(self, log_probs: torch.Tensor, mask: torch.Tensor, row_of: torch.Tensor, step: int) -> None:
        """On a CPU: some batches at a time, since of a small one most of the cost is that of calls."""
        self._waiting.append((log_probs.detach(), mask, row_of, step))
        self._slots += log_probs.numel()
        if self._slots > _AT_ONCE:
            self._settle()

    def _settle(self) -> None:
        """Take in the batches that wait."""
        waiting, self._waiting, self._slots = self._waiting, [], 0
        if not waiting:
            return
        carry = np.concatenate([mask.numpy().reshape(-1) for _, mask, _, _ in waiting]).astype(bool, copy=False)
        losses = -np.concatenate([one.float().numpy().reshape(-1) for one, *_ in waiting])[carry]
        of = np.concatenate([row_of[:, 1:].numpy().reshape(-1) for _, _, row_of, _ in waiting])[carry]
        batch = np.repeat(np.arange(len(waiting)), [one.numel() for one, *_ in waiting])[carry]
        if not len(of):
            return
        starts = np.flatnonzero(np.concatenate(([True], (of[1:] != of[:-1]) | (batch[1:] != batch[:-1]))))
        means = np.add.reduceat(losses, starts) / np.diff(np.append(starts, len(of)))
        documents, steps = of[starts], np.array([step for *_, step in waiting], dtype=np.int32)[batch[starts]]
        first, last, first_step, last_step = self._kept
        new = first_step[documents] < 0
        early, at = documents[new][::-1], slice(None, None, -1)  # of a document that comes twice the last one is kept
        first[early], first_step[early] = means[new][at], steps[new][at]
        last[documents], last_step[documents] = means, steps

    def _see_there(self, log_probs: torch.Tensor, mask: torch.Tensor, row_of: torch.Tensor, step: int) -> None:
        """On a GPU: where the losses are, with a place behind all documents for what is padding."""
        import torch

        device = log_probs.device
        if isinstance(self._kept[0], np.ndarray):
            self._kept = [torch.from_numpy(np.append(values, values[-1:])).to(device) for values in self._kept]
        first, last, first_step, last_step = self._kept
        of = row_of[:, 1:].to(device).reshape(-1).long()
        of = torch.where(of < 0, len(first) - 1, of)
        carry = mask.reshape(-1).float()
        sums = torch.zeros_like(first).index_add_(0, of, -log_probs.reshape(-1).float() * carry)
        counts = torch.zeros_like(first).index_add_(0, of, carry)
        hit, means = counts > 0, sums / counts.clamp(min=1)
        new = hit & (first_step < 0)
        self._kept = [
            torch.where(new, means, first),
            torch.where(hit, means, last),
            first_step.masked_fill(new, step),
            last_step.masked_fill(hit, step),
        ]

    def seen(self) -> Seen:
        """What this process has seen."""
        self._settle()
        many = len(self.origins.part)
        return Seen(*(np.asarray(v if isinstance(v, np.ndarray) else v.cpu())[:many].copy() for v in self._kept))

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds of it."""
        return {**self.seen()._asdict(), "since": np.array(self.since)}

    def restore(self, known: Mapping[str, np.ndarray]) -> bool:
        """Go on from what a checkpoint holds; False where that is of other documents, as of another version."""
        if len(known["first"]) != len(self.origins.part):
            return False
        self._kept = [np.array(known[name]) for name in Seen._fields]
        self.since = int(known["since"])
        return True


def together(all_of: Sequence[Seen]) -> Seen:
    """What several processes have seen: the first sight of any, and the last one.

    >>> one, other = Seen(*np.array([[2.0], [1.0], [1], [9]])), Seen(*np.array([[3.0], [0.5], [4], [12]]))
    >>> [float(value[0]) for value in together([one, other])]
    [2.0, 0.5, 1.0, 12.0]
    """
    first_steps, last_steps = (np.stack([getattr(seen, name) for seen in all_of]) for name in Seen._fields[2:])
    never = np.iinfo(np.int32).max
    earliest = np.where(first_steps < 0, never, first_steps).argmin(0)
    latest, place = last_steps.argmax(0), np.arange(first_steps.shape[1])
    firsts, lasts = (np.stack([getattr(seen, name) for seen in all_of]) for name in Seen._fields[:2])
    return Seen(firsts[earliest, place], lasts[latest, place], first_steps[earliest, place], last_steps[latest, place])
