"""TRL's `SFTTrainer` on ready rows: what it counts, averages, orders and saves is put right here, in one class."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import trl.trainer.utils
from accelerate.utils import send_to_device
from torch.distributed.fsdp import FSDPModule
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from instructft.adapters.adapter_folder import AdapterMetadata
from instructft.adapters.lora import faster_b, token_rows
from instructft.data.arrow.token_rows import PARTS, slices_of
from instructft.data.arrow.workers import leaving_signals
from instructft.data.batches.counts import Counting, Counts, WithRowLengths, taken
from instructft.data.batches.divided import ready_to_divide
from instructft.data.batches.flat_packs import FlatPacks
from instructft.data.batches.parts import ONCE_MORE
from instructft.data.batches.row_history import NUMBER, ROW_OF, Numbered, RowHistory, SaysWhose, Seen, together
from instructft.data.row_order import LengthGrouped, set_epoch
from instructft.errors import CheckpointError, DivergedError, NotFiniteError, OutOfMemoryError, UsageError
from instructft.formatting import first_line
from instructft.models.kernels.fused_loss import add_supervised_head, nll_of, scores
from instructft.models.kernels.varlen import plain
from instructft.training.batch_size import MicroBatches
from instructft.training.callbacks import reads_checkpoints
from instructft.training.judging.budget import Budget
from instructft.training.out_of_memory import ran_out
from instructft.training.rehearsal.divided import ProofOfDivision
from instructft.training.rehearsal.start_loss import not_yet_logged
from instructft.training.resumable import (
    Progress,
    Sealing,
    gathered,
    load_weights,
    random_states_kept,
    renamed_on_disk,
)
from instructft.training.step_checks import StepChecks
from instructft.training.stopping import EvaluationLeft, Stop
from instructft.weights.float32_copies import Float32Copies
from instructft.weights.model_class import backbone

if TYPE_CHECKING:
    from instructft.hub.background import Publisher
    from instructft.training.judging.judge import Judge

# What upstream sets in a model's configuration for training. A model that is saved with `output_router_logits` fails as
# soon as it answers in a batch (transformers#29087).
_SET_BY_TRAINING = ("output_router_logits", "router_aux_loss_coef", "use_cache")
# What a batch says of itself for a step, and no model takes.
_FOR_TRAINING = ("counts", "parts", "supervised", "supervised_labels")


class Trainer(SFTTrainer):
    """`SFTTrainer` for rows that are tokenized and masked already, whose runs can be resumed bit for bit.

    - `eval_loss` is the mean over all supervised tokens of the validation rows. Upstream averages the means of
      batches, so that a token in a batch of short answers weighs more than one in a batch of long answers, and the
      figure changes with the batch size.
    - `seen` counts tokens, supervised tokens and padding of the training batches, on all processes. Upstream's
      `num_tokens` counts a batch of packs as if it were one row (trl 1.16, `compute_loss`).
    - `train_sampling_strategy: group_by_length` forms steps of rows of all lengths, trained in parts of like length
      (`LengthGrouped`, `data.batches.parts`). Upstream's steps hold rows of one length.
    - The model card is written by `instructft.report.model_card`, not at every checkpoint.
    - An adapter is trained in float32 over a quantized base too, and each folder that holds one gets its metadata.

    Args:
        eval_groups: data set -> rows, in the order of the validation set; each gets an `eval_<name>_loss` of its own.
        metadata: written into each folder that holds the adapter.
        budget: when evaluations are made; it must be among the callbacks.
        find_batch: `auto_find_batch_size`, see `batch_size`.
        spike_limit, skip_spikes: what is done about a loss that leaps, see `step_checks`.
        say: told in one line what a person should know.
        identity, versions: what every checkpoint says of the run, see `resumable`.
        judge: has held-out rows answered at evaluations, see `judging`.
        lora_plus_ratio: times the learning rate, for B of an adapter.
        float32_copies: let the optimizer move copies of narrow weights, see `weights.float32_copies`.
        history: keeps the loss of each row at its first and last sight; None: nobody does.
        pack_width: slots of a pack, where rows are packs; a collator that flattens them has them trained end to end,
            see `flat_packs`.
    """

    data_collator: Any
    train_dataset: Any
    _signature_columns: list[str] | None
    current_gradient_accumulation_steps: int  # of upstream: micro-batches in the step under way

    def __init__(
        self,
        *,
        eval_groups: dict[str, int] | None = None,
        metadata: AdapterMetadata | None = None,
        budget: Budget,
        find_batch: bool = False,
        spike_limit: float | None = None,
        skip_spikes: bool = False,
        say: Callable[[str], Any] = print,
        identity: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
        pack_width: int | None = None,
        history: RowHistory | None = None,
        lora_plus_ratio: float | None = None,
        float32_copies: bool = False,
        judge: Judge | None = None,
        **kwargs: Any,
    ):
        text = kwargs["model"].config.get_text_config()
        self._as_loaded = {name: getattr(text, name) for name in _SET_BY_TRAINING if hasattr(text, name)}
        if hasattr(text, "num_local_experts") and not hasattr(text, "num_experts"):
            text.num_experts = text.num_local_experts  # upstream's head asks for it by this name alone (trl 1.16)
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
            backbone(bare).register_forward_pre_hook(functools.partial(_gather_head, bare))
        self._metadata = metadata
        self.budget, self.judge = budget, judge
        self._eval_groups = eval_groups or {}
        self._eval_sums: list[torch.Tensor] = []
        self._eval_order = np.arange(0)
        # tokens, supervised tokens and slots (tokens with padding) that this process has trained
        self.counts: Counts = (0, 0, 0)
        self._pack_width = pack_width
        self._lora_plus_ratio = lora_plus_ratio
        self._keep_copies = float32_copies
        self.copies: Float32Copies | None = None  # from the first step on
        self._row_of: torch.Tensor | None = None  # whose each slot of the batch under way is
        self.history = history if self.plain_loss and self.get_cp_size() == 1 else None
        if self.get_cp_size() > 1:
            self.add_callback(ProofOfDivision(self, say))
            self.accelerator._prepare_cp = functools.partial(_with_masks, self.accelerator._prepare_cp)
        self.micro_batches = MicroBatches(self, find_batch, say)
        self.step_checks = StepChecks(self, spike_limit, skip_spikes, say)
        self._flos_per_token: int | None = None
        self.say, self._stepping = say, 0  # the step that a micro-batch was last computed in, less one
        self.stop = Stop()
        self.progress = Progress(self)
        for callback in (self.step_checks, self.stop, self.progress):
            self.add_callback(callback)
        self.versions = versions or {}
        self.sealing = Sealing(self, identity or {}, self.versions)
        self.publisher: Publisher | None = None  # uploads what is sealed while training continues

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train to the end or to a signal; from a checkpoint's folder where one is given."""
        with self.progress.training(resume_from_checkpoint), self.stop:
            try:
                trained = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                self.sealing.wait()
                return trained
            except Exception as error:
                self.end_writing()
                self._save_between_steps(error)
                raise
            finally:
                self.end_writing()  # whatever else ends it: no thread is left

    def end_writing(self) -> None:
        """Wait for the checkpoint that is written beside training, where the run fails already."""
        try:
            self.sealing.wait()
        except Exception as trouble:  # must not hide why the run failed
            self.say(first_line(trouble))

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
            self._write_checkpoint(self.model, None)
        except Exception as trouble:  # must not hide why the run failed
            self.say(f"step {step} could not be saved: {first_line(trouble)}")
        else:
            self.say(f"{type(error).__name__} after step {step}; {folder.name} is saved")

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
        counts = taken(inputs)
        parts = inputs.pop("parts", ())
        loss = self.micro_batches.train(self._one_part, model, inputs, num_items_in_batch, parts)
        tokens, supervised, slots = (before + more for before, more in zip(self.counts, counts, strict=True))
        self.counts = tokens, supervised, slots
        self.step_checks.add(loss)
        return loss

    def _one_part(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Upstream's step, whose loss is told without the router's: that one is a figure of its own, `aux_loss`."""
        self._router_loss: torch.Tensor | None = None
        self._row_of = inputs.get(ROW_OF)
        inputs = {name: value for name, value in inputs.items() if name != ROW_OF}
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._router_loss is None:
            return loss
        parts = 1 if num_items_in_batch is not None else self.current_gradient_accumulation_steps
        return loss - self._router_loss / parts

    def _prepare_context_parallel_inputs(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Upstream's: how a batch is divided among the processes that share its rows; as a copy, and shifted before."""
        size = self.get_cp_size()
        divided: tuple[Any, dict[str, Any]] = super()._prepare_context_parallel_inputs(
            model, ready_to_divide(inputs, size) if size > 1 else inputs
        )
        return divided

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the step's gradient before it was clipped, as a number: `StepChecks` reads it with all else."""
        return self.step_checks.read(super()._get_grad_norm(model, grad_norm=grad_norm))

    @property
    def seen(self) -> dict[str, int]:
        """Tokens, supervised tokens and slots (tokens with padding) of the batches trained so far, by all processes."""
        tokens, supervised, slots = self.counts
        if self.args.world_size > 1:
            alike = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # processes that share a batch
            counts = torch.tensor(self.counts, device=self.args.device)
            tokens, supervised, slots = (self.accelerator.reduce(counts, "sum") // alike).tolist()
        return {"tokens": tokens, "supervised_tokens": supervised, "slots": slots}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch: the sum over its supervised tokens, divided by those of the whole step.

        Upstream reads five numbers back for each micro-batch (trl 1.16). Here what is logged stays where it is computed
        until `StepChecks` reads the step. Losses of another kind are upstream's.
        """
        if not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if not self.plain_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        out = model(**{**inputs, **router, "use_cache": False, "fused_lm_head": True})
        items: Any = kwargs.get("num_items_in_batch")
        nll, supervised = nll_of(out), out.label_mask.sum()
        if self.history is not None and self._row_of is not None:
            self.history.see(out.log_probs, out.label_mask, self._row_of, self.state.global_step + 1)
        loss = nll / torch.as_tensor(supervised if items is None else items).clamp(min=1)
        if items is not None and self.args.average_tokens_across_devices:  # DDP averages gradients over processes
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        sums = {"supervised": supervised, "entropy": out.entropy.detach().sum(), "top1": out.is_top1.sum()}
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if items is not None else 1
            router_loss = self.router_aux_loss_coef * out.aux_loss / steps
            self._router_loss = router_loss.detach()
            loss = loss + router_loss
            sums |= {"aux_loss": out.aux_loss.detach(), "batches": torch.ones_like(supervised)}
        self.step_checks.count(**sums)
        return loss

    @property
    def plain_loss(self) -> bool:
        """Whether the loss is the mean of -log p, which is computed here; else it is upstream's."""
        return (
            hasattr(trl.trainer.utils, "add_fused_lm_head")  # trl 1.15
            and self.args.loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
            and self._whole_layers
        )

    @property
    def _whole_layers(self) -> bool:
        """Whether a process computes whole layers: of its rows, or of its part of them (context parallelism)."""
        config = getattr(self.accelerator, "parallelism_config", None)
        return config is None or config.tp_size == config.sp_size == 1

    def rows_seen(self) -> Seen | None:
        """What all processes have seen of the training rows. Every process must call."""
        if self.history is None:
            return None
        mine = self.history.seen()
        if self.args.world_size == 1:
            return mine
        every: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(every, mine)
        return together(every)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a batch; upstream counts all parameters anew for each micro-batch."""
        if self._flos_per_token is None:
            self._flos_per_token = int(super().floating_point_ops({"input_ids": torch.empty(1)}))
        return self._flos_per_token * int(inputs["input_ids"].numel()) // self.get_cp_size()

    def get_train_dataloader(self) -> Any:
        """Rows as slices of Arrow's columns; each batch says how much it holds, and flat packs have a fixed shape."""
        rows, collate = slices_of(self.train_dataset), self.data_collator
        if self._pack_width and collate.flatten:
            width = self._pack_width + -self._pack_width % (collate.pad_to_multiple_of or 1)
            packs = self._rows_of_a_process()
            collate = FlatPacks.of(rows, collate.pad_token_id, width, packs, numbered=collate.numbered)
        if self.history is not None:
            rows, collate = Numbered(rows), SaysWhose(collate, self.history.origins)
        counting = self._counting(collate, self._once_more())
        with _in_place(self, train_dataset=rows, data_collator=counting):
            return super().get_train_dataloader()

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that reach the collator; upstream knows of packs alone, and would drop where their branches begin."""
        if self._signature_columns is not None:
            return
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*(self._signature_columns or ()), *PARTS, NUMBER]

    def _once_more(self) -> int | None:
        """What a part of a batch costs (`data.batches.parts`); None where batches are not to be divided.

        A router's loss is a mean over batches, and some other losses are; shared weights are gathered for each pass.
        """
        whole = self.aux_loss_enabled or not self.plain_loss or self.micro_batches.find
        if whole or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        return ONCE_MORE["cpu" if self.args.device.type == "cpu" else "cuda"]

    def _rows_of_a_process(self) -> int:
        """Rows of a batch, which each process makes of its own: one row that holds all packs cannot be divided."""
        if self.accelerator.dispatch_batches:
            raise UsageError(
                "train.accelerator_config.dispatch_batches: true divides a batch along its rows, and with attention "
                f"{self.model.config._attn_implementation} all its packs are one row; leave it out"
            )
        return int(self._train_batch_size) // (self.args.world_size if self.accelerator.split_batches else 1)

    def _counting(self, collate: Any, once_more: int | None = None) -> Any:
        """A collator that counts, unless one process makes batches for all: they are divided, and are tensors alone."""
        together = self.accelerator.dispatch_batches or self.accelerator.split_batches
        if not self.accelerator.dispatch_batches:
            collate = Counting(collate, None if together else once_more)
        return functools.partial(leaving_signals, collate) if self.args.dataloader_num_workers else collate

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        at_once = args.world_size // self.get_cp_size()
        step = args.train_batch_size * args.gradient_accumulation_steps * at_once
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGrouped(slices_of(dataset).lengths, step, seed, args.train_batch_size, at_once)

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
        if not self.budget.evaluation_is_due(self.args, self.state, self.control):
            return {}
        self.step_checks.settle()
        try:
            with self.budget.part("evaluation"):
                found: dict[str, float] = super()._evaluate(*args, **kwargs)
            return found
        except EvaluationLeft:
            self.stop.left_evaluation = True
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether an evaluation is the best so far; by a figure of answers where its gain is beyond chance only."""
        if self.judge is not None and (best := self.judge.best) is not None:
            if not metrics or best.step != self.state.global_step:
                return False
            self.state.best_metric, self.state.best_global_step = best.value, best.step
            return True
        return bool(metrics) and bool(super()._determine_best_metric(metrics=metrics, trial=trial))

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Loss of one validation batch; its sums are kept, row by row, for the mean over all tokens."""
        self.micro_batches.under_way = ("validation", tuple(inputs["input_ids"].shape))
        # an evaluation looks at every position
        inputs = {name: value for name, value in inputs.items() if name not in _FOR_TRAINING}
        inputs = send_to_device(inputs, self.args.device)
        lengths, _ = inputs.pop("row_lengths"), inputs.pop("counts", None)
        flat, tokens = "cu_seq_lens_q" in inputs, inputs["input_ids"].numel()
        # packs of one width, each with its padding, or end to end with none
        width = tokens // len(lengths) if flat and tokens != int(lengths.sum()) else None
        without_borders = contextlib.nullcontext() if flat else plain(self.model)
        divided, inputs = self._prepare_context_parallel_inputs(model, inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), without_borders, divided():
            out = scores(model, inputs)
        values = torch.stack([-out.log_probs, out.label_mask, out.entropy, out.is_top1])  # (4, B, T - 1), 0: no loss
        values = values.to(torch.float64 if values.device.type == "cpu" else torch.float32)
        sums = _sums_of_rows(values, lengths, width)
        # (B, 4) of every process; rows that only fill up the last batch of a distributed evaluation are left out
        if (size := self.get_cp_size()) == 1:
            self._eval_sums.append(self.accelerator.gather_for_metrics(sums).cpu())
        else:  # processes that share a row stand side by side, and upstream takes each for one with rows of its own
            every = self.accelerator.gather(sums).unflatten(0, (-1, size, len(sums))).sum(1).flatten(0, 1)
            last = self.accelerator.gradient_state
            left = last.remainder if last.end_of_dataloader and last.remainder > 0 else len(every)
            self._eval_sums.append(every[:left].cpu())
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
        if self.judge is not None:
            metrics.update(self.judge.measure(self))
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Every held-out row once, whatever becomes of the last rows in training; batches say how long rows are."""
        rows = slices_of(self.eval_dataset if eval_dataset is None else eval_dataset)
        collate = self._counting(WithRowLengths(self.data_collator))
        with _in_place(self, data_collator=collate), _in_place(self.args, dataloader_drop_last=False):
            return super().get_eval_dataloader(rows)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The longest rows first: little padding is computed, and memory that does not suffice shows at once."""
        if not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        self._eval_order = np.argsort(-slices_of(eval_dataset).lengths, kind="stable")
        return self._eval_order.tolist()

    # -- logging and saving -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; the mean loss of a run counts the steps before a resume too, and is told at its end only."""
        self.step_checks.settle()
        if "train_loss" in logs:
            self.sealing.wait()  # the end: what was saved is told of, and the best one read, when it is there
            if self.stop.agreed:
                return
            steps = max(self.state.global_step, 1)
            logs["train_loss"] = (self.progress.loss_before + self._total_loss_scalar) / steps
        if self.model.training:
            self._metrics["train"].update(self._logged_metrics())
        if "loss" in logs:
            logs.update(not_yet_logged(self.state.log_history))
        super().log(logs, *args, **kwargs)

    def _logged_metrics(self) -> dict[str, list[float]]:
        """Upstream's metrics of the steps since the last log, each token counted once; there may be none."""
        sums, self.step_checks.since_log = self.step_checks.since_log, {}
        found = {}
        if sums:
            tokens = max(sums["supervised"], 1.0)
            found = {"entropy": [sums["entropy"] / tokens], "mean_token_accuracy": [sums["top1"] / tokens]}
            if "aux_loss" in sums:
                found["aux_loss"] = [sums["aux_loss"] / sums["batches"]]
        return {**found, "num_tokens": [self.seen["tokens"]]} if found or self._metrics["train"] else {}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.progress.restore_random_states(Path(checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        ends = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        read = any(map(reads_checkpoints, self.callback_handler.callbacks))
        self._write_checkpoint(model, trial, beside=not (ends or read))

    def _write_checkpoint(self, model: Any, trial: Any, beside: bool = False) -> None:
        self.step_checks.settle()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self.budget.part("checkpoints"), self.sealing.checkpoint(folder, beside):
            super()._save_checkpoint(model, trial)
            self.progress.write(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `from_pretrained` wants it. Every process must call; the first one writes.

        A checkpoint holds the weights as the next step wants them; else they are rounded from their float32 copies.
        """
        if self.copies is not None and not _internal_call:
            if self.args.should_save:
                self._save(output_dir or self.args.output_dir, state_dict=self.copies.rounded_by_chance(self.model))
            return
        if not self.is_fsdp2:
            super().save_model(output_dir, _internal_call)
            return
        # upstream saves nothing where checkpoints are in shards (transformers 5.23), and of an adapter gathers the base
        self._save(output_dir or self.args.output_dir, state_dict=gathered(self.model))

    @property
    def is_fsdp2(self) -> bool:
        """Whether each process holds a part of every weight only (FSDP, version 2)."""
        return bool(self.is_fsdp_enabled and self.accelerator.is_fsdp2)

    @contextlib.contextmanager
    def config_as_loaded(self) -> Iterator[dict[str, Any]]:
        """Take back for a while what training sets in the model's configuration; gives what stands there then."""
        with _in_place(self.model.config.get_text_config(), **self._as_loaded):
            yield dict(self._as_loaded)

    def create_optimizer(self, model: Any = None) -> Any:
        """Upstream's, with a learning rate of its own for B where LoRA+ is asked for, and copies where these are."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self._lora_plus_ratio is not None:
            faster_b(optimizer, self.model if model is None else model, self._lora_plus_ratio)
        if new and self._keep_copies:
            self.copies = Float32Copies(optimizer, float32_gradients=self.args.world_size == 1)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._by_names_of_its_own(resume_from_checkpoint):
            load_weights(self.model if model is None else model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self._by_names_of_its_own(best):
            load_weights(self.model, Path(best))
        else:
            super()._load_best_model()
        if self.copies is not None:
            self.copies.read(Path(best) / OPTIMIZER_NAME)

    def _by_names_of_its_own(self, folder: str) -> bool:
        """Whether weights on the disk are named otherwise than in memory; upstream would pass them over in silence."""
        shared = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not shared and renamed_on_disk(self.model, Path(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self.config_as_loaded():
            super()._save(output_dir, state_dict)
        if self._metadata is not None and self.args.should_save:
            self._metadata.write(self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Upstream writes its own card at every checkpoint; ours is written once, when the run is done."""


@contextlib.contextmanager
def _in_place(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes with other values for a while: what upstream reads from itself and takes from nobody."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _with_masks(prepare: Callable[..., Any], *prepared: Any) -> tuple[Any, ...]:
    """Make accelerate ready to divide rows, and let it see no model, whose attention keeps its masks so.

    Accelerate (1.15) would take them from every attention for good, and an answer to several prompts at once needs its
    own; a batch that is divided brings a mask of ones, which leaves nothing to take.
    """
    prepare()
    return prepared


def _sums_of_rows(values: torch.Tensor, lengths: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Sums over each row of a batch; flattened packs, of which the batch has one row, are taken apart.

    Args:
        values: (4, B, T - 1), or (4, 1, T - 1) of packs end to end; of the token that each position predicts.
        lengths: (B,), tokens of each row.
        width: tokens from one pack to the next, where each is followed by its padding; None: by nothing.

    Returns:
        (B, 4).
    """
    if width is None and values.shape[1] == len(lengths):
        return values.sum(2).T
    whole = torch.nn.functional.pad(values[:, 0], (0, 1))  # (4, T): nothing is predicted across a border
    if width is None:
        return torch.stack([part.sum(1) for part in whole.split(lengths.tolist(), dim=1)])
    return whole.unflatten(1, (-1, width)).sum(2).T[: len(lengths)]


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
