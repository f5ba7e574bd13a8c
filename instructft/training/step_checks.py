"""Looks at a step ahead of the optimizer: stops the run at one that is not a number, and tells of a loss that leaps.

A NaN in one gradient makes every weight NaN at the next step, and a run that continues is lost without a word: its loss
is logged as NaN for a day, and the checkpoints that follow are worthless. Here the step is not taken.

A loss that leaps far above what it was comes from rows that are not what they seem, or from a learning rate that is too
high; PaLM's authors went back and left such batches out (arXiv:2204.02311, section 5.1). Here the step can be left out
before it is taken: the weights and the optimizer stay as they are, the schedule proceeds.

All that the host must know of a step comes in one read, when its gradient is there: reading is waiting for the GPU,
which does nothing afterwards until it is told what to do next.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from instructft.checkpoints.manifest import NOT_FINITE, SPIKE
from instructft.data.batches.flat_packs import rows_in, some_rows
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


class StepChecks(TrainerCallback):
    """Asked before every optimizer step, when gradients are summed over processes, unscaled and clipped.

    Args:
        trainer: whose steps these are; it calls `begin`, `count`, `add` and `read`.
        spike_limit: times the median loss of the last 50 steps; None looks for no spike.
        skip_spikes: leave such a step out. Its loss counts as recent all the same, so that a level that stays is taken
            for what is usual after some steps, and training proceeds.
        say: told in one line of each.

    `spikes` lists them: step, loss, median, skipped. `since_log` holds sums over supervised tokens of the steps that
    were not logged yet, on all processes.
    """

    def __init__(self, trainer: Any, spike_limit: float | None, skip_spikes: bool, say: Callable[[str], Any]):
        self.trainer, self.spike_limit, self.skip_spikes, self.say = trainer, spike_limit, skip_spikes, say
        self.recent_losses: list[float] = []
        self.spikes: list[dict[str, Any]] = []
        self.since_log: dict[str, float] = {}
        self.begin(())

    def begin(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """Keep the micro-batches of a step until it is taken, in case its rows have to be named."""
        self.batches = tuple(batches)
        self.loss: torch.Tensor | None = None  # summed over the micro-batches so far
        self.sums: dict[str, torch.Tensor] = {}  # the same of what is logged
        self.mean_loss: float | None = None  # of all processes, once it is read
        self.finite = True

    def add(self, loss: torch.Tensor) -> None:
        """Count the loss of one micro-batch."""
        self.loss = loss if self.loss is None else self.loss + loss

    def count(self, **sums: torch.Tensor) -> None:
        """Count what one micro-batch, or a part of it, adds to the sums that are logged."""
        self.sums = {name: self.sums[name] + value if name in self.sums else value for name, value in sums.items()}

    def read(self, norm: Any) -> Any:
        """Read the step, when its gradient has this norm, before it was clipped; the norm as a number.

        What is left of a norm after clipping would not do: where one overflows, zeros are left, which look sound.
        """
        device, world = self.trainer.args.device, self.trainer.args.world_size
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
        if self.loss is None:
            return norm
        exact = torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # not every other has float64
        scaled = getattr(self.trainer.accelerator, "scaler", None) is not None
        alone = [norm.detach().to(device, exact)] if isinstance(norm, torch.Tensor) else []
        together = torch.stack([v.detach().to(device, exact).reshape(()) for v in (self.loss, *self.sums.values())])
        # with float16 a gradient that overflows is expected: the scaler skips the step
        judged = [together[0], *(() if scaled else alone)]
        bad = torch.stack(judged).isfinite().all().logical_not().to(exact)
        together = torch.cat([bad[None], together])
        if world > 1:
            torch.distributed.all_reduce(together)
        bad_ones, loss, *sums = torch.cat([together, *(v[None] for v in alone)]).tolist()
        if alone:
            norm = sums.pop()
        elif norm is not None and not scaled:  # DeepSpeed's, which is a number
            bad_ones += not math.isfinite(norm)
        self.finite, self.mean_loss = not bad_ones, loss / world
        for name, value in zip(self.sums, sums, strict=True):
            self.since_log[name] = self.since_log.get(name, 0.0) + value
        return norm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the run at what is not a number; at a spike, take the gradients away where the step is left out."""
        if not self.finite:
            self._refuse(state.global_step + 1)
        if self.spike_limit is not None and self.mean_loss is not None:
            self._look_for_spike(state.global_step + 1, self.mean_loss)

    def _refuse(self, step: int) -> None:
        self.trainer.model.zero_grad()
        rows = [{"loss": self._loss_of(one), **self._text_of(one)} for one in self._rows()]
        rows.sort(key=lambda row: math.isfinite(row["loss"]))
        bad = sum(not math.isfinite(row["loss"]) for row in rows)
        path = self._write(NOT_FINITE, step, [
            {**row, "loss": row["loss"] if math.isfinite(row["loss"]) else str(row["loss"])} for row in rows
        ])  # fmt: skip
        what = f"the loss of {bad} of its {len(rows)} rows" if bad else "a gradient"
        raise NotFiniteError(
            f"step {step}: {what} is not a finite number; the step was not taken. Its rows are in {path}. "
            "Look at them first; if they are sound, a lower train.learning_rate, more train.warmup_steps, or "
            "train.bf16 in place of train.fp16 help most often"
        )

    def _look_for_spike(self, step: int, value: float) -> None:
        usual = usual_loss(self.recent_losses, value, self.spike_limit)
        self.recent_losses = [*self.recent_losses, value][-WINDOW:]
        if usual is None:
            return
        self.spikes.append({"step": step, "loss": value, "median": usual, "skipped": self.skip_spikes})
        done = "the step is left out" if self.skip_spikes else "the step is taken (train.on_loss_spike: warn)"
        where = ""
        if len(self.spikes) <= FILES:
            where = f". Its rows are in {self._write(SPIKE, step, map(self._text_of, self._rows()))}"
        self.say(f"step {step}: a loss of {value:.4f}, where {usual:.4f} was usual; {done}{where}")
        if self.skip_spikes:  # an optimizer passes over parameters without a gradient
            self.trainer.model_wrapped.zero_grad(set_to_none=True)

    def _write(self, name: str, step: int, rows: Iterable[dict[str, Any]]) -> Path:
        args = self.trainer.args
        path = Path(args.output_dir) / f"{name}{step}-{args.process_index}.jsonl"
        path.write_text("".join(json.dumps({"step": step, **row}) + "\n" for row in rows), encoding="utf-8")
        return path

    def _rows(self) -> Iterator[dict[str, torch.Tensor]]:
        """The rows (packs) of the step, each as a batch of one."""
        for batch in self.batches:
            for i in range(rows_in(batch)[0]):
                one = some_rows(batch, i, i + 1)
                yield {name: value for name, value in one.items() if not name.startswith("supervised")}

    def _loss_of(self, one: dict[str, torch.Tensor]) -> float:
        trainer = self.trainer
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return float(trainer.model(**send_to_device(one, trainer.args.device), use_cache=False).loss)

    def _text_of(self, one: dict[str, torch.Tensor]) -> dict[str, Any]:
        ids = one["input_ids"][0]
        if (mask := one.get("attention_mask")) is not None:
            ids = ids[mask[0].bool()]
        return {"text": self.trainer.processing_class.decode(ids), "input_ids": ids.tolist()}
