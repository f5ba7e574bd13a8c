"""Rows or packs to a batch: padding is masked by length, never by comparing with the pad token's id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.data.batches.branches import Masks, last_readers
from instructft.data.packing import document_numbers, position_ids
from instructft.errors import DataError
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


class CompletionOnlyCollator:
    """Pad rows of `input_ids` and `labels` on the right to the longest of the batch.

    GPT-2 and many others pad with their EOS token. A collator that masks every label that equals the pad token would
    take the loss off the token that ends an answer, and the model would never learn to stop. Here a label is masked
    only where the row has ended, or where `labels` already says -100.

    Rows with `seq_lengths` are packs: they get `position_ids` that start anew with each document, and no attention
    mask, by which transformers keeps documents apart (see `instructft.data.packing`). In a loop of your own call the
    model with `use_cache=False`, as training here does: with a cache, which is the default outside of it, transformers
    5.23 looks at no positions, and the documents see each other.

    Rows with `seq_starts` besides have turns folded into them (`instructft.data.batches.branches`): where a batch holds
    a branch, its `attention_mask` says slot by slot who sees whom, which attention by `sdpa` and `eager` can take.

    Args:
        pad_token_id: fills `input_ids` behind the end of a row; any id will do, no token there is seen or trained.
        pad_to_multiple_of: round T up, for kernels that like it.
        flatten: packs as one row (1, sum of tokens) with `cu_seq_lens`, which flash-attention wants. Never for sdpa,
            whose mask and work grow with the square of the row.
        masks: how the model takes masks of branches; `instructft.models.branches.masks_for(model.config)` says it.
        numbered: packs also get `seq_idx` (B, T) int32, the number of its document at each token, by which state-space
            and convolution kernels keep documents apart.

    Returns (when called with B rows of at most T tokens):
        `input_ids` (B, T), `labels` (B, T) with -100 for no loss, and `attention_mask` (B, T) of 0 and 1, or for packs
        `position_ids` (B, T); all int64. With branches `position_ids`, and `attention_mask` (B, 1, T, T), or a dict of
        such by the type of layer.

    >>> collate = CompletionOnlyCollator(pad_token_id=0)
    >>> collate([{"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}, {"input_ids": [7, 8], "labels": [-100, 8]}])
    {'input_ids': tensor([[5, 6, 0], [7, 8, 0]]), 'labels': tensor([[-100, 6, 0], [-100, 8, -100]]),
     'attention_mask': tensor([[1, 1, 1], [1, 1, 0]])}

    Raises:
        DataError: a row without a token that carries loss, or with labels of another length than its `input_ids`.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        flatten: bool = False,
        masks: Masks | None = None,
        *,
        numbered: bool = False,
    ):
        if pad_token_id is None:
            raise DataError("CompletionOnlyCollator needs a pad_token_id; instructft.load_tokenizer sets one")
        self.pad_token_id = int(pad_token_id)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.flatten = flatten
        self.masks = masks or Masks()
        self.numbered = numbered

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        branches = any(np.any(row["seq_starts"]) for row in rows if "seq_starts" in row)
        # rows of a data set with branches, but none in this batch, are what they are elsewhere
        packed = branches or ("seq_lengths" in rows[0] and (
            "seq_starts" not in rows[0] or any(len(row["seq_lengths"]) > 1 for row in rows)
        ))  # fmt: skip
        if packed and self.flatten:
            return self._flat(rows)
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        shape = (len(rows), length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)  # (B, T)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)  # (B, T)
        lengths = []
        for i, row in enumerate(rows):
            ids, row_labels = checked(row, i)
            n = len(ids)
            input_ids[i, :n], labels[i, :n] = ids, row_labels
            lengths.append(n)
        batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if packed:
            parts = [_parts(row) for row in rows]
            positions = np.stack([position_ids(lengths, length, starts) for lengths, starts in parts])
            if branches:
                last = np.stack([last_readers(lengths, starts, length) for lengths, starts in parts])
                batch["attention_mask"] = self.masks(positions, last)
            if self.numbered:
                numbers = [document_numbers(lengths, length) for lengths, _ in parts]
                batch["seq_idx"] = torch.from_numpy(np.stack(numbers))
            return {**batch, "position_ids": torch.from_numpy(positions)}
        mask = np.arange(length) < np.array(lengths)[:, None]
        return {**batch, "attention_mask": torch.from_numpy(mask.astype(np.int64))}

    def _flat(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Packs end to end in one row, with the borders of documents as flash-attention's kernels take them."""
        import torch

        def joined(column: str) -> np.ndarray:
            return np.concatenate([np.asarray(row[column]) for row in rows], dtype=np.int64)

        if any(np.any(row["seq_starts"]) for row in rows if "seq_starts" in row):
            raise DataError(
                "rows with folded turns cannot be taken by their borders; set data.fold_turns to false, or "
                "model.attn_implementation to sdpa"
            )
        lengths = joined("seq_lengths")
        ends = np.cumsum(lengths)
        labels = joined("labels")
        labels[ends - lengths] = IGNORE_INDEX  # nothing is predicted across a border
        borders = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
        longest = int(lengths.max())
        numbers = torch.from_numpy(document_numbers(lengths, len(labels)))[None]
        return {
            **({"seq_idx": numbers} if self.numbered else {}),
            "input_ids": torch.from_numpy(joined("input_ids"))[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(position_ids(lengths, len(labels)))[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _parts(row: Mapping[str, Any]) -> tuple[Sequence[int], Sequence[int]]:
    """Lengths and first positions of the documents and branches of a row."""
    lengths = row.get("seq_lengths", [len(row["input_ids"])])
    return lengths, row.get("seq_starts", [0] * len(lengths))


def checked(row: Mapping[str, Any], i: int) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `labels` of row `i` of a batch, which fit each other and carry loss."""
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    if ids.shape != labels.shape:
        raise DataError(f"row {i} of the batch has {len(ids)} input_ids and {len(labels)} labels")
    # position 0 has nothing before it that could predict it, so a label there is no loss
    if not (labels[1:] != IGNORE_INDEX).any():
        raise DataError(
            f"row {i} of the batch has no token that carries loss: its labels are all {IGNORE_INDEX}. "
            "prepare_dataset drops and counts such rows; drop them before training."
        )
    return ids, labels
