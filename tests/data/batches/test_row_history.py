"""Whose each slot of a batch is, and what is kept of its losses: on one process, on several, here or on a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instructft.data.batches import row_history
from instructft.data.batches.flat_packs import FlatPacks
from instructft.data.batches.row_history import NUMBER, ROW_OF, Numbered, Origins, RowHistory, SaysWhose, Seen, together
from instructft.data.collator import CompletionOnlyCollator

NO = -100


def plain(*lengths: int) -> Origins:
    many = np.arange(len(lengths))
    return Origins.of([(0, many, many)], np.array(lengths))


def row(number: int, *documents: int) -> dict[str, object]:
    total = sum(documents)
    found = {"input_ids": [5] * total, "labels": [NO] + [5] * (total - 1), NUMBER: number}
    return {**found, "seq_lengths": list(documents)} if len(documents) > 1 else found


def test_padded_rows_and_packs_say_whose_their_slots_are():
    collate = SaysWhose(CompletionOnlyCollator(0), plain(2, 4, 3))
    batch = collate([row(0, 2), row(2, 3)])
    assert batch[ROW_OF].tolist() == [[0, 0, -1], [2, 2, 2]]
    assert batch[ROW_OF].shape == batch["labels"].shape
    assert NUMBER not in batch
    packed = plain(2, 4, 3).packed(np.array([1, 0, 2]), np.array([2, 1]))  # packs: rows 1 and 0, row 2
    batch = SaysWhose(CompletionOnlyCollator(0), packed)([row(0, 4, 2), row(1, 3)])
    assert batch[ROW_OF].tolist() == [[1, 1, 1, 1, 0, 0], [2, 2, 2, -1, -1, -1]]


@pytest.mark.parametrize("fixed", [False, True], ids=["end to end", "of a fixed width"])
def test_flat_packs_say_whose_their_slots_are(fixed):
    packed = plain(2, 4, 3, 2).packed(np.array([1, 0, 2, 3]), np.array([2, 2]))
    rows = [row(1, 3, 2), row(0, 4, 2)]
    collate = FlatPacks(0, 8, 2, 6) if fixed else CompletionOnlyCollator(0, flatten=True)
    pad = [-1] * 3 if fixed else []
    found = SaysWhose(collate, packed)(rows)[ROW_OF]
    assert found.tolist() == [[2, 2, 2, 3, 3, *pad, 1, 1, 1, 1, 0, 0, *pad[:2]]]


def test_a_row_that_is_repeated_and_one_of_several_turns_are_known():
    # of a data set whose rows 0 and 2 are trained as two and one rows, 0, 1 and 3: these twice and once
    raw = np.array([0, 0, 1, 2])
    origins = Origins.of([(0, np.array([0, 1, 3, 0, 1]), raw), (1, np.array([0]), np.array([4]))], np.full(6, 3))
    assert origins.documents.tolist() == [0, 1, 2, 0, 1, 3]
    assert list(zip(origins.part.tolist(), origins.row.tolist(), strict=True)) == [(0, 0), (0, 0), (0, 2), (1, 4)]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_probs and mask (2, 4), whose (2, 5): documents 3 and 1 in a pack, document 0 and padding."""
    log_probs = torch.tensor([[0.0, -2.0, -4.0, -1.0], [-6.0, -7.0, 0.0, 0.0]])
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    return log_probs, mask, torch.tensor([[3, 3, 3, 3, 1], [0, 0, 0, -1, -1]], dtype=torch.int32)


@pytest.mark.parametrize("there", [False, True], ids=["here", "on a device"])
@pytest.mark.parametrize("at_once", [False, True], ids=["later", "at once"])
def test_first_and_last_sight(there, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(row_history, "_AT_ONCE", 0)
    history = RowHistory(plain(3, 1, 5, 4))
    see = history._see_there if there else history._see_here
    log_probs, mask, row_of = batch()
    see(log_probs, mask, row_of, 1)
    see(log_probs * 2, mask & torch.tensor([[True], [False]]), row_of, 7)
    if at_once:
        history.seen()
    see(log_probs, torch.zeros_like(mask), row_of, 8)  # nothing carries loss
    seen = history.seen()
    assert seen.first.tolist() == [6.5, 1.0, 0.0, 3.0]
    assert seen.last.tolist() == [6.5, 2.0, 0.0, 6.0]
    assert seen.first_step.tolist() == [1, 1, -1, 1]
    assert seen.last_step.tolist() == [1, 7, -1, 7]


@pytest.mark.parametrize("there", [False, True], ids=["here", "on a device"])
def test_what_a_checkpoint_holds_is_gone_on_from(there):
    log_probs, mask, row_of = batch()
    whole, before, after = (RowHistory(plain(3, 1, 5, 4)) for _ in range(3))
    whole.see(log_probs, mask, row_of, 1)
    whole.see(log_probs * 3, mask, row_of, 2)
    before.see(log_probs, mask, row_of, 1)
    assert after.restore(before.state())
    (after._see_there if there else after._see_here)(log_probs * 3, mask, row_of, 2)
    for one, other in zip(whole.seen(), after.seen(), strict=True):
        assert np.array_equal(one, other)
    assert not RowHistory(plain(3, 1)).restore(before.state())  # rows of another number: nothing is taken from it


def test_processes_together_know_the_first_and_the_last_sight_of_any():
    one = Seen(*map(np.array, ([2.0, 5.0, 0.0], [1.0, 4.0, 0.0], [1, 3, -1], [9, 3, -1])))
    other = Seen(*map(np.array, ([3.0, 6.0, 7.0], [0.5, 3.0, 7.0], [4, 2, 6], [12, 2, 6])))
    found = together([one, other])
    assert [values.tolist() for values in found] == [[2.0, 6.0, 7.0], [0.5, 4.0, 7.0], [1, 2, 6], [12, 3, 6]]


def test_rows_say_their_place_and_stay_what_they_are():
    rows = Numbered([{"input_ids": [1]}, {"input_ids": [2]}])
    assert len(rows) == 2
    assert rows.__getitems__([1, 0]) == [{"input_ids": [2], NUMBER: 1}, {"input_ids": [1], NUMBER: 0}]


def test_a_document_that_ends_one_batch_and_begins_the_next_is_seen_twice():
    history, one = RowHistory(plain(2)), torch.zeros((1, 2), dtype=torch.int32)
    for step, loss in ((1, 4.0), (2, 2.0), (3, 1.0)):
        history.see(torch.tensor([[-loss]]), torch.tensor([[True]]), one, step)
    seen = history.seen()
    assert [float(values[0]) for values in seen] == [4.0, 1.0, 1.0, 3.0]
