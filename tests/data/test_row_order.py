"""The order of rows: steps of like length, the same for a seed, whatever the micro-batch."""

from __future__ import annotations

import numpy as np
import pytest

from instructft.data.row_order import LengthGrouped, set_epoch

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


def test_a_new_epoch_is_told_through_every_wrapper() -> None:
    """As in a run of two processes that passes over steps after a resume, and in one whose rows are dispatched."""
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler
    from torch.utils.data import BatchSampler, DataLoader

    sampler = LengthGrouped(LENGTHS, 16, 0)
    batches = BatchSamplerShard(BatchSampler(sampler, 4, False), num_processes=2, process_index=1)
    for loader in (
        DataLoader(LENGTHS, batch_sampler=SkipBatchSampler(batches, 3)),
        DataLoaderShard(LENGTHS, batch_sampler=SkipBatchSampler(SkipBatchSampler(batches, 3), 2)),
    ):
        sampler.epoch = 0
        set_epoch(loader, 2)
        assert sampler.epoch == 2
