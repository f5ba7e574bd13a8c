"""A micro-batch in parts: of like length, or as large as memory holds (`auto_find_batch_size`); the step stays.

Upstream starts the run anew with nine tenths of the batch, from weights that some steps have changed already, and with
another number of rows in a step. Here the step under way is taken back and done again with half as many rows at a time:

    4 rows × 2  ──►  step 7: memory runs out  ──►  gradients, metrics and random states of step 7 are put back
                                              ──►  2 rows × 4: the same rows, the same step, and all that follow

A loss is a sum over tokens divided by the tokens of the whole step, so the parts add up to the gradient of the whole.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from instructft.data.batches.flat_packs import rows_in, some_rows
from instructft.data.batches.parts import Part, cut_out
from instructft.training.out_of_memory import ran_out


class MicroBatches:
    """Trains the micro-batches of a step, in parts where rows differ in length, or do not fit as a whole.

    Args:
        trainer: whose step it is.
        find: find out how many rows at a time fit, in one process only; else an error of memory passes through.
        say: told in one line when the number of rows changes.

    `rows_at_once` is what was found; None as long as whole batches fit. `under_way` says what was begun last.
    """

    def __init__(self, trainer: Any, find: bool, say: Callable[[str], Any]):
        self.trainer, self.find, self.say = trainer, find, say
        self.rows_at_once: int | None = None
        self.under_way: tuple[str, tuple[int, ...]] = ("before the first step", ())  # what, and its batch (B, T)
        self.begin(())

    def begin(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """The micro-batches of the next step."""
        self.batches = tuple(batches)
        self.done = 0  # those whose gradients are there
        self._random: Any = None  # states as they were when the step began

    def train(
        self,
        step: Callable[..., torch.Tensor],
        model: Any,
        inputs: dict[str, Any],
        items: Any,
        parts: Sequence[Part] = (),
    ) -> torch.Tensor:
        """The loss of one micro-batch, with its gradient added; `step` is upstream's `training_step`.

        Args:
            parts: of like length, which are trained one after the other; none where the batch is trained whole.
        """
        if not self.find:
            batches = [cut_out(inputs, part) for part in parts] if len(parts) > 1 else [inputs]
            return self._one_after_the_other(step, model, batches, items)
        if self._random is None:  # not sooner: a resumed run has its random states back only now
            self._random = _random_states(self.trainer.args.device)
        counted, again = self._counted(), False
        while True:
            try:
                if again:
                    for batch in self.batches[: self.done]:
                        self._in_parts(step, model, batch, items)
                    self._put_back(counted)
                loss = self._in_parts(step, model, inputs, items)
                break
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error) or not self._take_fewer():
                    raise
                error.__traceback__ = None  # its frames hold the activations
                again = True
            model.zero_grad()
            clear_device_cache(garbage_collection=True)
            self._put_back(counted)
            _put_back_random_states(self._random, self.trainer.args.device)
        self.done += 1
        return loss

    def _in_parts(
        self, step: Callable[..., torch.Tensor], model: Any, inputs: dict[str, Any], items: Any
    ) -> torch.Tensor:
        """Train a micro-batch, `rows_at_once` rows after the other; the sum of their losses."""
        rows, _ = rows_in(inputs)
        size = min(self.rows_at_once or rows, rows)
        starts = range(0, rows, size)
        parts = [some_rows(inputs, start, start + size) for start in starts] if size < rows else [inputs]
        return self._one_after_the_other(step, model, parts, items)

    def _one_after_the_other(
        self, step: Callable[..., torch.Tensor], model: Any, parts: Sequence[dict[str, Any]], items: Any
    ) -> torch.Tensor:
        """Train the parts of a micro-batch; gradients go to other processes with the last one alone."""
        trainer = self.trainer
        accumulated = trainer.current_gradient_accumulation_steps
        # what is averaged over micro-batches is told of parts
        trainer.current_gradient_accumulation_steps = accumulated * len(parts)
        losses = []
        try:
            for number, part in enumerate(parts, 1):
                self.under_way = (f"step {trainer.state.global_step + 1}", rows_in(part))
                last = number == len(parts)
                with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
                    losses.append(step(model, part, items))
        finally:
            trainer.current_gradient_accumulation_steps = accumulated
        return torch.stack(losses).sum() if len(parts) > 1 else losses[0]

    def _take_fewer(self) -> bool:
        """Half of the rows that did not fit; False where it was one."""
        what, shape = self.under_way
        if shape[0] < 2:
            return False
        self.rows_at_once = math.ceil(shape[0] / 2)
        step = sum(rows_in(batch)[0] for batch in self.batches)
        self.say(
            f"{what}: {shape[0]} rows at a time do not fit into memory; {self.rows_at_once} are taken from now on "
            f"(a step keeps its {step} rows)"
        )
        return True

    def _counted(self) -> Any:
        metrics = {name: list(values) for name, values in self.trainer._metrics["train"].items()}
        return metrics, self.trainer._total_train_tokens, dict(self.trainer.step_checks.sums)

    def _put_back(self, counted: Any) -> None:
        metrics, self.trainer._total_train_tokens, sums = counted
        self.trainer.step_checks.sums = dict(sums)
        self.trainer._metrics["train"].clear()
        self.trainer._metrics["train"].update({name: list(values) for name, values in metrics.items()})


def _random_states(device: torch.device) -> tuple[Any, ...]:
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def _put_back_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    python, numpy, cpu, gpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu, device)
