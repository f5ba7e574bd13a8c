"""Folded turns: each is in the row as it is served, is trained as often as before, and is read by itself alone."""

from __future__ import annotations

import doctest
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instructft.data.batches import branches
from instructft.data.batches.branches import Masks, Row, fold, fold_all, last_readers, unfolded
from instructft.data.packing import position_ids

NO = -100
NAMES = ("input_ids", "labels", "seq_lengths", "seq_starts")


def turn(ids: list[int], trained: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A turn of these ids, with loss at these places."""
    labels = [token if i in trained else NO for i, token in enumerate(ids)]
    return np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)


@st.composite
def conversations(draw: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Turns that share beginnings: each takes some of the one before it, and goes on in its own way."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    before: list[int] = []
    for _ in range(draw(st.integers(1, 5))):
        start = before[: draw(st.integers(0, len(before)))]
        ids = [*start, *draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))]
        ids = ids if len(ids) > 1 else [*ids, 0]
        found.append(turn(ids, draw(st.lists(st.integers(0, len(ids) - 1), max_size=4))))
        before = ids
    return found


def paths(row: Row) -> list[list[int]]:
    """The slots that each slot reads, itself the last."""
    last = last_readers(row.lengths, row.starts, len(row.input_ids))
    return [[k for k in range(q + 1) if last[k] >= q] for q in range(len(last))]


def test_the_examples_in_the_docstrings() -> None:
    found = doctest.testmod(branches)
    assert (found.attempted, found.failed) == (8, 0)


@given(turns=conversations(), most=st.integers(12, 40))
def test_every_turn_is_read_and_trained_as_in_a_row_of_its_own(turns: Any, most: int) -> None:
    turns = [(ids[:most], labels[:most]) for ids, labels in turns]
    rows = fold(turns, most)
    contexts: Counter = Counter()
    read = set()
    for row in rows:
        assert len(row.input_ids) == len(row.labels) == sum(row.lengths) <= most
        positions = position_ids(row.lengths, len(row.input_ids), row.starts)
        for slot, path in enumerate(paths(row)):
            assert positions[path].tolist() == list(range(len(path)))  # as served
            read.add(tuple(row.input_ids[path].tolist()))
            if positions[slot] and row.labels[slot] != NO:
                assert path[-2] == slot - 1  # what predicts it: labels are shifted by one
                assert row.labels[slot] == row.input_ids[slot]
                contexts[tuple(row.input_ids[path].tolist())] += 1
    wanted = Counter(tuple(ids[: i + 1].tolist()) for ids, labels in turns for i in np.flatnonzero(labels != NO) if i)
    assert contexts == wanted
    again = [unfolded(dict(zip(NAMES, row, strict=True))) for row in rows]
    alone = Counter(tuple(turn["input_ids"][: i + 1]) for some in again for turn in some
                    for i, label in enumerate(turn["labels"]) if i and label != NO)  # fmt: skip
    assert alone == wanted
    assert {tuple(ids.tolist()) for ids, _ in turns} <= read


def test_the_shared_part_stands_once() -> None:
    trunk = list(range(50))
    turns = [turn([*trunk[: 10 * n], 90 + n, 99], [10 * n, 10 * n + 1]) for n in range(1, 6)]
    (row,) = fold(turns, 1000)
    assert (
        len(row.input_ids) == 50 + 5 * 2 + 4
    )  # the trunk, five answers, and a copy where each of four branches begins
    assert row.starts == [0, 9, 19, 29, 39]


@pytest.mark.parametrize(("asked", "thought", "said"), [(10, 40, 20), (20, 20, 20), (10, 20, 20), (5, 1, 30)])
def test_no_token_is_computed_that_could_be_shared(asked: int, thought: int, said: int) -> None:
    """A causal model's state at a token is that of all before it: each beginning that differs has to be computed."""
    count, new = 12, iter(range(10_000))
    history: list[int] = []
    turns = []
    for _ in range(count):
        history += [next(new) for _ in range(asked)]
        thinks, says = ([next(new) for _ in range(n)] for n in (thought, said))
        ids = [*history, *thinks, *says]
        turns.append(turn(ids, list(range(len(history), len(ids)))))
        history += says
    (row,) = fold(turns, 10_000)
    beginnings = {tuple(ids[: end + 1].tolist()) for ids, _ in turns for end in range(len(ids))}
    assert len(row.input_ids) == len(beginnings) + count - 1  # and the token that each branch begins with
    once = count * (asked + thought + said)
    assert len(beginnings) == once + (count - 1) * said  # an answer behind its thought, and once more without it


def test_a_token_that_two_turns_train_is_not_shared() -> None:
    (row,) = fold([turn([1, 2, 3, 4], [2, 3]), turn([1, 2, 3, 5], [2, 3])], 100)
    assert row.starts == [0, 1]
    assert row.labels.tolist() == [NO, NO, 3, 4, NO, 3, 5]


def test_a_label_of_a_later_turn_lands_on_the_shared_token() -> None:
    (row,) = fold([turn([1, 2, 3, 4], [3]), turn([1, 2, 3, 5], [2])], 100)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 3, 5]
    assert row.labels.tolist() == [NO, NO, 3, 4, NO, NO]


