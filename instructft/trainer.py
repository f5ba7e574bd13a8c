"""TRL's `SFTTrainer` on ready rows, with two things put right: the validation loss, and the count of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from instructft.head import add_supervised_head, scores


class Trainer(SFTTrainer):
    """`SFTTrainer` for rows that are tokenized and masked already.

    - `eval_loss` is the mean over all supervised tokens of the validation rows. Upstream averages the means of
      batches, so that a token in a batch of short answers weighs more than one in a batch of long answers, and the
      figure changes with the batch size.
    - `seen` counts tokens, supervised tokens and padding of the training batches, on all processes.
    - The model card is written by `instructft.card`, not at every checkpoint.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        add_supervised_head(self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model)
        self._seen = torch.zeros(3, dtype=torch.int64, device=self.args.device)
        self._eval_sums: list[torch.Tensor] = []

    @property
    def seen(self) -> dict[str, int]:
        """Tokens, supervised tokens and slots (tokens with padding) of the batches trained so far."""
        tokens, supervised, slots = self.accelerator.reduce(self._seen, "sum").tolist()
        return {"tokens": tokens, "supervised_tokens": supervised, "slots": slots}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch: the sum over its supervised tokens, divided by those of the whole step."""
        if self.model.training:
            labels, attention_mask = inputs["labels"], inputs.get("attention_mask")
            tokens = labels.new_tensor(labels.numel()) if attention_mask is None else attention_mask.sum()
            counts = [tokens, (labels[:, 1:] != -100).sum(), labels.new_tensor(labels.numel())]
            self._seen += torch.stack([count.to(self._seen.device) for count in counts])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Loss of one validation batch; its sums are kept, row by row, for the mean over all tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = scores(model, inputs)
        per_row = [-out.log_probs, out.label_mask, out.entropy, out.is_top1]  # each (B, T - 1), zero where no loss
        sums = torch.stack([x.to(torch.float64 if x.device.type == "cpu" else torch.float32).sum(1) for x in per_row], 1)
        # (B, 4) of every process; rows that only fill up the last batch of a distributed evaluation are left out
        self._eval_sums.append(self.accelerator.gather_for_metrics(sums).cpu())
        total = sums.sum(0)
        return (total[0] / total[1].clamp(min=1)).float(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; the loss, entropy and accuracy that come out are means over supervised tokens."""
        self._eval_sums = []
        self._metrics["eval"].clear()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        nll, tokens, entropy, top1 = torch.cat(self._eval_sums).double().sum(0).tolist()
        metrics = output.metrics
        metrics[f"{metric_key_prefix}_loss"] = nll / tokens
        metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(nll / tokens, 700.0))
        metrics[f"{metric_key_prefix}_entropy"] = entropy / tokens
        metrics[f"{metric_key_prefix}_mean_token_accuracy"] = top1 / tokens
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Upstream writes its own card at every checkpoint; ours is written once, when the run is done."""
