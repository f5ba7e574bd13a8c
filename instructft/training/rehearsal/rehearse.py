"""The rehearsal of a run: one short batch through all that a run does, in seconds, before the first step.

What cannot work is said now and not after the last step, and what can be repaired is. Afterwards weights, buffers,
gradients and random states are what they were, so that a run is the same with a rehearsal and without.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from instructft.formatting import first_line
from instructft.inference.generator import Generator
from instructft.inference.padding import PADDING_TOLERANCE, padding_difference
from instructft.models.kernels.gpu_head import kernel_problem
from instructft.prompt.loss_mask import IGNORE_INDEX
from instructft.training.out_of_memory import ran_out
from instructft.training.rehearsal.adapter_loads import leave_out_what_does_not_load
from instructft.training.rehearsal.gradients import Reach, kinds, leave_out_unreached
from instructft.training.rehearsal.head import OwnPass, choose_head, precision_of
from instructft.training.rehearsal.padding import refuse_rows_that_see_padding, refuse_what_looks_ahead, shorter_row
from instructft.training.rehearsal.saves import refuse_what_does_not_come_back

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

TOKENS = 12  # of the longer row of the batch: what takes time in a large model is each token


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found.

    Args:
        facts: for `run.json`.
        reach: what the loss reaches of the weights that are to be trained.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    reach: Reach = field(default_factory=Reach)


def rehearse(trainer: Trainer, example: Any, say: Callable[[str], Any]) -> Rehearsal:
    """Try head, gradients, answers and what is saved on one short batch; repair what can be, and say it.

    Args:
        example: a training row.
        say: told in one line of each.

    Raises:
        ModelError: the model cannot be trained.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        say("no rehearsal: the processes share the weights among them")
        return Rehearsal()
    began = time.perf_counter()
    batch = send_to_device(short_batch(trainer, example), trainer.args.device)
    with as_it_was(trainer):
        head, own = choose_head(trainer, batch)
        short = shorter_row(batch)
        alone = OwnPass.of(trainer, short[0]) if short else own
        refuse_what_looks_ahead(trainer, batch, own, alone)
        refuse_rows_that_see_padding(trainer, batch, own, alone)
        del own, alone
        reach = leave_out_unreached(trainer, batch)
        lost = leave_out_what_does_not_load(trainer)
        refuse_what_does_not_come_back(trainer, batch["input_ids"][0].tolist())
        padding, answers = _answers(trainer)
    lines = [*([head.why] if head.why else []), *reach.lines(trainer.processing_class.convert_ids_to_tokens), *answers]
    if lost:
        lines.append(f"PEFT would not find what it saves of {len(lost)} layers, which get no adapter: {kinds(lost)}")
    if trainer.args.device.type == "cuda" and (problem := kernel_problem(trainer.args.device)):
        lines.append(f"the output head is computed by plain operators, which takes longer: {problem}")
    for line in lines:
        say(line)
    seconds = time.perf_counter() - began
    facts = {
        "seconds": round(seconds, 3),
        "head": head.kind,
        "head_difference": head.difference,
        "precision": str(precision_of(trainer)).removeprefix("torch."),
        "padding_difference": padding,
        "left_out": sorted([*reach.left_out, *lost]),
        "said": lines,
    }
    how = "right" if not lines else "as said above"
    say(f"rehearsed in {seconds:.1f} s: head, gradients, answers and what is saved are {how}")
    return Rehearsal(facts, reach)


def short_batch(trainer: Trainer, example: Any) -> dict[str, torch.Tensor]:
    """Two short rows of unequal length, cut from a training row around its first token that carries loss."""
    ids, labels = list(example["input_ids"]), list(example["labels"])
    first = next((i for i, label in enumerate(labels) if i and label != IGNORE_INDEX), 1)
    rows = []
    for tokens in (TOKENS, TOKENS * 5 // 8):
        start = max(0, min(first - tokens // 2, len(ids) - tokens))
        row: dict[str, Any] = {"input_ids": ids[start : start + tokens], "labels": labels[start : start + tokens]}
        if "seq_lengths" in example:
            row["seq_lengths"] = [len(row["input_ids"])]
        rows.append(row)
    batch: dict[str, torch.Tensor] = trainer.data_collator(rows)
    return batch


def _answers(trainer: Trainer) -> tuple[float | None, list[str]]:
    """How far a prompt's answer in a batch is from that alone, None where there is none; and what to say of it."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    generator = Generator(model, trainer.processing_class)
    generator.precision = trainer.accelerator.autocast
    try:
        with trainer.config_as_loaded():
            difference = padding_difference(generator)
    except Exception as error:
        if ran_out(error):
            raise
        return None, [f"{type(model).__name__} cannot answer ({type(error).__name__}: {first_line(error)})"]
    limit = PADDING_TOLERANCE[precision_of(trainer).itemsize < 4]
    if difference <= limit:
        return difference, []
    say = f"answers are made one prompt at a time: padding changes logits by {difference:.1e} of the largest"
    return difference, [say]


@contextlib.contextmanager
def as_it_was(trainer: Trainer) -> Iterator[None]:
    """Look at a model in evaluation mode, and leave no trace: buffers, random states, metrics are what they were."""
    model: Any = trainer.model
    device, was_training = trainer.args.device, model.training
    buffers = [(module, name, value, value.clone()) for module in model.modules()
               for name, value in module._buffers.items() if value is not None]  # fmt: skip
    python, numpy, tokens = random.getstate(), np.random.get_state(), trainer._total_train_tokens
    kind = device.type if device.type != "cpu" else "cuda"  # the CPU's own state is always kept
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=kind):
            yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for module, name, value, copy in buffers:
                value.copy_(copy)
                module._buffers[name] = value
        trainer._total_train_tokens = tokens
        for metrics in trainer._metrics.values():
            metrics.clear()
