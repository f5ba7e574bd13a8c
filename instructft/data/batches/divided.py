"""A batch as processes take it that share its rows: what a token needs of its neighbours is settled before they part.

slot            0    1    2    3    4    5    6    7    one process gets slots 0 1 6 7, another 2 3 4 5
input_ids       a    b    c    d    e    f    .    .
labels          -    -    c    d    e    f    -    -
shift_labels    -    c    d    e    f    -    -    -    slot 1 knows of `c`, which the other process gets
position_ids    0    1    2    3    4    5    6    7    which slot it was, wherever it stands
attention_mask  1    1    1    1    1    1    1    1    no token looks to its right, where the padding is
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from instructft.errors import DataError
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


def multiple_of(size: int, given: int | None = None) -> int:
    """What the width of a batch must be a multiple of, where `size` processes share its rows: each has two pieces.

    >>> multiple_of(4), multiple_of(4, given=64), multiple_of(3, given=64)
    (8, 64, 192)
    """
    import math

    return math.lcm(2 * size, given or 1)


def ready_to_divide(batch: Mapping[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """A padded batch (B, T) with all that `torch.distributed.tensor.experimental.context_parallel` divides.

    Its tensors are copies, since what divides them does it in place. No padding is masked: it stands on the right,
    where no token of a row looks. The mask of ones keeps transformers from building one, and from taking two slots that
    were no neighbours for the border of two documents.

    Args:
        batch: `input_ids` and `labels`, int64, rows padded on the right.
        size: processes that share a row.

    >>> import torch
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "labels": torch.tensor([[-100, 6, 7, -100]])}
    >>> batch["attention_mask"] = torch.tensor([[1, 1, 1, 0]])
    >>> ready_to_divide(batch, size=2)["shift_labels"]
    tensor([[   6,    7, -100, -100]])

    Raises:
        DataError: the width cannot be divided, or slots are masked otherwise than by padding on the right.
    """
    import torch

    ids, labels = batch["input_ids"], batch["labels"]
    width = ids.shape[1]
    if width % multiple_of(size):
        raise DataError(
            f"a batch is {width} tokens wide, expected a multiple of {multiple_of(size)} where {size} processes share "
            f"its rows; give the collator pad_to_multiple_of={multiple_of(size)}"
        )
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise DataError(
            "rows that processes share are padded on the right, with an attention_mask (B, T) of 0 and 1; found "
            + ("none, as of packs" if mask is None else "another one")
        )
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    positions = torch.arange(width, device=ids.device).repeat(len(ids), 1)
    return {
        "input_ids": ids.clone(),
        "labels": labels.clone(),
        "shift_labels": shifted,
        "position_ids": positions,
        "attention_mask": torch.ones_like(ids),
    }
