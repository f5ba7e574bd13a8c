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
from instructft.training.rehearsal.head import bare, tolerance

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

AHEAD = 1e-5  # of a gradient; what a causal mask takes out is 0, and rounding is far below


def refuse_what_looks_ahead(trainer: Trainer, batch: dict[str, torch.Tensor]) -> None:
    """Ask for the gradient of logits at the embeddings of tokens behind them: 0, but for rounding.

    A row alone is asked as well: with no pads there may be no mask, and what a mask made causal is so no more.

    Raises:
        ModelError: there is one.
    """
    model: Any = trainer.model
    batches = [{name: value for name, value in batch.items() if name != "labels"}]
    if len(batch["input_ids"]) > 1:
        batches.append({name: batch[name][:1] for name in ("input_ids", "attention_mask") if name in batch})
    share = max(_share_ahead(trainer, inputs) for inputs in batches)
    if share > AHEAD:
        told_so = getattr(model.config.get_text_config(), "use_bidirectional_attention", None)
        field = "use_bidirectional_attention: false" if told_so else "is_decoder: true"
        raise ModelError(
            f"{type(bare(model)).__name__} ({model.config.model_type}) reads both ways: the gradient of logits at "
            f"tokens behind them is {share:.1e} of that at their own. It would learn to copy the answer that it "
            "sees. Take a model that goes on with a text, or let this one read forward alone where it can: "
            f"model.overrides={{{field}}}"
        )


def _share_ahead(trainer: Trainer, inputs: dict[str, torch.Tensor]) -> float:
    """The largest gradient of the first row's logits behind them, as a share of that at their own tokens."""
    model: Any = trainer.model
    kept = inputs["input_ids"].shape[1] // 2
    states: list[torch.Tensor] = []

    def watch(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        states.append(out.detach().requires_grad_())
        return states[-1].clone()  # some models go on with it in place

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with trainer.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits[0, :kept].float()
    finally:
        hook.remove()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
    found = torch.autograd.grad((logits * weights).sum(), states[:1], allow_unused=True)[0] if kept and states else None
    shape = inputs["input_ids"].shape
    if found is not None and found.shape[:2] == shape[::-1] != shape:
        found = found.transpose(0, 1)  # XLNet has its tokens first
    if found is not None and found.dim() == 3 and found.shape[0] == shape[0]:
        found = found[:, -shape[1] :]  # CPM-Ant puts a prompt of its own before the text
    if found is None or found.shape[:2] != shape or not bool(found[0].isfinite().all()):
        return 0.0  # what reads its tokens in another way is not asked
    size = found[0].float().abs().amax(dim=-1)
    return float(size[kept:].max() / size[:kept].max().clamp(min=1e-30))


def refuse_rows_that_see_padding(trainer: Trainer, batch: dict[str, torch.Tensor]) -> float | None:
    """Hold the logits of the shorter row of a batch against those of that row alone; None where no row is padded.

    Half of the positions have to differ before it is said: in 16 bits a router may choose another expert at some.

    Returns:
        the median over positions of the largest difference, as a share of the largest logit.

    Raises:
        ModelError: they differ, and the recipe puts rows together.
    """
    args, mask = trainer.args, batch.get("attention_mask")
    if mask is None or "position_ids" in batch or bool(mask.all()):
        return None
    if getattr(bare(trainer.model), "is_loaded_in_8bit", False):  # what is rounded in a row follows the whole batch
        return None
    if max(args.per_device_train_batch_size, args.per_device_eval_batch_size) == 1:
        return None
    model: Any = trainer.model
    short = int(mask.sum(dim=1).argmin())
    length = int(mask[short].sum())  # the collator pads on the right
    with torch.no_grad(), trainer.compute_loss_context_manager():
        together = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits[short, :length]
        alone = model(
            input_ids=batch["input_ids"][short : short + 1, :length],
            attention_mask=mask[short : short + 1, :length],
            use_cache=False,
        ).logits[0]
    largest = float(alone.float().abs().max().clamp(min=1e-6))
    apart = float((together.float() - alone.float()).abs().amax(dim=-1).median()) / largest
    if not apart <= tolerance(trainer):
        kind = f"{type(bare(model)).__name__} ({model.config.model_type})"
        raise ModelError(
            f"{kind} does not pass over padding: logits of a row differ by {apart:.1e} of the largest beside a longer "
            "row. Train rows one at a time: train.per_device_train_batch_size=1 and "
            "train.per_device_eval_batch_size=1, with train.gradient_accumulation_steps for the size of a step"
        )
    return apart
