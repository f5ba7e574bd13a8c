"""TRL's `SFTTrainer` on ready rows, with validation loss, token counts and the order of rows put right."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers.trainer_utils import EvalLoopOutput

from instructft.adapters.adapter_folder import AdapterMetadata
from instructft.adapters.new_tokens import token_rows
from instructft.data.packing import flat
from instructft.training.fused_loss import add_supervised_head, scores
from instructft.training.resumable import LastingTrainer


class LengthGrouped(Sampler[int]):
    """Row numbers in an order whose steps hold rows of like length, so that little padding is computed.

    Rows are shuffled, then sorted by length within windows of `WINDOW` steps, and the steps are shuffled: which rows
    share a step depends on the rows of a step in all, not on how they are divided among micro-batches and processes.
    The order of an epoch depends on `seed` and the epoch only, so that a run can be resumed.

    >>> list(LengthGrouped([3, 9, 3, 9], step=2, seed=0))
    [2, 0, 1, 3]
    """

    WINDOW = 50  # steps; as in transformers' LengthGroupedSampler

    def __init__(self, lengths: Any, step: int, seed: int):
        self.lengths = np.asarray(lengths)
        self.step = step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        steps: list[np.ndarray] = []
        for start in range(0, len(order), self.WINDOW * self.step):
            window = order[start : start + self.WINDOW * self.step]
            window = window[np.argsort(-self.lengths[window], kind="stable")]
            steps += [window[i : i + self.step] for i in range(0, len(window), self.step)]
        # a last step that is not full stays last, since batches are cut from the order one after the other
        full = [rows for rows in steps if len(rows) == self.step]
        rest = [rows for rows in steps if len(rows) < self.step]
        rng.shuffle(full)
        yield from (int(row) for rows in [*full, *rest] for row in rows)


class Trainer(LastingTrainer):
    """`SFTTrainer` for rows that are tokenized and masked already.

    - `eval_loss` is the mean over all supervised tokens of the validation rows. Upstream averages the means of
      batches, so that a token in a batch of short answers weighs more than one in a batch of long answers, and the
      figure changes with the batch size.
    - `eval_groups`, data set -> rows in the order of the validation set, gives each an `eval_<name>_loss` of its own.
    - `seen` counts tokens, supervised tokens and padding of the training batches, on all processes. Upstream's
      `num_tokens` counts a batch of packs as if it were one row (trl 1.16, `compute_loss`).
    - `train_sampling_strategy: group_by_length` forms steps of rows of like length (`LengthGrouped`).
    - What is saved can be trusted and gone on from: see `instructft.training.resumable`.
    - The model card is written by `instructft.report.model_card`, not at every checkpoint.
    - An adapter is trained in float32 over a quantized base too, and each folder that holds one gets its `metadata`.
    """

    def __init__(
        self, *, eval_groups: dict[str, int] | None = None, metadata: AdapterMetadata | None = None, **kwargs: Any
    ):
        trained = {name: p.data for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        super().__init__(**kwargs)
        for name, parameter in self.model.named_parameters():
            if name in trained and parameter.dtype != trained[name].dtype:
                # upstream rounds the adapter of a quantized base to bfloat16 (trl 1.16), which AdamW's updates of late
                # steps are too small for
                parameter.data = trained[name].to(parameter.device)
        self._metadata = metadata
        self._eval_groups = eval_groups or {}
        bare = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_supervised_head(bare)
        if token_rows(bare.get_output_embeddings()) is not None:
            bare.base_model.register_forward_pre_hook(functools.partial(_gather_head, bare))
        self._seen = torch.zeros(3, dtype=torch.int64, device=self.args.device)
        self._eval_sums: list[torch.Tensor] = []
        self._eval_order = np.arange(0)

    def counts(self) -> list[int]:
        """Tokens, supervised tokens and slots that this process has trained."""
        found: list[int] = self._seen.tolist()
        return found

    def restore_counts(self, counts: list[int]) -> None:
        """Go on counting from a checkpoint."""
        self._seen = torch.tensor(counts, dtype=torch.int64, device=self.args.device)

    @property
    def seen(self) -> dict[str, int]:
        """Tokens, supervised tokens and slots (tokens with padding) of the batches trained so far."""
        tokens, supervised, slots = self.accelerator.reduce(self._seen, "sum").tolist()
        return {"tokens": tokens, "supervised_tokens": supervised, "slots": slots}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch: the sum over its supervised tokens, divided by those of the whole step."""
        if not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        labels, attention_mask, positions = inputs["labels"], inputs.get("attention_mask"), inputs.get("position_ids")
        if attention_mask is not None:
            tokens = attention_mask.sum()
        elif positions is None:
            tokens = labels.new_tensor(labels.numel())
        else:  # a pad stands alone: its position is 0, and so is the next (a document has two tokens at least)
            following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
            tokens = ((positions != 0) | (following != 0)).sum()
        counts = [tokens, (labels[:, 1:] != -100).sum(), labels.new_tensor(labels.numel())]
        self._seen += torch.stack([count.to(self._seen.device) for count in counts])
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._metrics["train"]["num_tokens"] = [self.seen["tokens"]]
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGrouped(flat(dataset)[2], step, args.seed if args.data_seed is None else args.data_seed)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Loss of one validation batch; its sums are kept, row by row, for the mean over all tokens."""
        self.under_way = ("validation", tuple(inputs["input_ids"].shape))
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = scores(model, inputs)
        per_row = [-out.log_probs, out.label_mask, out.entropy, out.is_top1]  # each (B, T - 1), zero where no loss
        sums = torch.stack(
            [x.to(torch.float64 if x.device.type == "cpu" else torch.float32).sum(1) for x in per_row], 1
        )
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
        rows = torch.cat(self._eval_sums).double()  # (rows, 4)
        rows[self._eval_order] = rows.clone()  # in the order of the validation set
        nll, tokens, entropy, top1 = rows.sum(0).tolist()
        metrics: Any = output.metrics
        if sum(self._eval_groups.values()) == len(rows):
            for name, part in zip(self._eval_groups, rows.split(list(self._eval_groups.values())), strict=True):
                metrics[f"{metric_key_prefix}_{_plain(name)}_loss"] = float(part[:, 0].sum() / part[:, 1].sum())
        metrics[f"{metric_key_prefix}_loss"] = nll / tokens
        metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(nll / tokens, 700.0))
        metrics[f"{metric_key_prefix}_entropy"] = entropy / tokens
        metrics[f"{metric_key_prefix}_mean_token_accuracy"] = top1 / tokens
        return output

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The longest rows first: little padding is computed, and memory that does not suffice shows at once."""
        if not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        self._eval_order = np.argsort(-flat(eval_dataset)[2], kind="stable")
        return self._eval_order.tolist()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._metadata is not None and self.args.should_save:
            self._metadata.write(self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Upstream writes its own card at every checkpoint; ours is written once, when the run is done."""


def _gather_head(model: Any, *_: Any) -> None:
    """Under FSDP2, gather an output head with rows of new tokens; training reads it past the call that would do so.

    PEFT puts the rows into the weight, and cannot where one is sharded and the other is not (peft 0.21).
    """
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


def _plain(name: str) -> str:
    """The name of a data set as it stands in a metric's name: `dolly-15k`, `rows` for `data/rows.jsonl`.

    >>> _plain("data/rows.jsonl")
    'rows'
    """
    last = name.rstrip("/").rpartition("/")[2]
    return last.split(".")[0] or last
