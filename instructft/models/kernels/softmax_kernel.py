"""A Triton kernel that turns a row of logits into its gradient in place, and into what is logged of it.

A row is read twice, the second time from the GPU's cache, and written once. Every lane keeps its own maximum and sums,
so that lanes meet once for a row and not once for a block of it.
"""

from __future__ import annotations

from typing import Any

import torch

from instructft.prompt.loss_mask import IGNORE_INDEX

try:
    import triton
    import triton.language as tl
except ImportError:  # only Linux has it, with torch for CUDA
    triton = None

_BLOCK = 2048  # logits that a program takes at once: eight for each of 256 threads


def available() -> bool:
    """Whether Triton is there."""
    return triton is not None


def kernel_parts(
    z: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, ...]:
    """As `gpu_head.torch_parts`; z (n, V) comes back as its own gradient, columns from `width` on as they were."""
    rows = len(z)
    log_probs, entropy, is_top1 = (z.new_empty(rows, dtype=kind) for kind in (torch.float32, torch.float32, torch.bool))
    _rows_to_gradients[(rows,)](
        z, z.stride(0), labels, z if weights is None else weights.float(), log_probs, entropy, is_top1.view(torch.int8),
        width, IGNORE=IGNORE_INDEX, GRADIENT=weights is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return z, log_probs, entropy, is_top1


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _rows_to_gradients(
    z_ptr,
    stride,
    labels_ptr,
    weights_ptr,
    log_probs_ptr,
    entropy_ptr,
    is_top1_ptr,
    width,
    IGNORE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    label = tl.load(labels_ptr + row)
    lanes = tl.arange(0, BLOCK)
    if label == IGNORE:
        tl.store(log_probs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(is_top1_ptr + row, 0)
        if GRADIENT:
            for start in range(0, width, BLOCK):
                at = start + lanes
                tl.store(z_ptr + at, tl.zeros((BLOCK,), z_ptr.dtype.element_ty), mask=at < width)
    else:
        least = -1e30  # finite, so that a lane that saw nothing is no NaN
        top = tl.full((BLOCK,), least, tl.float32)
        earlier = tl.full((BLOCK,), least, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            at = start + lanes
            there = at < width
            z = tl.load(z_ptr + at, mask=there, other=least).to(tl.float32)
            earlier = tl.maximum(earlier, tl.where(at < label, z, least))
            new_top = tl.maximum(top, z)
            shrink = tl.exp(top - new_top)
            e = tl.where(there, tl.exp(z - new_top), 0.0)
            total = total * shrink + e
            moment = moment * shrink + e * z
            top = new_top
        highest = tl.max(top, axis=0)
        shrink = tl.exp(top - highest)
        sum_all = tl.sum(total * shrink, axis=0)
        log_total = highest + tl.log(sum_all)
        wanted = tl.load(z_ptr + label).to(tl.float32)
        tl.store(log_probs_ptr + row, wanted - log_total)
        tl.store(entropy_ptr + row, log_total - tl.sum(moment * shrink, axis=0) / sum_all)
        # of equal logits the first is the answer
        tl.store(is_top1_ptr + row, ((wanted >= highest) & (wanted > tl.max(earlier, axis=0))).to(tl.int8))
        if GRADIENT:
            weight = tl.load(weights_ptr + row)
            tl.debug_barrier()  # every thread has read its logits before one of them is written over
            for start in range(0, width, BLOCK):
                at = start + lanes
                there = at < width
                z = tl.load(z_ptr + at, mask=there, other=least).to(tl.float32)
                grad = weight * (tl.exp(z - log_total) - tl.where(at == label, 1.0, 0.0))
                tl.store(z_ptr + at, grad.to(z_ptr.dtype.element_ty), mask=there)
