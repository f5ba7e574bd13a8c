"""The order of rows: steps of like length, the same for a seed, whatever the micro-batch."""

from __future__ import annotations

import numpy as np
import pytest

from instructft.data.row_order import LengthGrouped

LENGTHS = np.random.default_rng(0).integers(5, 500, 1003)


def order(step: int = 16, seed: int = 0, epoch: int = 0) -> list[int]:
    sampler = LengthGrouped(LENGTHS, step, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_row_comes_once() -> None:
    assert sorted(order()) == list(range(len(LENGTHS)))
    assert len(LengthGrouped(LENGTHS, 16, 0)) == len(LENGTHS)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    np.random.seed(1)
    assert order() == order()
    assert order(seed=1) != order()
    assert order(epoch=1) != order()


def padding(rows: list[int], step: int) -> float:
    batches = [LENGTHS[rows[i : i + step]] for i in range(0, len(rows), step)]
    slots = sum(batch.max() * len(batch) for batch in batches)
    return 1 - LENGTHS.sum() / slots


def test_little_is_padded() -> None:
    shuffled = np.random.default_rng(1).permutation(len(LENGTHS)).tolist()
    assert padding(shuffled, 16) > 0.4
    assert padding(order(), 16) < 0.05


def test_steps_are_shuffled_so_that_training_does_not_go_from_long_to_short() -> None:
    rows = order()
    means = [LENGTHS[rows[i : i + 16]].mean() for i in range(0, 16 * 50, 16)]
    assert np.corrcoef(np.arange(len(means)), means)[0, 1] == pytest.approx(0, abs=0.35)


def test_the_example_in_the_docstring() -> None:
    assert list(LengthGrouped([3, 9, 3, 9], step=2, seed=0)) == [2, 0, 1, 3]
