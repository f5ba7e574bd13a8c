"""The output head on a GPU: makes the gradient in the forward pass, a chunk of supervised positions at a time.

TRL's fused head makes all logits twice, once for the loss and once for its gradient, and asks the device which
positions carry loss, which waits for it. Here the collator has said which they are, and a chunk's logits become the
gradient where they lie, as in Liger's fused cross-entropy (https://arxiv.org/abs/2410.10989):

    rows (n, D) ──► logits (n, V) ──► -log p, entropy, top-1      three products (two where the head is frozen),
                         └──────────► d loss / d logits ──►       in the dtype of autocast, with sums in float32;
                                      d rows, d weight            nothing is read back

So one chunk of logits is all that is held of them, and chunks have one shape whatever a batch holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from instructft.prompt.loss_mask import IGNORE_INDEX

CHUNK = 4096  # positions whose logits are held at once
_CHUNK_BYTES = 1 << 30  # of logits in 16 bits; wider vocabularies get smaller chunks
_BLOCK = 1024  # logits that a kernel of TRL's reads at once

# logits (n, V), labels (n,), weights (n,) or None -> gradient (n, V), log-probability, entropy and top-1 (n,)
Parts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, ...]]


def head_for(device: torch.device) -> Parts | None:
    """What turns logits into a gradient on a device; None where TRL's whole head is to stay.

    `benchmarks/heads.py` holds the choices against each other. With Triton a chunk of logits is read twice and written
    twice; without it every operator reads and writes it in float32.
    """
    if device.type != "cuda":
        return None
    kernels = _kernels()
    return kernel_parts if kernels is not None and kernels._use_triton(device) else torch_parts


def torch_parts(z: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """d (weights · -log p) / d logits in the dtype of z, and of each row log p of its label, entropy and top-1.

    Plain operators without anything that waits or breaks a graph; all is zero where a label is -100. Without weights
    no gradient is made, and what stands in its place means nothing.
    """
    kept = labels != IGNORE_INDEX
    chosen = labels.clamp(min=0)[:, None]
    x = z.float()
    total = x.logsumexp(-1, keepdim=True)
    p = (x - total).exp()
    log_probs = x.gather(1, chosen)[:, 0] - total[:, 0]
    entropy = total[:, 0] - (p * x).sum(-1)
    is_top1 = x.argmax(-1) == labels
    if weights is not None:
        grad = (p - (torch.arange(z.shape[1], device=z.device) == chosen).float()) * (weights * kept)[:, None]
        z = grad.to(z.dtype)
    return z, log_probs * kept, entropy * kept, is_top1


def kernel_parts(z: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The same by TRL's Triton kernels, which leave the gradient where the logits were."""
    kernels = _kernels()
    rows, width = z.shape
    kept = labels != IGNORE_INDEX
    top = z.new_full((rows,), float("-inf"), dtype=torch.float32)
    before = top.clone()
    total, moment, squares, sums, wanted = z.new_zeros(5, rows, dtype=torch.float32)
    plain = {"logit_scale": 1.0, "softcap": 1.0, "inv_t": 1.0, "HAS_SOFTCAP": False, "BLOCK_SIZE": _BLOCK}
    triton = kernels._use_triton(z.device)
    read = kernels._forward_kernel[(rows,)] if triton else kernels._forward_tile
    read(
        z, z.stride(0), labels, top, total, moment, squares, sums, before, wanted, 0, width, **plain,
        HAS_ENTROPY=True, HAS_LOG_SUM_SQ_PROBS=False, HAS_MEAN_LOGITS=False, HAS_IS_TOP1=True,
    )  # fmt: skip
    log_total = top + total.log()
    entropy = log_total - moment / total
    if weights is not None:
        turn = kernels._backward_kernel[(rows, -(-width // _BLOCK))] if triton else kernels._backward_tile
        scale = -weights * kept
        turn(
            z, z.stride(0), labels, log_total, entropy, scale, scale, 0, width, **plain,
            HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=False,
        )  # fmt: skip
    is_top1 = kept & (wanted >= top) & (wanted > before)
    return z, (wanted - log_total) * kept, entropy * kept, is_top1


def _kernels() -> Any:
    """The module of TRL's kernels, with their stand-ins in torch for devices without Triton; None before trl 1.15."""
    try:
        from trl.kernels import chunked_logprob
    except ImportError:
        return None
    return chunked_logprob if hasattr(chunked_logprob, "_forward_tile") else None


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of labels (B, T) the flat positions whose next token carries loss, and that token, (S,) each; waits for a GPU.

    >>> supervised_positions(torch.tensor([[-100, 7, 8], [5, -100, 9]]))
    (tensor([0, 1, 4]), tensor([7, 8, 9]))
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    where = (following != IGNORE_INDEX).nonzero()[:, 0]
    return where, following[where]


def score(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, parts: Parts
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score hidden states by the token that each predicts.

    Args:
        rows: (S, D), states of supervised positions.
        weight, bias: of the head, (V, D) and (V,).
        labels: (S,); -100 where a row only fills up.
        parts: see `head_for`.

    Returns:
        The sum of -log p, whose gradient is there already when it is asked for; then log p (S,), whose gradient is
        computed anew; entropy and top-1 (S,), which have none.
    """
    if not torch.is_grad_enabled():  # an autograd function is told what wants a gradient, not whether one is recorded
        rows, weight, bias = rows.detach(), weight.detach(), None if bias is None else bias.detach()
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = _Score.apply(
        rows, weight, bias, labels, parts
    )
    return found


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, parts: Any
    ) -> tuple[torch.Tensor, ...]:
        kind = rows.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        ones = torch.ones(len(labels), device=rows.device) if any(ctx.needs_input_grad) else None
        (log_probs, entropy, is_top1), grads = _pass(
            (rows, weight, bias), labels, ones, parts, low, ctx.needs_input_grad
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, weight, bias, labels, *grads)
        ctx.parts, ctx.low = parts, low
        ctx.mark_non_differentiable(entropy, is_top1)
        return -log_probs.sum(), log_probs, entropy, is_top1

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_log_probs: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        rows, weight, bias, labels, *grads = ctx.saved_tensors
        scale = grad
        if grad_log_probs is not None:  # tokens of unequal weight: the gradient of their plain sum does not serve
            unequal = -grad_log_probs if grad is None else grad - grad_log_probs
            _, grads = _pass((rows, weight, bias), labels, unequal, ctx.parts, ctx.low, ctx.needs_input_grad)
            scale = None
        out = [
            None if g is None else (g if scale is None else g * scale).to(x.dtype)
            for g, x in zip(grads, (rows, weight, bias), strict=True)
        ]
        return out[0], out[1], out[2], None, None


def _pass(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    parts: Parts,
    low: torch.dtype,
    needed: tuple[bool, ...],
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None]]:
    """Log-probability, entropy and top-1 (S,), and the gradients of sum(weights · -log p) that are `needed`."""
    rows, weight, bias = inputs
    w = weight.to(low)
    count = len(labels)
    log_probs, entropy = rows.new_zeros(2, count, dtype=torch.float32)
    is_top1 = torch.zeros(count, dtype=torch.bool, device=rows.device)
    grad_rows = torch.zeros_like(rows, dtype=low) if needed[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
    chunk = chunk_size(weight.shape[0])
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            h = rows[part].to(low)
            z = h @ w.t()  # (n, V)
            if bias is not None:
                z += bias.to(low)
            grad, log_probs[part], entropy[part], is_top1[part] = parts(
                z, labels[part], None if weights is None else weights[part]
            )
            if grad_rows is not None:
                torch.mm(grad, w, out=grad_rows[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), h)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
    return (log_probs, entropy, is_top1), [grad_rows, grad_weight, grad_bias]


def chunk_size(vocabulary: int) -> int:
    """Positions at once: a power of two, so that it divides the number of positions that a collator fills up to.

    >>> chunk_size(50_257), chunk_size(151_936)
    (4096, 2048)
    """
    fits = max(256, _CHUNK_BYTES // (2 * vocabulary))
    return int(min(CHUNK, 1 << (fits.bit_length() - 1)))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b` in float32, never rounded on the way: rounded sums of chunks
    bias a training, says TRL, whose head does the same."""
    if total.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and _PRODUCTS_IN_FLOAT32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


_PRODUCTS_IN_FLOAT32 = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)
