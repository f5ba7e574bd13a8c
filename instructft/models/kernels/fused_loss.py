"""The output head: projects only positions that carry loss, and makes their gradient in the same pass.

On a CPU or a Mac's GPU, TRL's fused head scores every position, prompt and padding included, in blocks of up to half
a gigabyte that the allocator takes from the system and returns at every step. Here a block of logits stays below
`_BLOCK_BYTES`, lives in two buffers that are used again, and gives log-probability, entropy, top-1 and gradient at
once, as Liger's fused cross-entropy does on GPUs (https://arxiv.org/abs/2410.10989). With CUDA it is `gpu_head`'s.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from instructft.adapters.lora import token_rows
from instructft.data.batches.flat_packs import supervised_positions
from instructft.models.kernels import gpu_head
from instructft.weights.model_class import backbone

# Where TRL has no Triton, scores every position, and nothing is compiled for each new number of them.
_DEVICES = ("cpu", "mps")

# glibc hands blocks above 32 MiB back to the system when they are freed, and every page of the next one is faulted in
# anew; that alone was half of the time of a step.
_BLOCK_BYTES = 24 << 20

# What a batch says beside a model's inputs: flat positions (S,) whose next token carries loss, that token, and counts.
_OF_THE_COLLATOR = ("supervised", "supervised_labels", "counts")


@dataclass
class Scores(ModelOutput):
    """What TRL's fused head returns, as far as training needs it; every field is zero where no loss lies.

    Args:
        loss: scalar, the mean of -log p over the batch's supervised tokens.
        log_probs, entropy, is_top1, label_mask: (B, T - 1), of the token that each position predicts.
        aux_loss: scalar, of a mixture's router; None where there is none.
        nll: scalar, the sum of -log p; its gradient costs least.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    nll: torch.Tensor | None = None


def nll_of(out: Any) -> torch.Tensor:
    """The sum of -log p over a batch, as `scores` found it by any head."""
    return -out.log_probs.sum() if getattr(out, "nll", None) is None else out.nll


