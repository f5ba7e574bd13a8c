"""What a resumed run must know, and checkpoints that are sealed: the parts of saving that upstream leaves out.

Upstream's checkpoint holds weights, optimizer, schedule, random states and the trainer's state. What a resumed run
would lose: the losses since the last log, the tokens counted so far, the time spent, and an evaluation that was due.
They go into `progress_<rank>.json`, so that a resumed run logs what it would have logged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from instructft.checkpoints import manifest
from instructft.errors import CheckpointError
from instructft.formatting import first_line
from instructft.hub.push import progress_of
from instructft.training.out_of_memory import ran_out

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer


def save_sealed(trainer: Trainer, write: Callable[[], Any], keep: int | None) -> str:
    """Write a checkpoint whose manifest comes last, remove old ones beyond `keep`, and hand it to the uploads.

    Every process must call. Returns the folder's name.

    Args:
        write: writes upstream's part.

    Raises:
        CheckpointError: it could not be written; the one before it stands.
    """
    run, first = Path(trainer.args.output_dir), trainer.args.process_index == 0
    folder = run / f"checkpoint-{trainer.state.global_step}"
    try:
        if first:
            manifest.require_space(run, _bytes(trainer))
            manifest.begin(folder)
        trainer.accelerator.wait_for_everyone()
        write()
        path = folder / f"progress_{trainer.args.process_index}.json"
        path.write_text(json.dumps(_progress(trainer)), encoding="utf-8")
        trainer.accelerator.wait_for_everyone()  # every process has written its files
        if first:
            manifest.seal(folder, trainer.identity, trainer.versions)
            manifest.retain(run, keep, trainer.state.best_model_checkpoint)
            if trainer.publisher is not None:
                tokens, loss = progress_of(folder)
                kept = [path.name for path in manifest.folders(run) if manifest.kind(path) == "sealed"]
                trainer.publisher.checkpoint_sealed(folder, trainer.state.global_step, tokens, loss, kept)
    except (OSError, RuntimeError, SafetensorError) as error:
        if ran_out(error):
            raise
        why = "the disk is full" if manifest.out_of_space(error, run) else first_line(error)
        raise CheckpointError(f"{folder} could not be written: {why}; {manifest.standing(run)}") from error
    trainer.accelerator.wait_for_everyone()
    return folder.name


def _progress(trainer: Trainer) -> dict[str, Any]:
    metrics = {mode: {name: list(map(float, values)) for name, values in found.items()}
               for mode, found in trainer._metrics.items()}  # fmt: skip
    return {
        "loss_since_log": float(trainer._tr_loss),
        "last_logged": trainer._globalstep_last_logged,
        "loss": trainer.loss_before + trainer._total_loss_scalar,
        "seconds": trainer.seconds + time.perf_counter() - trainer.began,
        "resumes": trainer.resumes,
        "counts": trainer.counts(),
        "rows_at_once": trainer.rows.found,
        "recent_losses": trainer.checks.recent_losses,
        "spikes": trainer.checks.spikes,
        "metrics": metrics,
        "evaluation_is_due": trainer.stop.left_evaluation,
    }


def restore(trainer: Trainer, folder: Path) -> bool:
    """Put back what `save_sealed` wrote; whether an evaluation is due, which the run that was stopped left out."""
    known = json.loads((folder / f"progress_{trainer.args.process_index}.json").read_text(encoding="utf-8"))
    trainer._tr_loss += known["loss_since_log"]
    trainer._globalstep_last_logged = known["last_logged"]
    trainer.loss_before = known["loss"]
    trainer.seconds = known["seconds"]
    state = trainer.state
    if step := state.best_global_step:  # upstream forgets it where the run's folder has another path now
        best = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else state.best_model_checkpoint
    trainer.resumes = [*known["resumes"], *trainer.resumes]
    trainer.restore_counts(known["counts"])
    trainer.rows.found = known.get("rows_at_once")
    trainer.checks.recent_losses, trainer.checks.spikes = known["recent_losses"], known["spikes"]
    for mode, metrics in known["metrics"].items():
        for name, values in metrics.items():
            trainer._metrics[mode][name] = list(values)
    return bool(known["evaluation_is_due"])


def _bytes(trainer: Trainer) -> int:
    """About what a checkpoint takes on the disk, the parts of all processes together."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    saved = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
    saved *= 2 if trainer.is_fsdp_enabled else 1  # accelerate's own files, and the one for `from_pretrained`
    states = getattr(trainer.optimizer, "state", {}) if trainer.optimizer is not None else {}
    tensors = [t for state in states.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in [*saved, *tensors]) + (1 << 20)


def gathered(model: Any) -> dict[str, torch.Tensor]:
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
