"""The loss before the first step: what a run starts from, on some rows that it will be judged by.

Without it nobody sees whether the first logged loss, a mean over steps that were taken already, is a beginning or a run
that is lost. It is logged with the first step that is (`start_loss` in `metrics.jsonl`); a resumed run keeps its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast, send_to_device
from transformers import TrainerCallback

from instructft.adapters.lora import count_parameters
from instructft.formatting import perplexity
from instructft.models.kernels.fused_loss import scores
from instructft.models.kernels.varlen import plain
from instructft.training.rehearsal.head import as_in_a_step
from instructft.training.resumable import random_states_kept

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

NAME = "start_loss"
ROWS = 64  # at most
TOKENS = 8192  # of these rows in all, at most
WORK = 1e11  # weights times tokens on a CPU, where a forward pass is no matter of milliseconds; one row is always asked


class StartLoss(TrainerCallback):
    """Measures it when training begins at step 0, and puts it into the trainer's history.

    Args:
        rows: the validation rows, else the training rows (or packs, of which the first document is asked).
        say: told in one line.
    """

    def __init__(self, trainer: Trainer, rows: Any, say: Callable[[str], Any]):
        self.trainer, self.rows, self.say = trainer, rows, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask before the first step; a model whose weights the processes share would need all of them for each row."""
        trainer = self.trainer
        if state.global_step or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        with trainer.budget.part("start"), random_states_kept(args.device):
            loss = torch.tensor(mean_loss(trainer, self._chosen()), device=args.device)
        value = float(broadcast(loss))  # the first one's, in case another has rounded otherwise
        state.log_history.append({NAME: value, "step": 0, "epoch": 0.0})
        self.say(f"before the first step: loss {value:.4f}, perplexity {perplexity(value)}")

    def _chosen(self) -> list[dict[str, list[int]]]:
        """Rows evenly over the set, as many as may be asked."""
        most = TOKENS
        if self.trainer.args.device.type == "cpu":
            most = min(most, int(WORK / max(count_parameters(self.trainer.model)[1], 1)))
        chosen: list[dict[str, list[int]]] = []
        total = len(self.rows)
        for i in range(min(ROWS, total)):
            row = self.rows[i * total // min(ROWS, total)]
            length = row["seq_lengths"][0] if "seq_lengths" in row else len(row["input_ids"])
            chosen.append({name: list(row[name][:length]) for name in ("input_ids", "labels")})
            most -= length
            if most <= 0:
                break
        return chosen


def not_yet_logged(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the first logged training loss brings with it.

    >>> not_yet_logged([{"step": 0, "start_loss": 7.3}]), not_yet_logged([{"start_loss": 7.3}, {"loss": 7.1}])
    ({'start_loss': 7.3}, {})
    """
    if any("loss" in entry for entry in history):
        return {}
    return next(({NAME: entry[NAME]} for entry in history if NAME in entry), {})


def mean_loss(trainer: Trainer, rows: list[dict[str, list[int]]]) -> float:
    """Mean loss over the supervised tokens of some rows, each alone, by the head and the precision of the run."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    total, count, was = 0.0, 0.0, model.training
    model.eval()
    try:
        for row in rows:
            batch = send_to_device(trainer.data_collator([row]), trainer.args.device)
            borders = contextlib.nullcontext() if "cu_seq_lens_q" in batch else plain(model)
            with torch.no_grad(), as_in_a_step(trainer), borders:
                out = scores(model, batch)
            total -= float(out.log_probs.cpu().double().sum())
            count += float(out.label_mask.sum())
    finally:
        model.train(was)
    return total / max(count, 1)
