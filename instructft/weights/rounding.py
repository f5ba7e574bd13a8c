"""Rounds weights to a narrower dtype: to the nearest number there is, or to one of the two neighbours by chance.

A trained change is small beside its weight: in bfloat16, with its 8 bits, most of a low-rank change rounds away to the
weight that was there before, everywhere in the same direction, and what was learned goes with it. Rounded by chance,
upward with a probability that is the distance to the lower neighbour, a weight keeps its value on average: what is left
is noise, which sums to nothing along a row (Gupta et al., 2015: 1502.02551). The chance is seeded by the tensor's name.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NEAREST, STOCHASTIC = "nearest", "stochastic"
ROUNDINGS = (NEAREST, STOCHASTIC)


class Rounder:
    """Rounds the pieces of one tensor, in their order, to `dtype`.

    Args:
        name: of the tensor: the same name and pieces are rounded alike each time.
        rounding: `nearest` or `stochastic`, which is `nearest` for every dtype but bfloat16: float16 has 11 bits, in
            which a trained change stays.

    Example::

        Rounder("weight", torch.bfloat16, "stochastic")(torch.full((4,), 1.001))
        # tensor([1.0000, 1.0078, 1.0000, 1.0000], dtype=torch.bfloat16)
    """

    def __init__(self, name: str, dtype: torch.dtype, rounding: str = NEAREST):
        import torch

        self.dtype = dtype
        self.by_chance = rounding == STOCHASTIC and dtype == torch.bfloat16
        self.source = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        import torch

        if not self.by_chance or values.dtype == self.dtype:
            return values.to(self.dtype)
        # the upper half of a float32 is a bfloat16: what stands below it, plus chance, carries over or does not
        bits = values.float().contiguous().view(torch.int32)
        chance = torch.randint(1 << 16, bits.shape, generator=self.source, dtype=torch.int32)
        return ((bits + chance) & -0x10000).view(torch.float32).to(torch.bfloat16)


def unit_in_last_place(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at each value.

    Example::

        unit_in_last_place(torch.tensor([1.0, 3.0]), torch.bfloat16)
        # tensor([0.0078, 0.0156])
    """
    import torch

    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)
