"""A batch: padded by length, packs with positions of their own, and no row without loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from instructft.data.arrow.token_rows import tokens_of
from instructft.data.batches.branches import Masks
from instructft.data.batches.flat_packs import FlatPacks
from instructft.data.collator import CompletionOnlyCollator
from instructft.errors import DataError
from instructft.prompt.loss_mask import encode_conversation
from tests.helpers.conversations import assistant, user, with_template
from tests.helpers.plain_batches import plain_batch, random_rows, same


def test_collator_keeps_the_loss_on_an_eos_that_is_also_the_pad(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "instruction")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    long = encode_conversation([user("Say it."), assistant("It is said at some length.")], tokenizer)
    short = encode_conversation([user("Hi"), assistant("Hi")], tokenizer)
    batch = CompletionOnlyCollator(tokenizer.pad_token_id)([long, short])
    n, width = len(short["input_ids"]), len(long["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["labels"][0].tolist() == long["labels"]
    assert batch["labels"][0, -1] == tokenizer.eos_token_id  # the end of the answer is trained
    assert batch["labels"][1].tolist() == short["labels"] + [-100] * (width - n)
    assert batch["labels"][1, n - 1] == tokenizer.eos_token_id
    assert batch["attention_mask"].tolist() == [[1] * width, [1] * n + [0] * (width - n)]
    assert batch["input_ids"][1, n:].tolist() == [tokenizer.pad_token_id] * (width - n)


def test_collator_pads_to_a_multiple() -> None:
    batch = CompletionOnlyCollator(0, pad_to_multiple_of=8)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    assert batch["input_ids"].shape == (1, 8)


@pytest.mark.parametrize("labels", [[-100, -100, -100], [1, -100, -100]])  # the first token is predicted by nothing
def test_collator_refuses_a_row_without_loss(labels: list[int]) -> None:
    good = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    with pytest.raises(DataError, match=r"row 1 .* no token that carries loss"):
        CompletionOnlyCollator(0)([good, {"input_ids": [1, 2, 3], "labels": labels}])


def test_collator_refuses_labels_of_another_length() -> None:
    with pytest.raises(DataError, match="3 input_ids and 2 labels"):
        CompletionOnlyCollator(0)([{"input_ids": [1, 2, 3], "labels": [1, 2]}])


def test_a_batch_of_packs() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "seq_lengths": [3, 2]},
        {"input_ids": [6, 7], "labels": [-100, 7], "seq_lengths": [2]},
    ]
    batch = CompletionOnlyCollator(0)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100, 7, -100, -100, -100]]
    flat = CompletionOnlyCollator(0, flatten=True)(rows)
    assert flat["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert flat["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, 7]]
    assert flat["cu_seq_lens_q"].tolist() == flat["cu_seq_lens_k"].tolist() == [0, 3, 5, 7]
    assert flat["cu_seq_lens_q"].dtype == torch.int32
    assert (flat["max_length_q"], flat["max_length_k"]) == (3, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_those_made_token_by_token(packed: bool) -> None:
    """Of lists, of arrays and of the slices that training takes."""
    for seed in range(20):
        rows: list[Any] = random_rows(6, packed, seed=seed)
        wanted = plain_batch(rows, pad=3)
        arrays = [{name: np.array(values, dtype=np.int32) for name, values in row.items()} for row in rows]
        slices = tokens_of(Dataset.from_list(rows))
        for some in (rows, arrays, slices.__getitems__(range(6))):
            assert same(CompletionOnlyCollator(3)(some), wanted)
        wider = plain_batch(rows, pad=3, width=-(-wanted["labels"].shape[1] // 16) * 16)
        assert same(CompletionOnlyCollator(3, pad_to_multiple_of=16)(rows), wider)
        if packed:
            flat = CompletionOnlyCollator(3, flatten=True)(slices.__getitems__(range(6)))
            assert same(flat, plain_flat(rows))


def plain_flat(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Packs end to end without padding."""
    whole = {name: [value for row in rows for value in row[name]] for name in ("input_ids", "labels", "seq_lengths")}
    borders = torch.tensor([0, *whole["seq_lengths"]]).cumsum(0)
    return {
        "input_ids": torch.tensor([whole["input_ids"]]),
        "labels": torch.tensor([whole["labels"]]),
        "position_ids": torch.cat([torch.arange(n) for n in whole["seq_lengths"]])[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders.int()),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(whole["seq_lengths"])),
    }


FOLDED = {
    "input_ids": [1, 2, 3, 4, 2, 5],
    "labels": [-100, -100, 3, 4, -100, 5],
    "seq_lengths": [4, 2],
    "seq_starts": [0, 1],
}
ALONE = {"input_ids": [7, 8, 9], "labels": [-100, 8, 9], "seq_lengths": [3], "seq_starts": [0]}


def test_a_batch_with_branches_says_slot_by_slot_who_sees_whom() -> None:
    batch = CompletionOnlyCollator(0)([FOLDED, ALONE])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 1, 2], [0, 1, 2, 0, 0, 0]]
    seen = [
        [[k for k, shown in enumerate(line) if shown] for line in row[0]] for row in batch["attention_mask"].tolist()
    ]
    assert seen == [
        [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 4], [0, 4, 5]],
        [[0], [0, 1], [0, 1, 2], [3], [4], [5]],  # a pad sees itself
    ]
    layers = {"full_attention": ("all", 0), "sliding_attention": ("window", 2)}
    masks = CompletionOnlyCollator(0, masks=Masks(layers, by_layer=True))([FOLDED, ALONE])["attention_mask"]
    assert torch.equal(masks["full_attention"], batch["attention_mask"])
    assert [int(mask.sum()) for mask in masks.values()] == [24, 19]


def test_rows_beside_branches_are_what_they_are_elsewhere() -> None:
    """Where no row of a batch has a branch, it takes no mask slot by slot."""
    plain = {name: ALONE[name] for name in ("input_ids", "labels")}
    collate = CompletionOnlyCollator(0)
    assert same(collate([ALONE, ALONE]), collate([plain, plain]))
    assert same(collate([FOLDED, plain]), collate([FOLDED, ALONE]))  # as a stream has them


def test_borders_alone_cannot_take_branches() -> None:
    with pytest.raises(
        DataError, match=r"folded turns cannot be taken by their borders; set data\.fold_turns to false"
    ):
        CompletionOnlyCollator(0, flatten=True)([FOLDED])


def test_packs_with_the_numbers_of_their_documents() -> None:
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}] * 2
    rows[1] = {"input_ids": [5, 6], "labels": [-100, 6], "seq_lengths": [2]}
    found = CompletionOnlyCollator(0, numbered=True)(rows)
    assert found["seq_idx"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 2, 3]]
    assert found["seq_idx"].dtype == torch.int32
    assert "seq_idx" not in CompletionOnlyCollator(0)(rows)
    assert CompletionOnlyCollator(0, flatten=True, numbered=True)(rows)["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    flat = FlatPacks(0, width=6, packs=2, documents=5, numbered=True)(rows)
    assert flat["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4, 4]]
