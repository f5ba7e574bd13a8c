"""The order in which rows are trained: steps of all lengths, so that tokens weigh alike, and little padding."""

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


ORDER = "of all lengths in a step"  # of `LengthGrouped`, in a checkpoint's identity; another one is another run


class LengthGrouped(Sampler[int]):
    """Row numbers in an order whose steps hold rows of all lengths, sorted so that little padding is computed.

    The loss of a step is the mean over its tokens. Steps of rows of one length would let a token of the shortest tenth
    of the rows weigh 22 times one of the longest; here it is below 1.5 times, and in random order 1.1 to 1.8. Rows are
    shuffled, then sorted by length within windows of `WINDOW` steps, and of each of `BANDS` bands of like length a step
    gets its share::

        window, longest first   ████████ ███████ ██████ ████ ██     5 bands
        a step of 5 rows        █        █       █      █    █      one of each, drawn at random

    Within a step rows go to processes in turn, and come longest first to each: batches hold like lengths, or are
    divided where they do not (`instructft.data.batches.parts`). Which rows share a step depends on the rows of a step
    in all, not on how they are divided among batches and processes. The order of an epoch depends on `seed` and the
    epoch only, so that a run can be resumed.

    Args:
        step: rows of a step, of all processes.
        batch: rows of a batch of one process; a step is one batch by default.
        processes: that train together.

    >>> list(LengthGrouped([3, 9, 3, 9], step=2, seed=0))
    [3, 2, 1, 0]
    """

    WINDOW = 50  # steps; as in transformers' LengthGroupedSampler
    BANDS = 5

    def __init__(self, lengths: Any, step: int, seed: int, batch: int | None = None, processes: int = 1):
        self.lengths = np.asarray(lengths)
        self.step = step
        self.seed = seed
        self.batch, self.processes = batch or step, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        full = len(order) // self.step * self.step
        steps: list[np.ndarray] = []
        for start in range(0, full, self.WINDOW * self.step):
            steps += self._mixed(order[start : min(start + self.WINDOW * self.step, full)], rng)
        rng.shuffle(steps)
        # a last step that is not full stays last, since batches are cut from the order one after the other
        for rows in (*steps, order[full:]):
            yield from self._dealt(rows).tolist()

    def _mixed(self, window: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """The steps of a window, each with its share of every band."""
        window = window[np.argsort(-self.lengths[window], kind="stable")]
        count, start, bands = len(window) // self.step, 0, []
        for part in np.array_split(np.arange(self.step), min(self.BANDS, self.step)):
            # neighbours in length stay together: (steps, rows of a step in this band)
            band = window[start : start + count * len(part)].reshape(count, len(part))
            bands.append(rng.permutation(band))
            start += band.size
        return list(np.concatenate(bands, axis=1))

    def _dealt(self, rows: np.ndarray) -> np.ndarray:
        """Rows of a step, longest first, in the order of batches: the first of each process, the second of each, …"""
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        if len(rows) != self.step or self.step % (self.batch * self.processes):
            return rows
        return rows.reshape(-1, self.batch, self.processes).transpose(0, 2, 1).reshape(-1)
