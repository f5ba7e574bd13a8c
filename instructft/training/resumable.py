"""The half of the trainer that makes a run last: checkpoints that are sealed, and all that a resumed run must know.

Upstream's checkpoint holds weights, optimizer, schedule, random states and the trainer's state. What it leaves out, and
what a run that goes on would lose: the losses since the last log, the tokens counted so far, the time spent, and an
evaluation that was due. They go into `progress_<rank>.json`, so that a resumed run logs what it would have logged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule

from instructft.checkpoints import manifest
from instructft.errors import CheckpointError
from instructft.formatting import first_line
from instructft.hub.push import progress_of
from instructft.training.fitting import FittingTrainer
from instructft.training.out_of_memory import ran_out
from instructft.training.signals import EvaluationLeft, Stop

if TYPE_CHECKING:
    from instructft.hub.background import Publisher


class LastingTrainer(FittingTrainer):
    """`SFTTrainer` whose checkpoints verify and whose resumed runs continue bit for bit.

    Args:
        identity: what the run is made of (`instructft.checkpoints.resume.identity`); written into every checkpoint.
        versions: of the libraries.
        stop: the signals to listen to.
    """

    def __init__(
        self, *, identity: Mapping[str, Any] | None = None, versions: Mapping[str, str] | None = None,
        stop: Stop | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self._identity, self.versions = identity or {}, versions or {}
        self.stop = stop or Stop()
        self.add_callback(self.stop)
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None  # upstream deletes folders of others
        self.seconds = 0.0  # of training, the part before a resume included
        self._loss_before = 0.0  # summed over the steps before a resume
        self._resumes_from: Path | None = None
        self.last_checkpoint: str | None = None
        self.publisher: Publisher | None = None  # uploads what is sealed, beside training
        self.resumes: list[dict[str, Any]] = []  # each time that the run was gone on with: from where, what had changed

    # -- going on ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train to the end or to a signal; from a checkpoint's folder where one is given."""
        self._resumes_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._began = time.perf_counter()
        with self.stop:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.seconds += time.perf_counter() - self._began
        return output

    def _run_epoch(self, **kwargs: Any) -> None:
        if self._resumes_from is not None:
            folder, self._resumes_from = self._resumes_from, None
            self._restore(folder)
        ended = self.control.should_training_stop and not self.stop.agreed  # by patience, before the resume
        if ended or self.state.global_step >= self.state.max_steps:  # upstream would train one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._resumes_from is not None:  # no epoch was left to train
            self._restore(self._resumes_from)
        return super()._finalize_training(*args, **kwargs)

    def _restore(self, folder: Path) -> None:
        known = json.loads((folder / f"progress_{self.args.process_index}.json").read_text(encoding="utf-8"))
        self._tr_loss += known["loss_since_log"]
        self._globalstep_last_logged = known["last_logged"]
        self._loss_before = known["loss"]
        self.seconds = known["seconds"]
        if step := self.state.best_global_step:  # upstream forgets it where the run's folder has another path now
            best = Path(self.args.output_dir) / f"checkpoint-{step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else self.state.best_model_checkpoint
        self.resumes = [*known["resumes"], *self.resumes]
        self.restore_counts(known["counts"])
        self.rows_at_once = known.get("rows_at_once")
        self.recent_losses, self.spikes = known["recent_losses"], known["spikes"]
        for mode, metrics in known["metrics"].items():
            for name, values in metrics.items():
                self._metrics[mode][name] = list(values)
        if known["evaluation_is_due"]:  # random states are restored after this, so it changes nothing that is trained
            self._determine_best_metric(self._evaluate(None, None), None)

    # -- saving -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self.args.output_dir)
        folder = run / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.process_index == 0:
                manifest.require_space(run, self._bytes())
                manifest.begin(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self._write_progress(folder)
            self.accelerator.wait_for_everyone()  # every process has written its files
            if self.args.process_index == 0:
                manifest.seal(folder, self._identity, self.versions)
                manifest.retain(run, self._keep, self.state.best_model_checkpoint)
                self._upload(run, folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if ran_out(error):
                raise
            why = "the disk is full" if manifest.out_of_space(error, run) else first_line(error)
            raise CheckpointError(f"{folder} could not be written: {why}; {manifest.standing(run)}") from error
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = folder.name

    def _upload(self, run: Path, folder: Path) -> None:
        if self.publisher is not None:
            tokens, loss = progress_of(folder)
            kept = [path.name for path in manifest.folders(run) if manifest.kind(path) == "sealed"]
            self.publisher.checkpoint_sealed(folder, self.state.global_step, tokens, loss, kept)

    def _write_progress(self, folder: Path) -> None:
        metrics = {mode: {name: list(map(float, values)) for name, values in found.items()}
                   for mode, found in self._metrics.items()}  # fmt: skip
        known = {
            "loss_since_log": float(self._tr_loss),
            "last_logged": self._globalstep_last_logged,
            "loss": self._loss_before + self._total_loss_scalar,
            "seconds": self.seconds + time.perf_counter() - self._began,
            "resumes": self.resumes,
            "counts": self.counts(),
            "rows_at_once": self.rows_at_once,
            "recent_losses": self.recent_losses,
            "spikes": self.spikes,
            "metrics": metrics,
            "evaluation_is_due": self.stop.left_evaluation,
        }
        path = folder / f"progress_{self.args.process_index}.json"
        path.write_text(json.dumps(known), encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `from_pretrained` wants it. Every process must call; the first one writes."""
        if not self.is_fsdp2:
            super().save_model(output_dir, _internal_call)
            return
        # upstream saves nothing where checkpoints are in shards (transformers 5.23), and of an adapter gathers the base
        self._save(output_dir or self.args.output_dir, state_dict=_gathered(self.model))

    @property
    def is_fsdp2(self) -> bool:
        """Whether each process holds a part of every weight only (FSDP, version 2)."""
        return bool(self.is_fsdp_enabled and self.accelerator.is_fsdp2)

    def _bytes(self) -> int:
        """About what a checkpoint takes on the disk, the parts of all processes together."""
        model = self.accelerator.unwrap_model(self.model)
        saved = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
        saved *= 2 if self.is_fsdp_enabled else 1  # accelerate's own files, and the one for `from_pretrained`
        states = getattr(self.optimizer, "state", {}) if self.optimizer is not None else {}
        tensors = [t for state in states.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in [*saved, *tensors]) + (1 << 20)

    # -- signals ----------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; random states stay as they are, so that how often one looks changes nothing that is trained."""
        device = self.args.device  # merely to iterate over a data loader draws a number
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=_kind(device)):
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
        try:
            found: dict[str, float] = super()._evaluate(*args, **kwargs)
            return found
        except EvaluationLeft:
            self.stop.left_evaluation = True
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return bool(metrics) and bool(super()._determine_best_metric(metrics=metrics, trial=trial))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; the mean loss of a run counts the steps before a resume too, and is told at its end only."""
        if "train_loss" in logs:
            if self.stop.agreed:
                return
            steps = max(self.state.global_step, 1)
            logs["train_loss"] = (self._loss_before + self._total_loss_scalar) / steps
        super().log(logs, *args, **kwargs)


def _gathered(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are saved of a model under FSDP2, whole, on the first process; on the others nothing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    adapter = hasattr(model, "peft_config")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
    gathered: dict[str, torch.Tensor] = get_model_state_dict(model, options=options)
    if not adapter:  # once gathered, tied weights no longer look like one
        names: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if names.setdefault(id(tensor), name) != name:
                gathered.pop(name, None)
    return gathered


def _kind(device: torch.device) -> str:
    return device.type if device.type != "cpu" else "cuda"  # the CPU's own state is always kept
