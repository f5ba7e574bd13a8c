"""What a batch says of itself is what its tensors hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from instructft.data.batches.counts import Counting, counted, taken
from instructft.data.batches.flat_packs import FlatPacks
from instructft.data.collator import CompletionOnlyCollator
from tests.helpers.plain_batches import random_rows

COLLATORS: dict[str, Any] = {
    "padded": CompletionOnlyCollator(0),
    "to a multiple": CompletionOnlyCollator(0, pad_to_multiple_of=16),
    "packs": CompletionOnlyCollator(0),
    "flat": CompletionOnlyCollator(0, flatten=True),
    "flat, of a fixed shape": FlatPacks(0, width=48, packs=6, documents=8),
}


@pytest.mark.parametrize("kind", COLLATORS)
def test_a_batch_says_what_it_holds(kind: str) -> None:
    rows: Any = random_rows(5, packed="padded" not in kind and "multiple" not in kind)
    batch = Counting(COLLATORS[kind])(rows)
    assert type(batch["counts"]) is tuple
    assert all(type(count) is int for count in batch["counts"])
    slots = batch["input_ids"].numel()
    tokens = sum(len(row["input_ids"]) for row in rows)
    supervised = sum(label != -100 for row in rows for label in row["labels"][1:])
    counts = taken(batch)
    assert counts == (tokens, supervised, slots)
    assert "counts" not in batch
    if kind != "flat, of a fixed shape":  # whose padding is a document like any other
        assert counted(batch) == counts
        assert taken(batch) == counts  # one that was divided among processes has lost its counts


@pytest.mark.parametrize("kind", COLLATORS)
def test_a_label_that_nothing_predicts_is_no_supervised_token(kind: str) -> None:
    lengths = {} if kind in ("padded", "to a multiple") else {"seq_lengths": [2, 2]}
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, -100, 8], **lengths}
    assert Counting(COLLATORS[kind])([row])["counts"][:2] == (4, 2)


def test_a_list_will_do() -> None:
    """Pinning a batch made lists of tuples in older releases of torch."""
    assert taken({"counts": [1, 2, 3], "labels": torch.zeros(1, 1)}) == (1, 2, 3)


def test_branches_are_counted_by_their_positions() -> None:
    """A batch that another process has put together says nothing; its mask (B, 1, T, T) is no count of tokens."""
    row = {
        "input_ids": [1, 2, 3, 2, 5],
        "labels": [-100, -100, 3, -100, 5],
        "seq_lengths": [3, 2],
        "seq_starts": [0, 1],
    }
    short = {"input_ids": [1, 2], "labels": [-100, 2], "seq_lengths": [2], "seq_starts": [0]}
    batch = CompletionOnlyCollator(0)([row, short])
    assert batch["attention_mask"].dim() == 4
    assert counted(batch) == taken(Counting(CompletionOnlyCollator(0))([row, short])) == (7, 3, 10)
