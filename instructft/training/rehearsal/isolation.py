"""Whether documents of a pack see each other, asked of the model at hand under the attention that the run was given."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch

from instructft.adapters.lora import count_parameters
from instructft.data.packing import flat_borders, probe
from instructft.errors import ModelError
from instructft.formatting import first_line
from instructft.models.attention import VARLEN, Attention, give_up
from instructft.models.kernels.varlen import plain, takes_borders
from instructft.training.out_of_memory import ran_out
from instructft.training.rehearsal.head import bare
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
    width = max_length
    if trainer.args.device.type == "cpu" and count_parameters(trainer.model)[1] * width > PROBE_WORK:
        width = min(width, 256)
    try:
        difference = _asked(trainer, width)
    except ModelError as error:
        if not attention.may_change:
            raise
        attention = give_up(trainer.model, first_line(error))
        trainer.data_collator.flatten = takes_borders(trainer.model)
        console.print(f"attention: {attention}", markup=False, highlight=False)
        difference = _asked(trainer, width)
    console.print(
        f"packs are clean: no gradient from a document to its neighbour in a pack of {width:,} tokens; its logits "
        f"alone and in a pack differ by {difference:.1e} at most\n",
        highlight=False,
    )
    return attention


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
        return probe(model, model.device, width, takes_borders(model), functools.partial(plain, model))


def _try_in_training(trainer: Trainer) -> None:
    """One short pack with dropout on, as a step has it: what no configuration told is refused in the call."""
    model: Any = trainer.model
    ids = torch.arange(8, device=model.device)[None]
    with as_it_was(trainer), torch.no_grad():
        model.train()
        model(input_ids=ids, position_ids=ids % 4, **flat_borders([4, 4], 8, model.device), use_cache=False)