def test_turns_that_do_not_fit_go_to_another_row() -> None:
    turns = [turn([1, 2, 3, n, n + 1], [3, 4]) for n in range(5, 25, 5)]
    rows = fold(turns, 8)
    assert [row.lengths for row in rows] == [[5, 3], [5, 3]]


def test_only_what_saves_enough_is_folded() -> None:
    turns = [turn([1, 2, *range(10, 30)], [21]), turn([1, 2, *range(40, 60)], [21]), turn([7, 8], [1])]
    ids, labels = (np.concatenate(column) for column in zip(*turns, strict=True))
    sizes, each = np.array([len(ids) for ids, _ in turns]), np.array([2, 0, 1])
    rows = fold_all(ids, labels, sizes, each, 100, worth=0.9)
    assert (rows.each.tolist(), rows.sizes.tolist(), rows.seq_starts.tolist()) == ([2, 0, 1], [22, 22, 2], [0, 0, 0])
    np.testing.assert_array_equal(rows.input_ids, ids)
    rows = fold_all(ids, labels, sizes, each, 100, worth=1.0)
    assert (rows.each.tolist(), rows.sizes.tolist(), rows.segments.tolist()) == ([1, 0, 1], [43, 2], [2, 1])
    assert rows.seq_starts.tolist() == [0, 1, 0]


@pytest.mark.parametrize(("how", "tokens"), [("all", 0), ("window", 3), ("chunk", 4)])
def test_a_mask_shows_what_the_turn_alone_would_see(how: str, tokens: int) -> None:
    (row,) = fold([turn([1, 2, 3, 4, 5, 6, 7], [6]), turn([1, 2, 3, 8, 9, 10], [5])], 100)
    width = len(row.input_ids) + 2
    positions, last = position_ids(row.lengths, width, row.starts), last_readers(row.lengths, row.starts, width)
    seen = Masks({"any": (how, tokens)})(positions[None], last[None])
    assert seen.shape == (1, 1, width, width)
    far = {"all": lambda q, k: True, "window": lambda q, k: q - k < 3, "chunk": lambda q, k: q // 4 == k // 4}[how]
    wanted = [[k for k in path if far(positions[path[-1]], positions[k])] for path in paths(row)]
    assert [np.flatnonzero(line).tolist() for line in seen[0, 0, :-2].numpy()] == wanted
    assert [np.flatnonzero(line).tolist() for line in seen[0, 0, -2:].numpy()] == [[width - 2], [width - 1]]  # pads
    added = Masks({"any": (how, tokens)}, added=True)(positions[None], last[None])
    assert torch.equal(added == 0, seen)
    assert added.min() == torch.finfo(torch.float32).min


def test_a_model_with_several_types_of_layers_gets_a_mask_for_each() -> None:
    layers = {"full_attention": ("all", 0), "sliding_attention": ("window", 2)}
    found = Masks(layers, by_layer=True)(np.array([[0, 1, 2]]), np.array([[2, 2, 2]]))
    assert {name: int(mask.sum()) for name, mask in found.items()} == {"full_attention": 6, "sliding_attention": 5}
