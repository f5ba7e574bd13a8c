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

import functools
from collections.abc import Callable
from typing import Any

import torch

from instructft.formatting import first_line
from instructft.models.kernels import softmax_kernel
from instructft.models.kernels.softmax_kernel import kernel_parts
from instructft.prompt.loss_mask import IGNORE_INDEX

CHUNK = 4096  # positions whose logits are held at once
_CHUNK_BYTES = 1 << 30  # of logits in 16 bits; wider vocabularies get smaller chunks
_ALIGNED = 64  # the vocabulary is filled up to a multiple of it: without, cuBLAS takes kernels that are 5 times slower

# logits (n, V) of which so many columns are real, labels (n,), weights (n,) or None
# -> gradient (n, V), log-probability, entropy and top-1 (n,)
Parts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, int], tuple[torch.Tensor, ...]]


def head_for(device: torch.device) -> Parts | None:
    """What turns logits into a gradient on a device; None where TRL's whole head is to stay.

    `benchmarks/heads.py` holds the choices against each other.
    """
    if device.type != "cuda":
        return None
    return kernel_parts if kernel_problem(device) is None else torch_parts


@functools.cache
def kernel_problem(device: torch.device) -> str | None:
    """Why the kernel is not used on a device: it does not compile there, or computes something else; tried once."""
    if not softmax_kernel.available():
        return "Triton is not installed"
    real, width = 4500, 4544
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        z = 4 * torch.randn(3, width, generator=torch.Generator(device).manual_seed(0), device=device).bfloat16()
        z[:, real:] = 0
        labels = torch.tensor([7, IGNORE_INDEX, real - 1], device=device)
        wanted = torch_parts(z, labels, torch.ones(3, device=device), real)
        try:
            found = kernel_parts(z.clone(), labels, torch.ones(3, device=device), real)
        except Exception as error:  # a compiler or a driver: whatever it is, plain operators serve
            return f"{type(error).__name__}: {first_line(error)}"
    same = all(torch.allclose(a.float(), b.float(), atol=1e-3, rtol=1e-2) for a, b in zip(found, wanted, strict=True))
    return None if same else "it computes something else than plain operators"


def torch_parts(
    z: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, ...]:
    """d (weights · -log p) / d logits in the dtype of z, and of each row log p of its label, entropy and top-1.

    Plain operators without anything that waits or breaks a graph. All is zero where a label is -100, and in columns
    from `width` on, which are zero when they come. Without weights no gradient is made.
    """
    kept = labels != IGNORE_INDEX
    chosen = labels.clamp(min=0)[:, None]
    columns = torch.arange(z.shape[1], device=z.device)
    plain = z.float()
    x = plain if width == z.shape[1] else torch.where(columns < width, plain, float("-inf"))
    total = x.logsumexp(-1, keepdim=True)
    p = (x - total).exp()
    log_probs = plain.gather(1, chosen)[:, 0] - total[:, 0]
    entropy = total[:, 0] - (p * plain).sum(-1)
    is_top1 = x.argmax(-1) == labels
    if weights is not None:
        z = ((p - (columns == chosen).float()) * (weights * kept)[:, None]).to(z.dtype)
    return z, log_probs * kept, entropy * kept, is_top1


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
            None if g is None else (g if scale is None else g.mul_(scale)).to(x.dtype)
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
    count, (width, size) = len(labels), weight.shape
    w, b = _filled_up(weight, low), None if bias is None else _filled_up(bias, low)
    log_probs, entropy = rows.new_zeros(2, count, dtype=torch.float32)
    is_top1 = torch.zeros(count, dtype=torch.bool, device=rows.device)
    grad_rows = torch.zeros_like(rows, dtype=torch.float32) if needed[0] else None
    grad_weight = rows.new_zeros(len(w), size, dtype=torch.float32) if needed[1] else None
    grad_bias = rows.new_zeros(len(w), dtype=torch.float32) if b is not None and needed[2] else None
    chunk = chunk_size(width)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            h = rows[part].to(low)
            z = h @ w.t()  # (n, V)
            if b is not None:
                z += b
            weighed = None if weights is None else weights[part]
            grad, log_probs[part], entropy[part], is_top1[part] = parts(z, labels[part], weighed, width)
            if grad_rows is not None:
                _add_product(grad_rows[part], grad, w)
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), h)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
    return (log_probs, entropy, is_top1), [
        grad_rows,
        *(None if g is None else g[:width] for g in (grad_weight, grad_bias)),
    ]


def _filled_up(tensor: torch.Tensor, low: torch.dtype) -> torch.Tensor:
    """A head's weight (V, D) or bias (V,) in the dtype of its products, with zeros where there are no tokens."""
    more = -len(tensor) % _ALIGNED
    if not more:
        return tensor.to(low)
    filled = tensor.new_empty(len(tensor) + more, *tensor.shape[1:], dtype=low)
    filled[: len(tensor)] = tensor
    filled[len(tensor) :] = 0
    return filled


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
