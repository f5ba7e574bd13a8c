"""Parts of a batch cost least, hold every row, and are what those rows are alone."""

from __future__ import annotations

import itertools
import random

import torch

from instructft.data.batches.counts import Counting
from instructft.data.batches.parts import cut_out, divide
from instructft.data.collator import CompletionOnlyCollator


def cost(lengths: list[int], borders: tuple[int, ...], once_more: int) -> int:
    ends = itertools.pairwise((0, *borders, len(lengths)))
    return sum(max(lengths[a:b]) * (b - a) + once_more for a, b in ends)


def test_no_other_division_costs_less() -> None:
    draw = random.Random(0)
    for _ in range(60):
        lengths = [draw.randrange(1, 200) for _ in range(draw.randrange(1, 7))]
        if draw.random() < 0.7:
            lengths.sort(reverse=True)
        once_more = draw.choice([0, 10, 64])
        found = divide(lengths, once_more)
        assert [row for start, stop, _ in found for row in range(start, stop)] == list(range(len(lengths)))
        assert all(width == max(lengths[start:stop]) for start, stop, width in found)
        inner = range(1, len(lengths))
        all_borders = itertools.chain.from_iterable(itertools.combinations(inner, n) for n in range(len(lengths)))
        ours = tuple(stop for _, stop, _ in found[:-1])
        assert cost(lengths, ours, once_more) == min(cost(lengths, borders, once_more) for borders in all_borders)


def test_a_part_is_the_batch_of_its_rows() -> None:
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": [-100, *range(6, 5 + n)]} for n in (200, 180, 20, 9)]
    collate = CompletionOnlyCollator(0)
    batch = Counting(collate, once_more=64)(rows)
    assert batch["parts"] == ((0, 2, 200), (2, 4, 20))
    assert batch["counts"] == (409, 405, 2 * 200 + 2 * 20)
    for start, stop, width in batch["parts"]:
        alone = collate(rows[start:stop])
        part = cut_out({k: v for k, v in batch.items() if k not in ("parts", "counts")}, (start, stop, width))
        assert part.keys() == alone.keys()
        assert all(torch.equal(part[name], alone[name]) for name in alone)


def test_widths_are_a_multiple_where_the_batch_is() -> None:
    rows = [{"input_ids": [7] * n, "labels": [7] * n} for n in (199, 20)]
    batch = Counting(CompletionOnlyCollator(0, 8), once_more=64)(rows)
    assert batch["parts"] == ((0, 1, 200), (1, 2, 24))


def test_a_batch_of_like_lengths_stays_whole() -> None:
    rows = [{"input_ids": [7] * n, "labels": [7] * n} for n in (100, 99, 98)]
    assert "parts" not in Counting(CompletionOnlyCollator(0), once_more=64)(rows)
    assert "parts" not in Counting(CompletionOnlyCollator(0))([rows[0], {"input_ids": [7, 7], "labels": [7, 7]}])
