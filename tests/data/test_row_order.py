"""The order of rows: steps of all lengths, the same for a seed, whatever the micro-batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instructft.data.batches.parts import ONCE_MORE, divide
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


def answers_and_lengths() -> tuple[Any, Any]:
    """Tokens of answers, lognormal as in Dolly, and of whole rows."""
    rng = np.random.default_rng(0)
    answers = np.clip(rng.lognormal(3.6, 1.1, 12_000), 2, 900).astype(int)
    return answers, answers + rng.integers(20, 60, len(answers))


def ratio(rows: list[int], step: int, answers: Any) -> float:
    """What a token of the shortest tenth of the answers weighs, beside one of the longest: a step is a mean."""
    steps = np.array(rows[: len(rows) // step * step]).reshape(-1, step)
    weight = np.zeros(len(answers))
    weight[steps.reshape(-1)] = np.repeat(1 / answers[steps].sum(axis=1), step)
    low, high = np.quantile(answers, [0.1, 0.9])
    short, long = ((answers <= low) & (weight > 0), (answers >= high) & (weight > 0))
    return float(weight[short].mean() / weight[long].mean())


def padding(rows: list[int], batch: int, lengths: Any, once_more: int) -> float:
    """The share of slots that are padding, in batches that are divided in parts."""
    slots = tokens = 0
    for start in range(0, len(rows), batch):
        of_batch = lengths[rows[start : start + batch]]
        slots += sum((stop - first) * width for first, stop, width in divide(of_batch, once_more))
        tokens += of_batch.sum()
    return 1 - tokens / slots


@pytest.mark.parametrize(("step", "batch", "processes"), [(8, 8, 1), (32, 32, 1), (32, 8, 1), (64, 8, 2), (16, 8, 2)])
def test_a_token_weighs_the_same_in_every_row_and_little_is_padded(step: int, batch: int, processes: int) -> None:
    """Steps of rows of one length let it weigh 22 times as much in the shortest tenth; random order 1.1 to 1.8."""
    answers, lengths = answers_and_lengths()
    rows = list(LengthGrouped(lengths, step, 0, batch, processes))
    assert sorted(rows) == list(range(len(lengths)))
    assert ratio(rows, step, answers) < 1.5
    assert padding(rows, batch, lengths, ONCE_MORE["cpu"]) < 0.1
    whole = padding(np.random.default_rng(1).permutation(len(lengths)).tolist(), batch, lengths, 1 << 30)
    assert whole > 0.4


def test_every_process_gets_rows_of_the_same_lengths() -> None:
    """Each would wait for the one with the longest, at every step."""
    _, lengths = answers_and_lengths()
    rows = np.array(list(LengthGrouped(lengths, 32, 0, 4, 4)))[: len(lengths) // 32 * 32]
    tokens = lengths[rows].reshape(-1, 2, 4, 4).sum(axis=(1, 3))  # (steps, processes)
    assert (tokens.max(axis=1) / tokens.mean(axis=1)).mean() < 1.25


def test_steps_are_shuffled_so_that_training_does_not_go_from_long_to_short() -> None:
    rows = order()
    means = [LENGTHS[rows[i : i + 16]].mean() for i in range(0, 16 * 50, 16)]
    assert np.corrcoef(np.arange(len(means)), means)[0, 1] == pytest.approx(0, abs=0.35)


def test_the_example_in_the_docstring() -> None:
    assert list(LengthGrouped([3, 9, 3, 9], step=2, seed=0)) == [3, 2, 1, 0]


def test_which_rows_share_a_step_does_not_depend_on_how_they_are_divided() -> None:
    def steps(batch: int, processes: int) -> list[list[int]]:
        found = list(LengthGrouped(LENGTHS, 16, 0, batch, processes))
        return [sorted(found[i : i + 16]) for i in range(0, len(found), 16)]

    assert steps(16, 1) == steps(2, 1) == steps(4, 2)


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
