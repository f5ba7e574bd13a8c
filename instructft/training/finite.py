"""Stops a run before the optimizer takes a step that is not a number, and names the rows that it came from.

A NaN in one gradient makes every weight NaN at the next step, and a run that goes on is lost without a word: its loss
is logged as NaN for a day, and the checkpoints that follow are worthless. Here the step is not taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from instructft.checkpoints.manifest import NOT_FINITE
from instructft.errors import NotFiniteError


class FiniteTrainer(SFTTrainer):
    """`SFTTrainer` whose every optimizer step is made of finite numbers."""

    _step_loss: torch.Tensor | None = None  # summed over the micro-batches of the step that is under way
    _step_batches: tuple[dict[str, torch.Tensor], ...] = ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step; kept until it is taken, in case its rows have to be named."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._step_loss, self._step_batches = None, tuple(batches)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Loss and gradient of one micro-batch."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the step's gradient, which the optimizer has not seen yet."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
        # with float16 a gradient that overflows is expected: the scaler skips the step and lowers its scale
        scaled = getattr(self.accelerator, "scaler", None) is not None
        known = [self._step_loss, None if scaled else whole]
        finite = torch.stack([torch.as_tensor(value, device=self.args.device).isfinite().all()
                              for value in known if value is not None]).all().long()  # fmt: skip
        if self.args.world_size > 1:
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            self._stop_before_it()
        return norm

    def _stop_before_it(self) -> None:
        step = self.state.global_step + 1
        self.model.zero_grad()
        path = Path(self.args.output_dir) / f"{NOT_FINITE}{step}-{self.args.process_index}.jsonl"
        rows, bad = self._rows()
        path.write_text("".join(json.dumps({"step": step, **row}) + "\n" for row in rows), encoding="utf-8")
        what = f"the loss of {bad} of its {len(rows)} rows" if bad else "a gradient"
        raise NotFiniteError(
            f"step {step}: {what} is not a finite number; the step was not taken. Its rows are in {path}. "
            "Look at them first; if they are sound, a lower train.learning_rate, more train.warmup_steps, or "
            "train.bf16 in place of train.fp16 help most often"
        )

    def _rows(self) -> tuple[list[dict[str, Any]], int]:
        """Each row (pack) of the step with its loss, those first whose loss is not finite, and how many those are."""
        rows = []
        for one in self._single_rows():
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = float(self.model(**self._prepare_inputs(one), use_cache=False).loss)
            rows.append({"loss": loss, **self._text_of(one)})
        rows.sort(key=lambda row: _is_finite(row["loss"]))
        bad = sum(not _is_finite(row["loss"]) for row in rows)
        return [{**row, "loss": row["loss"] if _is_finite(row["loss"]) else str(row["loss"])} for row in rows], bad

    def _texts(self) -> list[dict[str, Any]]:
        """Each row (pack) of the step, as text and as ids."""
        return [self._text_of(one) for one in self._single_rows()]

    def _single_rows(self) -> Iterator[dict[str, torch.Tensor]]:
        """The rows of the step, each as a batch of one."""
        for batch in self._step_batches:
            count = batch["input_ids"].shape[0]
            for i in range(count):
                yield {name: value[i : i + 1] if value.shape[:1] == (count,) else value
                       for name, value in batch.items()}  # fmt: skip

    def _text_of(self, one: dict[str, torch.Tensor]) -> dict[str, Any]:
        ids = one["input_ids"][0]
        if (mask := one.get("attention_mask")) is not None:
            ids = ids[mask[0].bool()]
        return {"text": self.processing_class.decode(ids), "input_ids": ids.tolist()}


def _is_finite(value: float) -> bool:
    return value - value == 0
