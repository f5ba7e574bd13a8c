"""Looks at a step before the optimizer takes it: its numbers are finite, and its loss does not leap.

A NaN in one gradient makes every weight NaN at the next step, and a run that continues is lost without a word: its loss
is logged as NaN for a day, and the checkpoints that follow are worthless. Such a step is never taken, and the run stops
with the rows that it came from.

A loss that leaps far above what it was comes from rows that are not what they seem, or from a learning rate that is too
high; PaLM's authors went back and left such batches out (arXiv:2204.02311, section 5.1). Here the step can be left out
before it is taken: the weights and the optimizer stay as they are, the schedule proceeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from instructft.checkpoints.manifest import NOT_FINITE, SPIKE
from instructft.errors import NotFiniteError

WINDOW = 50  # steps whose median loss is what is usual
FEWEST = 10  # steps that must be known before one can stand out
LEAST = 1.0  # nats above the median: a loss of 0.02 after 0.005 is no spike
FILES = 10  # steps whose rows are kept, in a run


def usual_loss(recent: list[float], loss: float, limit: float | None) -> float | None:
    """The median of the recent losses, if `loss` is a spike beside it; else None.

    >>> usual_loss([2.0] * 20, 7.0, limit=3.0), usual_loss([2.0] * 20, 5.0, limit=3.0)
    (2.0, None)
    """
    if limit is None or len(recent) < FEWEST:
        return None
    median = statistics.median(recent)
    return median if loss > limit * median and loss > median + LEAST else None


class StepChecks:
    """What is known of the step under way, and the checks that it must pass.

    Args:
        limit: times the median loss of the last 50 steps above which a loss is a spike; None looks for nothing.
        skip: leave such a step out. Its loss counts as recent all the same, so that a level that stays is taken for
            what is usual after some steps, and training proceeds.
        say: told in one line of each spike.

    `spikes` lists them: step, loss, median, skipped.
    """

    def __init__(self, limit: float | None, skip: bool, say: Callable[[str], Any]):
        self.limit, self.skip, self.say = limit, skip, say
        self.recent_losses: list[float] = []
        self.spikes: list[dict[str, Any]] = []
        self.loss: torch.Tensor | None = None  # summed over the micro-batches so far
        self.batches: tuple[dict[str, torch.Tensor], ...] = ()  # kept in case their rows have to be named

    def begin(self, batches: Any) -> None:
        """A step begins with these micro-batches."""
        self.loss, self.batches = None, tuple(batches)

    def add(self, loss: torch.Tensor) -> None:
        """A micro-batch is done."""
        self.loss = loss if self.loss is None else self.loss + loss

    def check(self, trainer: Any, model: Any, norm: Any) -> None:
        """Judge the step by its loss and the norm of its gradient, which the optimizer has not seen yet.

        The gradient is gone afterwards where the step is left out. Every process must call.

        Raises:
            NotFiniteError: the loss or the gradient is not a finite number.
        """
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
        # with float16 a gradient that overflows is expected: the scaler skips the step and lowers its scale
        scaled = getattr(trainer.accelerator, "scaler", None) is not None
        known = [value for value in (self.loss, None if scaled else whole) if value is not None]
        device = trainer.args.device
        finite = torch.stack([torch.as_tensor(value, device=device).isfinite().all() for value in known]).all().long()
        if trainer.args.world_size > 1:
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            self._stop_before_it(trainer)
        if self.limit is not None and self.loss is not None:
            self._look_for_a_spike(trainer, model, self.loss, self.limit)

    def _look_for_a_spike(self, trainer: Any, model: Any, own: torch.Tensor, limit: float) -> None:
        whole = own.detach().clone().float()
        if trainer.args.world_size > 1:
            torch.distributed.all_reduce(whole)
            whole /= trainer.args.world_size
        loss = float(whole)
        usual = usual_loss(self.recent_losses, loss, limit)
        self.recent_losses = [*self.recent_losses, loss][-WINDOW:]
        if usual is None:
            return
        step = trainer.state.global_step + 1
        self.spikes.append({"step": step, "loss": loss, "median": usual, "skipped": self.skip})
        done = "the step is left out" if self.skip else "the step is taken (train.on_loss_spike: warn)"
        where = ""
        if len(self.spikes) <= FILES:
            path = self._write(trainer, SPIKE, [_text_of(trainer, one) for one in self._single_rows()])
            where = f". Its rows are in {path}"
        self.say(f"step {step}: a loss of {loss:.4f}, where {usual:.4f} was usual; {done}{where}")
        if self.skip:
            model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient

    def _stop_before_it(self, trainer: Any) -> None:
        trainer.model.zero_grad()
        rows = []  # each row (pack) of the step with its loss, those first whose loss is not finite
        for one in self._single_rows():
            with torch.no_grad(), trainer.compute_loss_context_manager():
                loss = float(trainer.model(**trainer._prepare_inputs(one), use_cache=False).loss)
            rows.append({"loss": loss, **_text_of(trainer, one)})
        rows.sort(key=lambda row: _is_finite(row["loss"]))
        bad = sum(not _is_finite(row["loss"]) for row in rows)
        told = [{**row, "loss": row["loss"] if _is_finite(row["loss"]) else str(row["loss"])} for row in rows]
        path = self._write(trainer, NOT_FINITE, told)
        what = f"the loss of {bad} of its {len(rows)} rows" if bad else "a gradient"
        raise NotFiniteError(
            f"step {trainer.state.global_step + 1}: {what} is not a finite number; the step was not taken. Its rows "
            f"are in {path}. Look at them first; if they are sound, a lower train.learning_rate, more "
            "train.warmup_steps, or train.bf16 in place of train.fp16 help most often"
        )

    def _write(self, trainer: Any, name: str, rows: list[dict[str, Any]]) -> Path:
        step = trainer.state.global_step + 1
        path = Path(trainer.args.output_dir) / f"{name}{step}-{trainer.args.process_index}.jsonl"
        path.write_text("".join(json.dumps({"step": step, **row}) + "\n" for row in rows), encoding="utf-8")
        return path

    def _single_rows(self) -> Iterator[dict[str, torch.Tensor]]:
        """The rows of the step, each as a batch of one."""
        for batch in self.batches:
            count = batch["input_ids"].shape[0]
            for i in range(count):
                yield {name: value[i : i + 1] if value.shape[:1] == (count,) else value
                       for name, value in batch.items()}  # fmt: skip


def _text_of(trainer: Any, one: dict[str, torch.Tensor]) -> dict[str, Any]:
    ids = one["input_ids"][0]
    if (mask := one.get("attention_mask")) is not None:
        ids = ids[mask[0].bool()]
    return {"text": trainer.processing_class.decode(ids), "input_ids": ids.tolist()}


def _is_finite(value: float) -> bool:
    return value - value == 0
