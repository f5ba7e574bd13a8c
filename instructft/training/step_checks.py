"""Looks at a step ahead of the optimizer: stops the run at one that is not a number, and tells of a loss that leaps.

A NaN in one gradient makes every weight NaN at the next step, and a run that continues is lost without a word: its loss
is logged as NaN for a day, and the checkpoints that follow are worthless. Here the step is not taken.

A loss that leaps far above what it was comes from rows that are not what they seem, or from a learning rate that is too
high; PaLM's authors went back and left such batches out (arXiv:2204.02311, section 5.1). Here the step can be left out
before it is taken: the weights and the optimizer stay as they are, the schedule proceeds.

All that the host must know of a step comes in one read. Reading is waiting for the GPU, which then does nothing until
it is told what to do next, so on a GPU it is done one step late, when that step's work is queued:

    step 7: forward, backward ─► finite? ─► optimizer, which takes no step where the GPU itself found one that is not
    step 8: forward, backward ─► read of step 7: raise, tell, add up ─► optimizer

fused AdamW leaves weights and state as they are where `found_inf` is 1 (torch.optim's own contract with its scaler), so
that a step that is not finite is never taken, and nothing is logged, saved or evaluated before it was read.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from instructft.checkpoints.manifest import NOT_FINITE, SPIKE
from instructft.data.batches.flat_packs import rows_in, some_rows
from instructft.data.batches.row_history import ROW_OF
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


def refuses_steps(optimizer: Any) -> bool:
    """Whether an optimizer takes no step where its `found_inf`, a tensor beside the weights, is 1.

    >>> refuses_steps(torch.optim.AdamW([torch.zeros(2)], fused=True)), refuses_steps(torch.optim.SGD([torch.zeros(2)]))
    (True, False)
    """
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))


@dataclass(frozen=True)
class _Unread:
    """A step whose figures are on their way to the host: whether it is finite, its loss, the sums of what is logged."""

    step: int
    values: torch.Tensor
    arrived: Any  # an event of CUDA; None on a CPU
    names: tuple[str, ...]
    batches: tuple[dict[str, torch.Tensor], ...]


class StepChecks(TrainerCallback):
    """Asked before every optimizer step, when gradients are summed over processes, unscaled and clipped.

    What it reads late (`late`), `settle` reads at once; the trainer calls it before it logs, saves or evaluates.

    Args:
        trainer: whose steps these are; it calls `begin`, `count`, `add`, `read` and `settle`.
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
        self.late = False  # whether a step is read when the next one is queued
        self._unread: _Unread | None = None
        self.begin(())

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """See whether the optimizer can refuse a step by itself; a step that may be left out is looked at before."""
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        divided = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled
        self.late = (
            args.device.type == "cuda" and not divided and not self.skip_spikes and refuses_steps(self._optimizer)
            and getattr(self.trainer.accelerator, "scaler", None) is None
        )  # fmt: skip
        self._unread = None

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
        if self.late and alone:
            self._read_later(together)
            return norm
        bad_ones, loss, *sums = torch.cat([together, *(v[None] for v in alone)]).tolist()
        if alone:
            norm = sums.pop()
        elif norm is not None and not scaled:  # DeepSpeed's, which is a number
            bad_ones += not math.isfinite(norm)
        self.finite, self.mean_loss = not bad_ones, loss / world
        self._add_up(tuple(self.sums), sums)
        return norm

    def _read_later(self, together: torch.Tensor) -> None:
        """Send the figures of this step to the host, and look at those of the step before."""
        self._optimizer.found_inf = (together[0] > 0).to(torch.float32)
        on_cuda = together.is_cuda
        values = torch.empty_like(together, device="cpu", pin_memory=on_cuda).copy_(together, non_blocking=True)
        arrived = torch.cuda.Event() if on_cuda else None
        if arrived is not None:
            arrived.record()
        self.settle()
        step = self.trainer.state.global_step + 1
        self._unread = _Unread(step, values, arrived, tuple(self.sums), self.batches)

    def settle(self) -> None:
        """Read the last step, if it was not read yet; before anything is logged, saved or evaluated.

        Raises:
            NotFiniteError: it is not finite; the optimizer has not taken it.
        """
        unread, self._unread = self._unread, None
        if unread is None:
            return
        if unread.arrived is not None:
            unread.arrived.synchronize()
        bad_ones, loss, *sums = unread.values.tolist()
        if bad_ones:
            self._refuse(unread.step, unread.batches)
        self._add_up(unread.names, sums)
        if self.spike_limit is not None:
            self._look_for_spike(unread.step, loss / self.trainer.args.world_size, unread.batches)

    def _add_up(self, names: Sequence[str], sums: Sequence[float]) -> None:
        for name, value in zip(names, sums, strict=True):
            self.since_log[name] = self.since_log.get(name, 0.0) + value

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the run at what is not a number; at a spike, take the gradients away where the step is left out."""
        if not self.finite:
            self._refuse(state.global_step + 1, self.batches)
        if self.spike_limit is not None and self.mean_loss is not None:
            self._look_for_spike(state.global_step + 1, self.mean_loss, self.batches)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step there is no other that would read it."""
        if state.global_step >= state.max_steps:
            self.settle()

    def _refuse(self, step: int, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        self.trainer.model.zero_grad()
        rows = [{"loss": self._loss_of(one), **self._text_of(one)} for one in self._rows(batches)]
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

    def _look_for_spike(self, step: int, value: float, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        usual = usual_loss(self.recent_losses, value, self.spike_limit)
        self.recent_losses = [*self.recent_losses, value][-WINDOW:]
        if usual is None:
            return
        self.spikes.append({"step": step, "loss": value, "median": usual, "skipped": self.skip_spikes})
        done = "the step is left out" if self.skip_spikes else "the step is taken (train.on_loss_spike: warn)"
        where = ""
        if len(self.spikes) <= FILES:
            where = f". Its rows are in {self._write(SPIKE, step, map(self._text_of, self._rows(batches)))}"
        self.say(f"step {step}: a loss of {value:.4f}, where {usual:.4f} was usual; {done}{where}")
        if self.skip_spikes:  # an optimizer passes over parameters without a gradient
            self.trainer.model_wrapped.zero_grad(set_to_none=True)

    def _write(self, name: str, step: int, rows: Iterable[dict[str, Any]]) -> Path:
        args = self.trainer.args
        path = Path(args.output_dir) / f"{name}{step}-{args.process_index}.jsonl"
        path.write_text("".join(json.dumps({"step": step, **row}) + "\n" for row in rows), encoding="utf-8")
        return path

    def _rows(self, batches: Sequence[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """The rows (packs) of a step, each as a batch of one."""
        for batch in batches:
            for i in range(rows_in(batch)[0]):
                one = some_rows(batch, i, i + 1)
                yield {k: v for k, v in one.items() if not k.startswith("supervised") and k != ROW_OF}

    def _loss_of(self, one: dict[str, torch.Tensor]) -> float:
        trainer = self.trainer
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return float(trainer.model(**send_to_device(one, trainer.args.device), use_cache=False).loss)

    def _text_of(self, one: dict[str, torch.Tensor]) -> dict[str, Any]:
        ids = one["input_ids"][0]
        mask = one.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            ids = ids[mask[0].bool()]
        return {"text": self.trainer.processing_class.decode(ids), "input_ids": ids.tolist()}
