"""What a batch holds, counted where it is made: a number that is on the host already needs no device to be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instructft.data.batches.parts import divide
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

Counts = tuple[int, int, int]  # tokens, supervised tokens, slots (tokens with padding)


class Counting:
    """A collator whose batches say how much they hold, under `counts`; `taken` takes it out again.

    `counts` is a plain tuple of Python ints, which no library copies to a device; so is `parts`.

    Args:
        once_more: divide padded batches in `parts` (`instructft.data.batches.parts.divide`); None: they stay whole.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]], once_more: int | None = None):
        self.collate, self.once_more = collate, once_more

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        supervised, slots = _of_labels(batch["labels"])
        if self.once_more is not None and "attention_mask" in batch and "cu_seq_lens_q" not in batch:
            widest, multiple = batch["labels"].shape[1], getattr(self.collate, "pad_to_multiple_of", None) or 1
            found = divide([n + -n % multiple for n in lengths], self.once_more)
            if len(found) > 1:
                batch["parts"] = tuple((start, stop, min(width, widest)) for start, stop, width in found)
                slots = sum((stop - start) * width for start, stop, width in batch["parts"])
        return {**batch, "counts": (sum(lengths), supervised, slots)}


class WithRowLengths:
    """A collator that says with each batch how long its rows are: (B,), where packs become one row of the batch too."""

    def __init__(self, collate: Callable[..., dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        return {**self.collate(rows), "row_lengths": torch.tensor([len(row["input_ids"]) for row in rows])}


def taken(batch: dict[str, Any]) -> Counts:
    """Take the counts out of a batch, which is then what a model is called with.

    A batch that accelerate has put together of several and divided among processes has none, and is counted here.
    """
    counts = batch.pop("counts", None)
    if counts is None:
        return counted(batch)
    tokens, supervised, slots = counts
    return tokens, supervised, slots


def counted(batch: Mapping[str, torch.Tensor]) -> Counts:
    """Counts of a batch (B, T) by its tensors. On a GPU this waits for the device."""
    import torch

    labels, attention_mask, positions = batch["labels"], batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        tokens = int(attention_mask.sum())
    elif positions is None:
        tokens = labels.numel()
    else:  # a pad stands alone: its position is 0, and so is the next (a document has two tokens at least)
        following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
        tokens = int(((positions != 0) | (following != 0)).sum())
    return (tokens, *_of_labels(labels))


def _of_labels(labels: torch.Tensor) -> tuple[int, int]:
    return int((labels[:, 1:] != IGNORE_INDEX).sum()), labels.numel()
