"""TRL's `SFTTrainer` on ready rows: what it counts, averages, orders and saves is put right here, in one class."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.distributed.fsdp import FSDPModule
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from instructft.adapters.adapter_folder import AdapterMetadata
from instructft.adapters.lora import token_rows
from instructft.data.arrow.token_rows import tokens_of
from instructft.data.row_order import LengthGrouped, set_epoch
from instructft.errors import CheckpointError, DivergedError, NotFiniteError, OutOfMemoryError
from instructft.formatting import first_line
from instructft.models.kernels.fused_loss import add_supervised_head, scores
from instructft.training.batch_size import MicroBatches
from instructft.training.out_of_memory import ran_out
from instructft.training.resumable import Progress, Sealing, gathered, random_states_kept
from instructft.training.step_checks import StepChecks
from instructft.training.stopping import EvaluationLeft, Stop

if TYPE_CHECKING:
    from instructft.hub.background import Publisher

# What upstream sets in a model's configuration for training. A model that is saved with `output_router_logits` fails as
# soon as it answers in a batch (transformers#29087).
_SET_BY_TRAINING = ("output_router_logits", "router_aux_loss_coef", "use_cache")


class Trainer(SFTTrainer):
    """`SFTTrainer` for rows that are tokenized and masked already, whose runs can be resumed bit for bit.

    - `eval_loss` is the mean over all supervised tokens of the validation rows. Upstream averages the means of
      batches, so that a token in a batch of short answers weighs more than one in a batch of long answers, and the
      figure changes with the batch size.
    - `seen` counts tokens, supervised tokens and padding of the training batches, on all processes. Upstream's
      `num_tokens` counts a batch of packs as if it were one row (trl 1.16, `compute_loss`).
    - `train_sampling_strategy: group_by_length` forms steps of rows of like length (`LengthGrouped`).
    - The model card is written by `instructft.report.model_card`, not at every checkpoint.
    - An adapter is trained in float32 over a quantized base too, and each folder that holds one gets its metadata.

    Args:
        eval_groups: data set -> rows, in the order of the validation set; each gets an `eval_<name>_loss` of its own.
        metadata: written into each folder that holds the adapter.
        find_batch: `auto_find_batch_size`, see `batch_size`.
        spike_limit, skip_spikes: what is done about a loss that leaps, see `step_checks`.
        say: told in one line what a person should know.
        identity, versions: what every checkpoint says of the run, see `resumable`.
    """

    data_collator: Any
    current_gradient_accumulation_steps: int  # of upstream: micro-batches in the step under way

    def __init__(
        self,
        *,
        eval_groups: dict[str, int] | None = None,
        metadata: AdapterMetadata | None = None,
        find_batch: bool = False,
        spike_limit: float | None = None,
        skip_spikes: bool = False,
        say: Callable[[str], Any] = print,
        identity: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        text = kwargs["model"].config.get_text_config()
        self._as_loaded = {name: getattr(text, name) for name in _SET_BY_TRAINING if hasattr(text, name)}
        trained = {name: p.data for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        super().__init__(**kwargs)
        for name, parameter in self.model.named_parameters():
            if name in trained and parameter.dtype != trained[name].dtype:
                # upstream rounds the adapter of a quantized base to bfloat16 (trl 1.16), which AdamW's updates of late
                # steps are too small for
                parameter.data = trained[name].to(parameter.device)
        bare = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_supervised_head(bare)
        if token_rows(bare.get_output_embeddings()) is not None:
            bare.base_model.register_forward_pre_hook(functools.partial(_gather_head, bare))
        self._metadata = metadata
        self._eval_groups = eval_groups or {}
        self._eval_sums: list[torch.Tensor] = []
        self._eval_order = np.arange(0)
        # tokens, supervised tokens and slots (tokens with padding) that this process has trained
        self.counts = torch.zeros(3, dtype=torch.int64, device=self.args.device)
        self.micro_batches = MicroBatches(self, find_batch, say)
        self.step_checks = StepChecks(self, spike_limit, skip_spikes, say)
        self._say, self._stepping = say, 0  # the step that a micro-batch was last computed in, less one
        self.stop = Stop()
        self.progress = Progress(self)
        for callback in (self.step_checks, self.stop, self.progress):
            self.add_callback(callback)
        self.versions = versions or {}
        self._sealing = Sealing(self, identity or {}, self.versions)
        self.last_checkpoint: str | None = None
        self.publisher: Publisher | None = None  # uploads what is sealed while training continues

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train to the end or to a signal; from a checkpoint's folder where one is given."""
        with self.progress.training(resume_from_checkpoint), self.stop:
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except Exception as error:
                self._save_between_steps(error)
                raise

    def _save_between_steps(self, error: Exception) -> None:
        """Keep the steps that are done where something else than a step has failed: data, an evaluation, a callback."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        in_a_step = step <= self._stepping or isinstance(
            error, NotFiniteError | DivergedError | OutOfMemoryError | CheckpointError
        )
        if in_a_step or self.args.world_size > 1 or ran_out(error) or folder.exists():
            return
        self.stop.left_evaluation = self.control.should_evaluate
        try:
            self._save_checkpoint(self.model, None)
        except Exception as trouble:  # must not hide why the run failed
            self._say(f"step {step} could not be saved: {first_line(trouble)}")
        else:
            self._say(f"{type(error).__name__} after step {step}; {folder.name} is saved")

    def _run_epoch(self, **kwargs: Any) -> None:
        ended = self.control.should_training_stop and not self.stop.agreed  # early, before the resume
        if ended or self.state.global_step >= self.state.max_steps:  # upstream would train one step more
            self.control.should_training_stop = True
            return
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.micro_batches.begin(batches)
        self.step_checks.begin(batches)
        return batches, items

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Loss and gradient of one micro-batch, in parts where it does not fit into memory as a whole."""
        self._stepping = self.state.global_step
        loss = self.micro_batches.train(super().training_step, model, inputs, num_items_in_batch)
        self.step_checks.add(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the step's gradient before it was clipped, kept for `StepChecks`, which no callback is told.

        What is left of it after clipping would not do: where a norm overflows, zeros are left, which look sound.
        """
        self.step_checks.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.step_checks.norm

    @property
    def seen(self) -> dict[str, int]:
        """Tokens, supervised tokens and slots (tokens with padding) of the batches trained so far."""
        tokens, supervised, slots = self.accelerator.reduce(self.counts, "sum").tolist()
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
        self.counts += torch.stack([count.to(self.counts.device) for count in counts])
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._metrics["train"]["num_tokens"] = [self.seen["tokens"]]
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGrouped(tokens_of(dataset).lengths, step, args.seed if args.data_seed is None else args.data_seed)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; random states stay as they are, so that how often one looks changes nothing that is trained."""
        with random_states_kept(self.args.device):  # merely to iterate over a data loader draws a number
            try:
                found: dict[str, float] = super().evaluate(*args, **kwargs)
            finally:
                self._reshard()
        return found

    def _reshard(self) -> None:
        """Leave each process its part of the weights; FSDP2 keeps some gathered after a pass that has no backward.

        They take memory, and a checkpoint would put them back: the steps after it would differ in their last bits from
        those of a run that made none there.
        """
        if self.is_fsdp2:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if kwargs.get("skip_scheduler") and self.state.global_step:  # `eval_on_start`, which the run has had
            return {}
        try:
            found: dict[str, float] = super()._evaluate(*args, **kwargs)
            return found
        except EvaluationLeft:
            self.stop.left_evaluation = True
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return bool(metrics) and bool(super()._determine_best_metric(metrics=metrics, trial=trial))

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Loss of one validation batch; its sums are kept, row by row, for the mean over all tokens."""
        self.micro_batches.under_way = ("validation", tuple(inputs["input_ids"].shape))
        inputs = send_to_device(inputs, self.args.device)
        lengths = inputs.pop("row_lengths")
        with torch.no_grad(), self.compute_loss_context_manager():
            out = scores(model, inputs)
        values = torch.stack([-out.log_probs, out.label_mask, out.entropy, out.is_top1])  # (4, B, T - 1), 0: no loss
        sums = _sums_of_rows(values.to(torch.float64 if values.device.type == "cpu" else torch.float32), lengths)
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Every held-out row once, whatever becomes of the last rows in training; batches say how long rows are."""
        collate: Any = self.data_collator
        drop = self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = _WithRowLengths(collate), False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.args.dataloader_drop_last = collate, drop

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The longest rows first: little padding is computed, and memory that does not suffice shows at once."""
        if not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        self._eval_order = np.argsort(-tokens_of(eval_dataset).lengths, kind="stable")
        return self._eval_order.tolist()

    # -- logging and saving -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; the mean loss of a run counts the steps before a resume too, and is told at its end only."""
        if "train_loss" in logs:
            if self.stop.agreed:
                return
            steps = max(self.state.global_step, 1)
            logs["train_loss"] = (self.progress.loss_before + self._total_loss_scalar) / steps
        super().log(logs, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.progress.restore_random_states(Path(checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self._sealing.checkpoint(folder):
            super()._save_checkpoint(model, trial)
            self.progress.write(folder)
        self.last_checkpoint = folder.name

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `from_pretrained` wants it. Every process must call; the first one writes."""
        if not self.is_fsdp2:
            super().save_model(output_dir, _internal_call)
            return
        # upstream saves nothing where checkpoints are in shards (transformers 5.23), and of an adapter gathers the base
        self._save(output_dir or self.args.output_dir, state_dict=gathered(self.model))

    @property
    def is_fsdp2(self) -> bool:
        """Whether each process holds a part of every weight only (FSDP, version 2)."""
        return bool(self.is_fsdp_enabled and self.accelerator.is_fsdp2)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        text = self.model.config.get_text_config()
        trained = {name: getattr(text, name) for name in self._as_loaded}
        try:
            for name, value in self._as_loaded.items():
                setattr(text, name, value)
            super()._save(output_dir, state_dict)
        finally:
            for name, value in trained.items():
                setattr(text, name, value)
        if self._metadata is not None and self.args.should_save:
            self._metadata.write(self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Upstream writes its own card at every checkpoint; ours is written once, when the run is done."""


class _WithRowLengths:
    """A collator that says with each batch how long its rows are: (B,), where packs become one row of the batch too."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        return {**self.collate(rows), "row_lengths": torch.tensor([len(row["input_ids"]) for row in rows])}


def _sums_of_rows(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums over each row of a batch; flattened packs, of which the batch has one row, are taken apart.

    Args:
        values: (4, B, T - 1), or (4, 1, T - 1) of packs end to end; of the token that each position predicts.
        lengths: (B,), tokens of each row.

    Returns:
        (B, 4).
    """
    if values.shape[1] == len(lengths):
        return values.sum(2).T
    whole = torch.nn.functional.pad(values[:, 0], (0, 1))  # (4, T): nothing is predicted across a border
    return torch.stack([part.sum(1) for part in whole.split(lengths.tolist(), dim=1)])


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
