"""Whether documents of a pack, or turns of a folded row, see each other: asked of the model at hand as it trains."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING, Any

import torch

from instructft.adapters.lora import count_parameters
from instructft.data.arrow.token_rows import slices_of
from instructft.data.packing import flat_borders, padded_slots, probe
from instructft.errors import ModelError
from instructft.formatting import first_line
from instructft.models import branches
from instructft.models.attention import VARLEN, Attention, give_up, mask_by_positions
from instructft.models.kernels.varlen import plain, takes_borders
from instructft.training.out_of_memory import ran_out
from instructft.training.rehearsal.head import bare
from instructft.training.rehearsal.rehearse import as_it_was

if TYPE_CHECKING:
    from rich.console import Console
    from trl import SFTConfig

    from instructft.data.prepare import Prepared
    from instructft.data.streaming import Streamed
    from instructft.training.trainer import Trainer

PROBE_WORK = 1e11  # weights times tokens; on a CPU a pack of more is not tried at its full length


def prove_isolation(trainer: Trainer, attention: Attention, max_length: int, console: Console) -> Attention:
    """Stop the run where documents of a pack see each other; an attention that was chosen here gives way instead.

    Returns:
        the attention that the packs are trained with.

    Raises:
        ModelError: they do, under the attention that the recipe names or under every one that could be taken.
    """
    width = _width(trainer.model, trainer.args, max_length)
    try:
        difference = _asked(trainer, width)
    except ModelError as error:
        if not attention.may_change:
            raise
        attention = give_up(trainer.model, first_line(error))
        trainer.data_collator.flatten = takes_borders(trainer.model)
        console.print(f"attention: {attention}", markup=False, highlight=False)
        difference = _asked(trainer, width)
    by = " by the numbers of their documents (seq_idx)" if trainer.data_collator.numbered else ""
    console.print(
        f"packs are clean{by}: no gradient from a document to its neighbour in a pack of {width:,} tokens; its logits "
        f"alone and in a pack differ by {difference:.1e} at most\n",
        highlight=False,
    )
    return attention


def prove_branches(trainer: Trainer, max_length: int, console: Console) -> None:
    """Stop the run where turns of a folded row see each other, or are not what they are in rows of their own.

    Raises:
        ModelError: they do, under the attention that the run has.
    """
    model: Any = trainer.model
    width = max(_width(trainer.model, trainer.args, max_length), 16)  # three turns and what they share
    with trainer.compute_loss_context_manager():
        difference = branches.probe(model, model.device, width)
    console.print(
        f"folded turns are clean: no gradient from a branch to another in a row of {width:,} tokens; logits of a turn "
        f"alone and in a row differ by {difference:.1e} at most\n",
        highlight=False,
    )


def why_not_apart(model: Any, args: SFTConfig, max_length: int) -> str:
    """Why documents of a pack see each other in a model whose run has not begun; "" where they do not.

    Asked with the attention that the model has, and where that is `varlen` with the one that may take its place.
    """
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if model.device != args.device and not (sharded or getattr(model, "is_quantized", False)):
        model.to(args.device)  # as the trainer will
    width, why = _width(model, args, max_length), ""
    half = torch.bfloat16 if args.bf16 else torch.float16
    for change in (contextlib.nullcontext, plain) if takes_borders(model) else (contextlib.nullcontext,):
        with change(model), contextlib.ExitStack() as stack:
            borders = takes_borders(model)
            if borders and (args.bf16 or args.fp16):
                stack.enter_context(torch.autocast(args.device.type, half))
            try:
                *_, masked = _apart(model, width, borders)
                if masked:
                    masked.remove()  # the run asks again
            except (ModelError, RuntimeError, ValueError, TypeError) as error:
                if ran_out(error):
                    raise
                why = str(error)
            else:
                return ""
    return why


def cost_of_rows(why: str, packs: Prepared | Streamed, rows: Prepared | Streamed, args: SFTConfig) -> str:
    """What a run says that was left to pack, of a model whose packs are not clean."""
    steps, size = args.gradient_accumulation_steps, args.per_device_train_batch_size
    lines = [why.partition(".\nSet ")[0], *why.partition("model.attn_implementation.")[2].splitlines()]
    said = "\n".join(line for line in lines if line)
    more = ""
    if all(hasattr(data.splits["train"], "__len__") for data in (packs, rows)):
        width = int(max(slices_of(packs.splits["train"]).lengths))
        taken = padded_slots(slices_of(rows.splits["train"]).lengths, size)
        more = f", {taken / (len(packs.splits['train']) * width) - 1:+.0%} slots"
    return (
        f"{said}\ndata.packing: auto takes batches of rows of like length in place of packs: {steps} micro-batches of "
        f"{size} rows a step, whose tokens are about as many{more}\n"
    )


def _width(model: Any, args: SFTConfig, max_length: int) -> int:
    """Tokens of the pack that is tried; on a CPU a large model is tried on a shorter one."""
    large = args.device.type == "cpu" and count_parameters(model)[1] * max_length > PROBE_WORK
    return min(max_length, 256) if large else max_length


def _apart(model: Any, width: int, borders: bool) -> tuple[float, bool, Any]:
    """The difference between a document alone and in a pack, and whether it takes the numbers of documents for that.

    Attention is told documents apart by positions or borders, or by masks that the model does not make itself, whose
    hook comes back as the third. Kernels of state-space and convolution layers take the
    number of its document with each token (`seq_idx`), and say so where they are not installed.

    Raises:
        ModelError: they see each other either way.
    """
    ask = functools.partial(probe, model, model.device, width, borders, alone=functools.partial(plain, model))
    try:
        return ask(), False, None
    except (ModelError, ValueError) as error:
        if not borders:
            hook = mask_by_positions(model)
            try:
                return ask(), False, hook
            except Exception as other:  # whatever a model says to masks that it does not know
                hook.remove()
                if ran_out(other):
                    raise
        try:
            return ask(numbered=True), True, None
        except (ModelError, RuntimeError, ValueError, TypeError) as other:
            if ran_out(other):
                raise
            kernels = f"\n{first_line(other)}" if "packed sequences apart" in str(other) else ""
            raise ModelError(f"{error}{kernels}") from error


def _asked(trainer: Trainer, width: int) -> float:
    """`_difference`; a model that cannot take a pack is refused as one that is wrong in it."""
    try:
        return _difference(trainer, width)
    except (RuntimeError, ValueError, IndexError) as error:
        if ran_out(error):
            raise
        model: Any = bare(trainer.model)
        raise ModelError(
            f"data.packing: {type(model).__name__} ({model.config.model_type}) cannot be asked whether documents of a "
            f"pack see each other, since it fails ({first_line(error)}); set data.packing=false"
        ) from error


def _difference(trainer: Trainer, width: int) -> float:
    """Between a document's logits alone, by a mask, and in a pack; what the kernel lacks in training shows here too."""
    model: Any = trainer.model
    # A kernel of 16 bits is asked under a step's autocast, which the trainer leaves to accelerate, and that wraps the
    # model only when training begins. A mask is asked in the type of the weights, where less is rounded.
    precision = trainer.accelerator.autocast() if takes_borders(model) else contextlib.nullcontext()
    with trainer.compute_loss_context_manager(), precision:
        if str(model.config._attn_implementation) == VARLEN:
            _try_in_training(trainer)
        difference, trainer.data_collator.numbered, _ = _apart(model, width, takes_borders(model))
    return difference


def _try_in_training(trainer: Trainer) -> None:
    """One short pack with dropout on, as a step has it: what no configuration told is refused in the call."""
    model: Any = trainer.model
    ids = torch.arange(8, device=model.device)[None]
    with as_it_was(trainer), torch.no_grad():
        model.train()
        model(input_ids=ids, position_ids=ids % 4, **flat_borders([4, 4], 8, model.device), use_cache=False)
