"""Whether documents of a pack, or turns of a folded row, see each other: asked of the model at hand as it trains."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch

from instructft.adapters.lora import count_parameters
from instructft.data.packing import flat_borders, probe
from instructft.errors import ModelError
from instructft.formatting import first_line
from instructft.models import branches
from instructft.models.attention import VARLEN, Attention, give_up
from instructft.models.kernels.varlen import plain, takes_borders
from instructft.training.out_of_memory import ran_out
from instructft.training.rehearsal.rehearse import as_it_was

if TYPE_CHECKING:
    from rich.console import Console

    from instructft.training.trainer import Trainer

PROBE_WORK = 1e11  # weights times tokens; on a CPU a pack of more is not tried at its full length


def prove_isolation(trainer: Trainer, attention: Attention, max_length: int, console: Console) -> Attention:
    """Stop the run where documents of a pack see each other; an attention that was chosen here gives way instead.

    Returns:
        the attention that the packs are trained with.

    Raises:
        ModelError: they do, under the attention that the recipe names or under every one that could be taken.
    """
    width = _width(trainer, max_length)
    try:
        difference = _difference(trainer, width)
    except (ModelError, RuntimeError) as error:
        if not attention.may_change or ran_out(error):
            raise
        attention = give_up(trainer.model, first_line(error))
        trainer.data_collator.flatten = takes_borders(trainer.model)
        console.print(f"attention: {attention}", markup=False, highlight=False)
        difference = _difference(trainer, width)
    console.print(
        f"packs are clean: no gradient from a document to its neighbour in a pack of {width:,} tokens; its logits "
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
    width = max(_width(trainer, max_length), 16)  # three turns and what they share
    with trainer.compute_loss_context_manager():
        difference = branches.probe(model, model.device, width)
    console.print(
        f"folded turns are clean: no gradient from a branch to another in a row of {width:,} tokens; logits of a turn "
        f"alone and in a row differ by {difference:.1e} at most\n",
        highlight=False,
    )


def _width(trainer: Trainer, max_length: int) -> int:
    """Tokens of the row that is tried: those of training, fewer where a CPU would take minutes."""
    if trainer.args.device.type == "cpu" and count_parameters(trainer.model)[1] * max_length > PROBE_WORK:
        return min(max_length, 256)
    return max_length


def _difference(trainer: Trainer, width: int) -> float:
    """Between a document's logits alone, by a mask, and in a pack; what the kernel lacks in training shows here too."""
    model: Any = trainer.model
    # A kernel of 16 bits is asked under a step's autocast, which the trainer leaves to accelerate, and that wraps the
    # model only when training begins. A mask is asked in the type of the weights, where less is rounded.
    precision = trainer.accelerator.autocast() if takes_borders(model) else contextlib.nullcontext()
    with trainer.compute_loss_context_manager(), precision:
        if str(model.config._attn_implementation) == VARLEN:
            _try_in_training(trainer)
        return probe(model, model.device, width, takes_borders(model), functools.partial(plain, model))


def _try_in_training(trainer: Trainer) -> None:
    """One short pack with dropout on, as a step has it: what no configuration told is refused in the call."""
    model: Any = trainer.model
    ids = torch.arange(8, device=model.device)[None]
    with as_it_was(trainer), torch.no_grad():
        model.train()
        model(input_ids=ids, position_ids=ids % 4, **flat_borders([4, 4], 8, model.device), use_cache=False)
