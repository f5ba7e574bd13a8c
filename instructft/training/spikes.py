"""Steps whose loss jumps: told with the rows they came from, and left out where the recipe says so.

A loss that leaps far above what it was comes from rows that are not what they seem, or from a learning rate that is too
high; PaLM's authors went back and left such batches out (arXiv:2204.02311, section 5.1). Here the step can be left out
before it is taken: the weights and the optimizer stay as they are, the schedule goes on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from instructft.checkpoints.manifest import SPIKE
from instructft.training.finite import FiniteTrainer

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


class SpikeTrainer(FiniteTrainer):
    """`SFTTrainer` that notices a step whose loss is more than `limit` times what it was, ahead of taking it.

    Args:
        spike_limit: times the median loss of the last 50 steps; None looks for nothing.
        skip_spikes: leave such a step out. Its loss counts as recent all the same, so that a level that stays is taken
            for what is usual after some steps, and training goes on.
        say: told in one line of each.

    `spikes` lists them: step, loss, median, skipped.
    """

    def __init__(
        self, *, spike_limit: float | None = None, skip_spikes: bool = False, say: Callable[[str], Any] = print,
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self._say, self._spike_limit, self._skip_spikes = say, spike_limit, skip_spikes
        self.recent_losses: list[float] = []
        self.spikes: list[dict[str, Any]] = []

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the step's gradient, which is gone afterwards where the step is left out."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._spike_limit is None or self._step_loss is None:
            return norm
        whole = self._step_loss.detach().clone().float()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(whole)
            whole /= self.args.world_size
        loss = float(whole)
        usual = usual_loss(self.recent_losses, loss, self._spike_limit)
        self.recent_losses = [*self.recent_losses, loss][-WINDOW:]
        if usual is not None:
            self._tell(loss, usual)
            if self._skip_spikes:
                model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
        return norm

    def _tell(self, loss: float, usual: float) -> None:
        step = self.state.global_step + 1
        self.spikes.append({"step": step, "loss": loss, "median": usual, "skipped": self._skip_spikes})
        done = "the step is left out" if self._skip_spikes else "the step is taken (train.on_loss_spike: warn)"
        where = ""
        if len(self.spikes) <= FILES:
            path = Path(self.args.output_dir) / f"{SPIKE}{step}-{self.args.process_index}.jsonl"
            path.write_text("".join(json.dumps({"step": step, **row}) + "\n" for row in self._texts()), "utf-8")
            where = f". Its rows are in {path}"
        self._say(f"step {step}: a loss of {loss:.4f}, where {usual:.4f} was usual; {done}{where}")
