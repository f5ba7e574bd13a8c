"""Packs end to end: every batch has one shape, and holds what the same packs hold as rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from instructft.data.arrow.token_rows import tokens_of
from instructft.data.batches.branches import Masks
from instructft.data.batches.flat_packs import CHUNK, SMALL_CHUNK, FlatPacks, rows_in, some_rows, whole_chunks
from instructft.data.collator import CompletionOnlyCollator
from instructft.errors import DataError
from tests.helpers.plain_batches import plain_batch, random_rows, same

WIDTH, PACKS, PAD = 48, 4, 3


def collator(documents: int = 16) -> FlatPacks:
    return FlatPacks(PAD, WIDTH, PACKS, documents)


def borders_of(rows: list[dict[str, Any]]) -> list[int]:
    """Where documents begin, the rest of each pack being one, and where the last ends."""
    borders = []
    for place in range(PACKS):
        at = place * WIDTH
        for length in rows[place]["seq_lengths"] if place < len(rows) else []:
            borders.append(at)
            at += length
        if at < (place + 1) * WIDTH:
            borders.append(at)
    return [*borders, PACKS * WIDTH]


def test_nothing_is_predicted_across_a_border() -> None:
    """Whatever the labels of the rows say."""
    rows: Any = [{"input_ids": [7] * 10, "labels": [7] * 10, "seq_lengths": [6, 4]}] * PACKS
    batch = collator()(rows)
    starts = batch["cu_seq_lens_q"][:-1].unique().long()
    assert set(batch["labels"][0, starts[starts < PACKS * WIDTH]].tolist()) == {-100}
    assert int((batch["labels"] == 7).sum()) == int((batch["supervised_labels"] == 7).sum()) == PACKS * 8


@pytest.mark.parametrize("count", [PACKS, 1])  # a last batch of an epoch may have fewer
def test_a_flat_batch_holds_what_rows_hold(count: int) -> None:
    for seed in range(20):
        rows: Any = random_rows(count, packed=True, seed=seed)
        batch, plain = collator()(rows), plain_batch(rows, PAD, WIDTH)
        for name in ("input_ids", "labels", "position_ids"):
            assert batch[name].shape == (1, PACKS * WIDTH)
            assert batch[name].dtype == torch.long
        seen = batch["input_ids"].view(PACKS, WIDTH)
        assert torch.equal(seen[:count], plain["input_ids"])
        assert (seen[count:] == PAD).all()
        assert torch.equal(batch["labels"].view(PACKS, WIDTH)[:count], plain["labels"])
        assert (batch["labels"].view(PACKS, WIDTH)[count:] == -100).all()
        borders = borders_of(rows)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            assert batch[name].dtype == torch.int32
            assert batch[name].tolist() == borders + [PACKS * WIDTH] * (17 - len(borders))
        positions = [i for a, b in pairwise(borders) for i in range(b - a)]
        assert batch["position_ids"][0].tolist() == positions
        assert batch["attention_mask"].tolist() == [[1] * PACKS * WIDTH]
        assert (batch["max_length_q"], batch["max_length_k"]) == (WIDTH, WIDTH)
        wanted = [(t, label) for t, label in enumerate(batch["labels"][0, 1:].tolist()) if label != -100]
        supervised = list(zip(batch["supervised"].tolist(), batch["supervised_labels"].tolist(), strict=True))
        assert supervised[: len(wanted)] == wanted
        assert set(supervised[len(wanted) :]) <= {(0, -100)}
        assert len(supervised) % SMALL_CHUNK == 0 < len(supervised)
        assert batch["supervised"].dtype == batch["supervised_labels"].dtype == torch.long


def test_batches_have_one_shape() -> None:
    rows: Any = random_rows(40 * PACKS, packed=True)
    collate = FlatPacks.of(tokens_of(Dataset.from_list(rows)), PAD, WIDTH, PACKS)
    batches = [collate(rows[i : i + PACKS]) for i in range(0, len(rows), PACKS)]
    batches.append(collate(rows[:1]))
    for batch in batches:
        for labels in ("supervised", "supervised_labels"):  # in chunks
            assert len(batch.pop(labels)) in (SMALL_CHUNK, 2 * SMALL_CHUNK)
    shapes = {str({k: getattr(v, "shape", v) for k, v in batch.items()}) for batch in batches}
    assert len(shapes) == 1
    held = [int(batch["cu_seq_lens_q"].unique().numel()) - 1 for batch in batches]
    assert max(held) <= collate.documents < 2 * max(held)  # room for all, and not much more


def test_borders_grow_where_a_batch_needs_more() -> None:
    collate = collator(documents=3)
    rows: Any = [{"input_ids": [1] * 8, "labels": [-100, 1] * 4, "seq_lengths": [2] * 4}]
    assert len(collate(rows)["cu_seq_lens_q"]) == 13  # 4 documents, a rest and 3 empty packs: 6 are too few, 12 do
    assert len(collate(rows)["cu_seq_lens_q"]) == 13
    assert FlatPacks.of(Dataset.from_list(rows).to_iterable_dataset(), PAD, WIDTH, PACKS).documents == 32


def test_the_head_scores_a_chunk_at_a_time() -> None:
    labels = torch.full((1, 2 * CHUNK), -100)
    assert [len(part) for part in whole_chunks(labels)] == [CHUNK, CHUNK]
    labels[0, : CHUNK + 2] = 5
    positions, wanted = whole_chunks(labels)
    assert len(positions) == 2 * CHUNK
    assert int((wanted == 5).sum()) == CHUNK + 1


def test_a_pack_that_cannot_be_trained_is_named() -> None:
    good: Any = random_rows(1, packed=True)
    with pytest.raises(DataError, match="row 1 of the batch is a pack of 49 tokens, where 48 are the most"):
        collator()([*good, {"input_ids": [1] * 49, "labels": [1] * 49, "seq_lengths": [49]}])
    with pytest.raises(DataError, match=r"row 1 .* no token that carries loss"):
        collator()([*good, {"input_ids": [1, 2], "labels": [1, -100], "seq_lengths": [2]}])


def test_a_part_of_a_flat_batch_is_the_batch_of_its_packs() -> None:
    rows: Any = random_rows(PACKS, packed=True)
    batch = collator()(rows)
    assert rows_in(batch) == (PACKS, WIDTH)
    for start, stop in ((0, 1), (1, 3), (3, 4), (2, 6)):
        part, packs = some_rows(batch, start, stop), min(stop, PACKS) - start
        wanted = FlatPacks(PAD, WIDTH, packs, 16)(rows[start:stop])
        assert rows_in(part) == (packs, WIDTH)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):  # the borders of a part keep their number
            assert part[name].shape == batch[name].shape
            assert part.pop(name).unique().tolist() == wanted.pop(name).unique().tolist()
        assert same(part, wanted)


def test_a_part_of_a_padded_batch_is_its_rows() -> None:
    batch: Any = {**CompletionOnlyCollator(PAD)(random_rows(5, packed=False)), "use_cache": False}
    assert rows_in(batch) == tuple(batch["input_ids"].shape)
    part = some_rows(batch, 1, 3)
    assert part.pop("use_cache") is False
    assert all(torch.equal(value, batch[name][1:3]) for name, value in part.items())
    parts: Any = [some_rows(batch, i, i + 2)["labels"] for i in (0, 2, 4)]
    assert np.concatenate(parts).tolist() == batch["labels"].tolist()


def test_a_part_of_a_batch_with_branches_has_its_part_of_each_mask() -> None:
    row = {
        "input_ids": [1, 2, 3, 2, 5],
        "labels": [-100, -100, 3, -100, 5],
        "seq_lengths": [3, 2],
        "seq_starts": [0, 1],
    }
    masks = Masks({"full_attention": ("all", 0), "sliding_attention": ("window", 2)}, by_layer=True)
    collate = CompletionOnlyCollator(0, masks=masks)
    part = some_rows(collate([row, row, row]), 1, 3)
    wanted = collate([row, row])
    assert all(torch.equal(part["attention_mask"][kind], mask) for kind, mask in wanted["attention_mask"].items())
    assert all(torch.equal(part[name], wanted[name]) for name in ("input_ids", "labels", "position_ids"))
