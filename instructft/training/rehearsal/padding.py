"""Whether a token's logits are those of what stands before it: nothing behind it counts, and no pads of a batch.

A model that reads both ways (BERT without `is_decoder`, XLNet) learns to copy the answer that it sees, at a loss that
falls to nothing, and can answer nothing.
A causal model never sees the pads behind a row, whatever it makes of the attention mask. CPM-Ant reads a row both ways
and counts it by a pad token of its own, so that a row of a batch is another text than the row alone, and the loss with
it; that is no error of a forward pass, and nothing else would tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from instructft.errors import ModelError
from instructft.training.rehearsal.head import OwnPass, bare, tolerance

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

AHEAD = 1e-5  # of a gradient; what a causal mask takes out is 0, and rounding is far below
SAME = 1e-5  # of the largest logit, between the same sums in another order in float32; in 16 bits they are asked again
SMALL = 2**-10  # of a gradient's weights, so that it stays finite in float16


def shorter_row(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int] | None:
    """The row of a batch that is padded most, alone, and which one it is; None where there are no rows beside it."""
    if len(batch["input_ids"]) < 2:
        return None
    mask = batch.get("attention_mask")
    if mask is None:  # packs
        return {"input_ids": batch["input_ids"][:1]}, 0
    short = int(mask.sum(dim=1).argmin())
    length = int(mask[short].sum())  # the collator pads on the right
    return {name: batch[name][short : short + 1, :length] for name in ("input_ids", "attention_mask")}, short


def refuse_what_looks_ahead(trainer: Trainer, batch: dict[str, torch.Tensor], own: OwnPass, alone: OwnPass) -> None:
    """Ask for the gradient of logits at the embeddings of tokens behind them: 0, but for rounding.

    A row alone is asked: its graph is the smallest, and with no pads there may be no mask that makes a model causal.
    Where its logits are those that it has beside another row, they come from the same tokens; else the batch is asked.

    Args:
        alone: of `shorter_row`.

    Raises:
        ModelError: there is one.
    """
    model: Any = trainer.model
    found = shorter_row(batch)
    share = _share_ahead(alone, found[0]["input_ids"] if found else batch["input_ids"])
    if share <= AHEAD and found and not _apart(own, alone, found[1])[0] <= SAME:
        share = _share_ahead(own, batch["input_ids"])
    if share > AHEAD:
        told_so = getattr(model.config.get_text_config(), "use_bidirectional_attention", None)
        field = "use_bidirectional_attention: false" if told_so else "is_decoder: true"
        raise ModelError(
            f"{type(bare(model)).__name__} ({model.config.model_type}) reads both ways: the gradient of logits at "
            f"tokens behind them is {share:.1e} of that at their own. It would learn to copy the answer that it "
            "sees. Take a model that goes on with a text, or let this one read forward alone where it can: "
            f"model.overrides={{{field}}}"
        )


def _apart(own: OwnPass, alone: OwnPass, row: int) -> tuple[float, float]:
    """The largest difference between a row's logits in the batch and alone, and the median over positions of it.

    As shares of the largest logit.
    """
    theirs = alone.logits[0].detach().float()
    ours = own.logits[row, : len(theirs)].detach().float()
    largest = float(theirs.abs().max().clamp(min=1e-6))
    difference = (ours - theirs).abs().amax(dim=-1)
    return float(difference.max()) / largest, float(difference.median()) / largest


def _share_ahead(found: OwnPass, ids: torch.Tensor) -> float:
    """The largest gradient of the first row's logits behind them, as a share of that at their own tokens."""
    kept, shape = ids.shape[1] // 2, ids.shape
    if not kept or found.embedded is None:
        return 0.0
    logits = found.logits[0, :kept].float()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device) * SMALL
    grad = torch.autograd.grad((logits * weights).sum(), found.embedded, allow_unused=True)[0]
    if grad is not None and grad.shape[:2] == shape[::-1] != shape:
        grad = grad.transpose(0, 1)  # XLNet has its tokens first
    if grad is not None and grad.dim() == 3 and grad.shape[0] == shape[0]:
        grad = grad[:, -shape[1] :]  # CPM-Ant puts a prompt of its own before the text
    if grad is None or grad.shape[:2] != shape or not bool(grad[0].isfinite().all()):
        return 0.0  # what reads its tokens in another way is not asked
    size = grad[0].float().abs().amax(dim=-1)
    return float(size[kept:].max() / size[:kept].max().clamp(min=1e-30))


def refuse_rows_that_see_padding(
    trainer: Trainer, batch: dict[str, torch.Tensor], own: OwnPass, alone: OwnPass
) -> float | None:
    """Hold the logits of the shorter row of a batch against those of that row alone; None where no row is padded.

    Half of the positions have to differ before it is said: in 16 bits a router may choose another expert at some.

    Args:
        alone: of `shorter_row`.

    Returns:
        the median over positions of the largest difference, as a share of the largest logit.

    Raises:
        ModelError: they differ, and the recipe puts rows together.
    """
    args, mask, found = trainer.args, batch.get("attention_mask"), shorter_row(batch)
    if mask is None or found is None or "position_ids" in batch or bool(mask.all()):
        return None
    if getattr(bare(trainer.model), "is_loaded_in_8bit", False):  # what is rounded in a row follows the whole batch
        return None
    if max(args.per_device_train_batch_size, args.per_device_eval_batch_size) == 1:
        return None
    model: Any = trainer.model
    _, apart = _apart(own, alone, found[1])
    if not apart <= tolerance(trainer):
        kind = f"{type(bare(model)).__name__} ({model.config.model_type})"
        raise ModelError(
            f"{kind} does not pass over padding: logits of a row differ by {apart:.1e} of the largest beside a longer "
            "row. Train rows one at a time: train.per_device_train_batch_size=1 and "
            "train.per_device_eval_batch_size=1, with train.gradient_accumulation_steps for the size of a step"
        )
    return apart