def scores(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """Score a batch with whatever head the model has: ours, TRL's, or (before trl 1.15, on a GPU) its logits."""
    if hasattr(trl.trainer.utils, "add_fused_lm_head") or inputs["labels"].device.type in _DEVICES:
        return model(**inputs, use_cache=False, fused_lm_head=True)
    out = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
    return from_logits(out.logits[:, :-1], inputs["labels"][:, 1:])


def from_logits(logits: torch.Tensor, labels: torch.Tensor, aux_loss: torch.Tensor | None = None) -> Scores:
    """What a model's own logits (B, T, V) say of the labels (B, T) that they stand above, -100 = no loss."""
    mask = labels != -100
    log_p = logits[mask].float().log_softmax(-1)  # (N, V)
    chosen = labels[mask]
    picked = log_p.gather(-1, chosen[:, None])[:, 0]
    with torch.no_grad():
        entropy, is_top1 = -(log_p.exp() * log_p).sum(-1), log_p.argmax(-1) == chosen
    log_probs, entropy, is_top1 = (
        value.new_zeros(mask.shape).masked_scatter(mask, value) for value in (picked, entropy, is_top1)
    )
    loss = -log_probs.sum() / mask.sum().clamp(min=1)
    return Scores(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask, aux_loss=aux_loss)


def add_plain_head(model: PreTrainedModel) -> None:
    """Let `model(..., labels=…, fused_lm_head=True)` score by the model's own logits, whatever it does to make them.

    For models whose logits are more than `lm_head(hidden)`: a dense layer and a norm before it, a soft cap after it, a
    router's loss that only the model itself can compute. It takes the memory of the logits, (B, T, V).
    """
    upstream = model.forward

    @functools.wraps(getattr(upstream, "__func__", upstream))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("fused_lm_head", False):
            return upstream(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        kwargs.pop("num_items_in_batch", None)  # TRL's trainer divides by it
        out = upstream(*args, **{**kwargs, "use_cache": False})
        aux_loss = getattr(out, "aux_loss", None)
        if kwargs.get("output_router_logits") and aux_loss is None:
            raise ValueError("it returns none")
        if shifted is not None:
            return from_logits(out.logits, shifted, aux_loss)
        return from_logits(out.logits[:, :-1], labels[:, 1:], aux_loss)

    model.forward = types.MethodType(forward, model)


class _SupervisedLogProbs(torch.autograd.Function):
    """Log-probability of each label, with entropy and top-1, from hidden states; float32 throughout.

    Rows `ids` of the head may be trained while the rest is frozen: `rows` stand in their place, and no gradient is
    made for the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        rows: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # hidden: (N, D), weight: (V, D), bias: (V,) or None, labels: (N,), rows: (n, D) or None, ids: (n,) or None
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        block = max(1, min(tokens, _BLOCK_BYTES // (4 * vocabulary)))
        logits_buffer, probs_buffer = hidden.new_empty(2, block, vocabulary)
        log_probs, entropy = hidden.new_empty(2, tokens)
        is_top1 = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
        inputs = {"hidden": hidden, "weight": weight, "bias": bias, "rows": rows}
        wanted = dict(zip(inputs, (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4]), strict=True))
        grads = {name: torch.zeros_like(inputs[name]) for name, needed in wanted.items() if needed}
        step = rows - weight[ids] if rows is not None else None  # (n, D)
        for start in range(0, tokens, block):
            part = slice(start, min(start + block, tokens))
            h, y = hidden[part], labels[part, None]
            z = torch.mm(h, weight.t(), out=logits_buffer[: len(h)])  # (n, V)
            if rows is not None:
                z.index_copy_(1, ids, h @ rows.t())
            if bias is not None:
                z += bias
            p = torch.softmax(z, dim=1, out=probs_buffer[: len(h)])
            top = z.amax(dim=1)
            log_total = top - p.amax(dim=1).log()  # logsumexp of each row
            picked = z.gather(1, y)[:, 0]
            log_probs[part] = picked - log_total
            entropy[part] = log_total - torch.linalg.vecdot(p, z)
            is_top1[part] = _is_top1(z, y[:, 0], picked == top)
            if grads:  # - d log p / d logits = p - onehot
                p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
                if "hidden" in grads:
                    torch.mm(p, weight, out=grads["hidden"][part])
                    if step is not None:
                        grads["hidden"][part] += p[:, ids] @ step
                if "weight" in grads:
                    grads["weight"].addmm_(p.t(), h)
                if "bias" in grads:
                    grads["bias"] += p.sum(dim=0)
                if "rows" in grads:
                    grads["rows"].addmm_(p[:, ids].t(), h)
        if grads:
            ctx.names = list(grads)
            ctx.save_for_backward(hidden, weight, bias, labels, rows, ids, *grads.values())
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, rows, ids, *saved = ctx.saved_tensors
        grads = dict(zip(ctx.names, saved, strict=True))
        scale = grad[0] if len(grad) else grad.new_ones(())
        if not torch.equal(grad, scale.expand_as(grad)):
            # Tokens of unequal weight (loss_type: dft): the gradient summed in `forward` does not serve.
            inputs = {"hidden": hidden, "weight": weight, "bias": bias, "rows": rows}
            with torch.enable_grad():
                again = {name: x.detach().requires_grad_(name in grads) for name, x in inputs.items() if x is not None}
                head = again["weight"] if rows is None else again["weight"].index_copy(0, ids, again["rows"])
                logits = torch.nn.functional.linear(again["hidden"], head, again.get("bias"))
                log_probs = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                found = torch.autograd.grad(log_probs, [again[name] for name in grads], grad)
            grads = dict(zip(grads, found, strict=True))
            scale = grad.new_full((), -1.0)
        out = {name: g.mul_(-scale) for name, g in grads.items()}
        return out.get("hidden"), out.get("weight"), out.get("bias"), None, out.get("rows"), None


def _is_top1(z: torch.Tensor, labels: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Whether a label's logit is the largest of its row, of equal ones the first; `largest` says which are equal to it.

    On a CPU `argmax` takes as long as softmax, and is asked only of rows in which the label can be the answer.
    """
    if z.device.type != "cpu":
        return z.argmax(dim=1) == labels
    rows = largest.nonzero()[:, 0]
    largest[rows] = z[rows].argmax(dim=1) == labels[rows]
    return largest


def add_supervised_head(model: PreTrainedModel) -> bool:
    """Let `model(..., labels=…, fused_lm_head=True)` score only what carries loss; True when it applies.

    Call it after TRL's `add_fused_lm_head`, whose forward keeps every other case: logits that the architecture scales
    or caps, mixtures of experts, sharded heads, on a CPU low precision, on a GPU rows of new tokens.
    """
    config = model.config.get_text_config()
    head, _, _ = _head(model)
    changes_logits = (
        "final_logit_softcapping",
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_scaling",
    )
    plain = not any(getattr(config, name, None) for name in changes_logits) and not hasattr(
        config, "output_router_logits"
    )
    applies = plain and isinstance(head, torch.nn.Linear) and head.weight.dtype.is_floating_point
    upstream = model.forward

    # Keep the signature: `generate` checks its arguments against it, and `Trainer` the columns of a batch.
    @functools.wraps(getattr(upstream, "__func__", upstream))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions = [kwargs.pop(name, None) for name in _OF_THE_COLLATOR]
        way = None
        if applies and kwargs.get("fused_lm_head") and kwargs.get("labels") is not None:
            way = _way(*_head(self)[:2]) if kwargs.get("shift_labels") is None else None
        if way is None:
            return upstream(*args, **kwargs)
        labels = kwargs["labels"]
        if positions[0] is None and labels.device.type not in _DEVICES:
            # ahead of the model: this waits for what is queued, and now that is little
            positions[:2] = supervised_positions(labels)
        # `num_items_in_batch` is TRL's business: it divides the sum of `log_probs` itself
        inputs = {k: v for k, v in kwargs.items() if k not in ("fused_lm_head", "labels", "num_items_in_batch")}
        states = backbone(self)(*args, **{**inputs, "use_cache": False}).last_hidden_state  # (B, T, D)
        return way(self, states, labels, positions)

    model.forward = types.MethodType(forward, model)
    return applies


def _way(head: Any, rows: torch.Tensor | None) -> Callable[..., Scores] | None:
    """Which head of ours scores here; None for TRL's."""
    weight = head.weight
    kind = weight.device.type
    if isinstance(weight, DTensor) or hasattr(weight, "ds_id"):  # a part of it lies here (FSDP2, ZeRO-3)
        return None
    if kind in _DEVICES:
        whole = weight.dtype == torch.float32 and not torch.is_autocast_enabled(kind)
        return _scores_of_masked if whole else None
    parts = gpu_head.head_for(weight.device)
    return None if parts is None or rows is not None else functools.partial(_scores_at_positions, parts)


def _scores_of_masked(model: Any, states: torch.Tensor, labels: torch.Tensor, positions: list[Any]) -> Scores:
    """The CPU's way: positions by a mask, which costs nothing where the host computes."""
    head, rows, ids = _head(model)
    states, labels = states[:, :-1], labels[:, 1:]  # (B, T - 1, D), (B, T - 1)
    weight, bias = head.weight, head.bias
    mask = labels != -100
    if not torch.is_grad_enabled():  # an autograd function is told what wants a gradient, not whether one is recorded
        states, weight, bias, rows = (None if x is None else x.detach() for x in (states, weight, bias, rows))
    values = _SupervisedLogProbs.apply(states[mask], weight, bias, labels[mask], rows, ids)
    log_probs, entropy, is_top1 = (v.new_zeros(mask.shape).masked_scatter(mask, v) for v in values)
    nll = -log_probs.sum()
    loss = nll / mask.sum().clamp(min=1)
    return Scores(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask, nll=nll)


def _scores_at_positions(
    parts: gpu_head.Parts, model: Any, states: torch.Tensor, labels: torch.Tensor, positions: list[Any]
) -> Scores:
    """A GPU's way: positions from the collator, so that nothing waits for the device."""
    head = model.get_output_embeddings()
    where, wanted, _ = positions
    batch, width = labels.shape
    rows = states.to(head.weight.device).reshape(batch * width, -1).index_select(0, where)
    nll, *values = gpu_head.score(rows, head.weight, head.bias, wanted, parts)
    # what fills up `where` points to position 0, and adds a zero to it
    log_probs, entropy, is_top1 = (
        v.new_zeros(batch * width, dtype=torch.float32).index_add(0, where, v.float()).view(batch, width)[:, :-1]
        for v in values
    )
    mask = labels[:, 1:] != -100
    loss = nll / mask.sum().clamp(min=1)
    return Scores(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1.bool(), label_mask=mask, nll=nll)


def _head(model: Any) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
    """The output head, and where an adapter trains some of its rows these (n, D) and their ids (n,)."""
    head = model.get_output_embeddings()
    layer = token_rows(head)
    if layer is None:
        return head, None, None
    ids = torch.tensor(layer.token_indices["default"], device=layer.base_layer.weight.device)
    return layer.base_layer, layer.trainable_tokens_delta["default"], ids
