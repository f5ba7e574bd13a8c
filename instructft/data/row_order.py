"""The order in which rows are trained: rows of like length share a step, so that little padding is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell all that a data loader draws rows from which epoch begins, however deeply it is wrapped.

    accelerate's own `set_epoch` looks one or two levels down. A loader of several processes that passes over the steps
    before a resume has a level more, `SkipBatchSampler(BatchSamplerShard(BatchSampler(sampler)))`, and its sampler
    would give epoch 0's order again (accelerate 1.15).
    """
    inner, seen = [loader], set()
    while inner:
        part = inner.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        inner += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "base_dataloader", "dataset")]
        if callable(tell := getattr(part, "set_epoch", None)):
            tell(epoch)


class LengthGrouped(Sampler[int]):
    """Row numbers in an order whose steps hold rows of like length, so that little padding is computed.

    Rows are shuffled, then sorted by length within windows of `WINDOW` steps, and the steps are shuffled: which rows
    share a step depends on the rows of a step in all, not on how they are divided among micro-batches and processes.
    The order of an epoch depends on `seed` and the epoch only, so that a run can be resumed.

    >>> list(LengthGrouped([3, 9, 3, 9], step=2, seed=0))
    [2, 0, 1, 3]
    """

    WINDOW = 50  # steps; as in transformers' LengthGroupedSampler

    def __init__(self, lengths: Any, step: int, seed: int):
        self.lengths = np.asarray(lengths)
        self.step = step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        steps: list[np.ndarray] = []
        for start in range(0, len(order), self.WINDOW * self.step):
            window = order[start : start + self.WINDOW * self.step]
            window = window[np.argsort(-self.lengths[window], kind="stable")]
            steps += [window[i : i + self.step] for i in range(0, len(window), self.step)]
        # a last step that is not full stays last, since batches are cut from the order one after the other
        full = [rows for rows in steps if len(rows) == self.step]
        rest = [rows for rows in steps if len(rows) < self.step]
        rng.shuffle(full)
        yield from (int(row) for rows in [*full, *rest] for row in rows)
