"""How a batch of rows of unlike length is trained: in parts of like length, each padded to its own longest row.

A step should hold short rows beside long ones, or a token weighs by the company its row keeps
(`instructft.data.row_order`); a batch of such rows would be padding for the most part. Rows come longest first::

    300 ███████████████      part 1: rows 0 to 1, 300 slots
    280 ██████████████·
     90 █████                part 2: rows 2 to 4, 90 slots
     80 ████·
     40 ██···
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructft.data.batches.flat_packs import some_rows

Part = tuple[int, int, int]  # first row, the row behind the last, slots of a row

# What it costs to go through the model once more, in slots: little on a CPU, where work is what takes the time. A GPU
# that a small batch does not fill computes padding in no time, and is divided only where much is saved.
ONCE_MORE = {"cpu": 64, "cuda": 1024}


def divide(lengths: Sequence[int], once_more: int) -> tuple[Part, ...]:
    """Rows in order, in the parts that cost least.

    Args:
        lengths: tokens of each row; a part is as wide as its longest.
        once_more: what a part costs beside its slots.

    >>> divide([300, 280, 90, 80, 40], 64)
    ((0, 2, 300), (2, 5, 90))
    """
    sizes = np.asarray(lengths)
    least, before, widths = [0.0], [0], [0]
    for stop in range(1, len(sizes) + 1):
        # the widest row of each part that could end here: rows `start` to `stop`
        widest = np.maximum.accumulate(sizes[:stop][::-1])[::-1]
        costs = np.asarray(least) + widest * np.arange(stop, 0, -1) + once_more
        start = int(costs.argmin())
        least.append(float(costs[start]))
        before.append(start)
        widths.append(int(widest[start]))
    found, stop = [], len(sizes)
    while stop:
        found.append((before[stop], stop, widths[stop]))
        stop = before[stop]
    return tuple(found[::-1])


def cut_out(batch: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """The rows of a part of a padded batch (B, T), without the padding that it does not need."""
    start, stop, width = part
    slots = batch["input_ids"].shape[1]

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):  # masks by the kind of layer
            return {kind: cut(mask) for kind, mask in value.items()}
        shape = getattr(value, "shape", ())
        if len(shape) == 4 and shape[2:] == (slots, slots):  # who sees whom, where rows have branches
            return value[:, :, :width, :width]
        return value[:, :width] if shape[1:] == (slots,) else value

    return {name: cut(value) for name, value in some_rows(batch, start, stop).items()}
