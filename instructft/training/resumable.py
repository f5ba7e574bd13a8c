"""What makes a run resumable: checkpoints that are sealed, and all that a resumed run must know.

Upstream's checkpoint holds weights, optimizer, schedule, random states and the trainer's state. What it leaves out, and
what a resumed run would lose: the losses since the last log, the tokens counted so far, the time spent, and an
evaluation that was due. They go into `progress_<rank>.json`, so that a resumed run logs what it would have logged.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from instructft.checkpoints import manifest
from instructft.checkpoints.background import Writes, Writing, deferred, has_room
from instructft.checkpoints.lineage import retain
from instructft.errors import CheckpointError
from instructft.formatting import first_line
from instructft.hub.push import progress_of
from instructft.training.out_of_memory import ran_out
from instructft.weights.weight_files import ADAPTER_WEIGHTS, read_header, weight_files, without_wrappers

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer


class Progress(TrainerCallback):
    """The state of a run beyond upstream's checkpoints; read back when training begins.

    It must be the last callback that hears of the beginning: an evaluation that is due is made up for then.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.seconds = 0.0  # of training, the part before a resume included
        self.loss_before = 0.0  # summed over the steps before a resume
        self.resumes: list[dict[str, Any]] = []  # each resume of the run: from where, what had changed
        self._folder: Path | None = None

    @contextlib.contextmanager
    def training(self, checkpoint: str | None) -> Iterator[None]:
        """Count the seconds; inside, training begins from the checkpoint where there is one."""
        self._folder = Path(checkpoint) if checkpoint else None
        self._began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - self._began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read back what the checkpoint holds, and evaluate if it was left before an evaluation that was due."""
        if self._folder is None:
            return
        trainer = self.trainer
        known = json.loads((self._folder / f"progress_{args.process_index}.json").read_text(encoding="utf-8"))
        trainer._tr_loss += known["loss_since_log"]
        trainer._globalstep_last_logged = known["last_logged"]
        self.loss_before = known["loss"]
        self.seconds = known["seconds"]
        if step := state.best_global_step:  # upstream forgets it where the run's folder has another path now
            best = Path(args.output_dir) / f"checkpoint-{step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else state.best_model_checkpoint
        self.resumes = [*known["resumes"], *self.resumes]
        trainer.counts = tuple(known["counts"])
        trainer.budget.restore(known.get("budget", {}))
        if trainer.judge is not None:
            trainer.judge.restore(known.get("judge") or {})
        trainer.micro_batches.rows_at_once = known.get("rows_at_once")
        trainer.step_checks.recent_losses, trainer.step_checks.spikes = known["recent_losses"], known["spikes"]
        trainer.step_checks.since_log = known.get("since_log", {})  # older checkpoints have it under `metrics`
        for mode, metrics in known["metrics"].items():
            for name, values in metrics.items():
                trainer._metrics[mode][name] = list(values)
        if trainer.history is not None:
            rows = self._folder / f"rows_{args.process_index}.npz"
            trainer.history.since = state.global_step  # of an older version, or of a run that kept none
            if rows.is_file():
                with np.load(rows) as found:
                    trainer.history.restore(found)
        if known["evaluation_is_due"]:  # random states are restored after this, so it changes nothing that is trained
            trainer._determine_best_metric(trainer._evaluate(None, None), None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run, before it trains on, where a checkpoint beside it could not be written."""
        self.trainer.sealing.raise_failed()

    def restore_random_states(self, folder: Path) -> None:
        """What upstream does not restore."""
        if self.trainer.args.device.type != "mps":
            return
        known = json.loads((folder / f"progress_{self.trainer.args.process_index}.json").read_text(encoding="utf-8"))
        if "mps" in known:  # older checkpoints do not hold it
            torch.mps.set_rng_state(torch.tensor(known["mps"], dtype=torch.uint8))

    def write(self, folder: Path) -> None:
        """Add this process's file to a checkpoint."""
        trainer = self.trainer
        metrics = {mode: {name: list(map(float, values)) for name, values in found.items()}
                   for mode, found in trainer._metrics.items()}  # fmt: skip
        known = {
            "loss_since_log": float(trainer._tr_loss),
            "last_logged": trainer._globalstep_last_logged,
            "loss": self.loss_before + trainer._total_loss_scalar,
            "seconds": self.seconds + time.perf_counter() - self._began,
            "resumes": self.resumes,
            "counts": trainer.counts,
            "rows_at_once": trainer.micro_batches.rows_at_once,
            "recent_losses": trainer.step_checks.recent_losses,
            "spikes": trainer.step_checks.spikes,
            "since_log": trainer.step_checks.since_log,
            "metrics": metrics,
            "evaluation_is_due": trainer.stop.left_evaluation or trainer.budget.waiting,
            "budget": trainer.budget.state(),
            "judge": trainer.judge.state() if trainer.judge is not None else None,
            # upstream keeps the random states of CPU and CUDA, and not of a Mac's GPU (transformers 5.23)
            **({"mps": torch.mps.get_rng_state().tolist()} if trainer.args.device.type == "mps" else {}),
        }
        path = folder / f"progress_{trainer.args.process_index}.json"
        path.write_text(json.dumps(known), encoding="utf-8")
        if trainer.history is not None:
            kept: Any = trainer.history.state()
            np.savez(folder / f"rows_{trainer.args.process_index}.npz", **kept)


def renamed_on_disk(model: Any, folder: Path) -> bool:
    """Whether the whole model in a folder has tensors that are named otherwise in memory, or are parts of one there.

    So it is with experts, which are fused as they are loaded, and with most models that see or hear.
    """
    if hasattr(model, "peft_config") or (folder / ADAPTER_WEIGHTS).is_file():
        return False
    known = {without_wrappers(name) for name in model.state_dict()}
    return any(not known.issuperset(read_header(file)) for file in weight_files(folder) if file.suffix != ".bin")


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of a saved model into the one in memory, by the renaming that `from_pretrained` does.

    Upstream hands the names on the disk to `load_state_dict` as they are, and goes on without those that it does not
    find (transformers 5.23): a run would resume with the weights that it once began from.

    Raises:
        CheckpointError: what is there is not the whole model.
    """
    bare = getattr(model, "_orig_mod", model)
    try:
        saved, info = type(bare).from_pretrained(folder, dtype=bare.dtype, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"{folder} holds no weights for {', '.join(missing[:3])} ({len(missing)} in all)")
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"{folder} is not of this model: {first_line(error)}") from error


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Leave all random states as they were: Python's, numpy's, torch's on the CPU and on the device."""
    python, numpy = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    kind = device.type if device.type not in ("cpu", "mps") else "cuda"  # the CPU's own state is always kept
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if mps is not None:
                torch.mps.set_rng_state(mps)


class Sealing:
    """Makes what is saved a checkpoint that verifies, and deletes those that need not be kept.

    One is written at a time: the next, and whoever reads what is on the disk, waits for it.

    Args:
        trainer: it saves.
        identity: what the run is made of (`instructft.checkpoints.resume.identity`); written into every checkpoint.
        versions: of the libraries.
    """

    def __init__(self, trainer: Trainer, identity: Mapping[str, Any], versions: Mapping[str, str]):
        self.trainer, self.identity, self.versions = trainer, identity, versions
        self.keep, trainer.args.save_total_limit = trainer.args.save_total_limit, None  # upstream deletes others' too
        self.last: str | None = None  # the name of the last one that was sealed
        self.beside = False  # whether they are written while training goes on, by a thread
        self._told = False
        self._writing: Writing | None = None

    @contextlib.contextmanager
    def checkpoint(self, folder: Path, beside: bool = False) -> Iterator[None]:
        """Inside, every process writes its files into the folder; it is whole on the disk, and sealed, afterwards.

        Args:
            beside: training goes on at once, where it may; what becomes of the checkpoint is told by `wait`.

        Raises:
            CheckpointError: it, or the one before it, could not be written; with the checkpoint that stands.
        """
        trainer, run = self.trainer, folder.parent
        self.wait()
        first = trainer.args.process_index == 0
        with self._explained(folder):
            needed = self._bytes() if first else 0
            if first:
                manifest.require_space(run, needed)
                manifest.begin(folder)
            trainer.accelerator.wait_for_everyone()
            beside = beside and self.beside and self._room(folder, needed)
            later: Writes = []
            with deferred(folder, later) if beside else contextlib.nullcontext():
                yield
            trainer.accelerator.wait_for_everyone()
            best, step = trainer.state.best_model_checkpoint, trainer.state.global_step
            if first and not beside:
                self._seal(folder, later, best, step)
        if beside:
            self._writing = Writing(functools.partial(self._explained(folder)(self._seal), folder, later, best, step))
            return
        trainer.accelerator.wait_for_everyone()
        self.last = folder.name

    def wait(self) -> None:
        """Wait until nothing is being written; raises `CheckpointError` if that could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.wait()

    def raise_failed(self) -> None:
        """What `wait` raises, where it is known already."""
        if self._writing is not None and self._writing.failed:
            self.wait()

    def _room(self, folder: Path, needed: int) -> bool:
        """Whether host memory has room for the copy now; the first time it has not is told."""
        fits = has_room(needed)
        if not fits and not self._told:
            self._told = True
            self.trainer.say(f"{folder.name} is written while training waits: host memory has no room for a copy")
        return fits

    def _seal(self, folder: Path, later: Writes, best: str | None, step: int) -> None:
        while later:  # what is written needs its memory no more
            later.pop(0)()
        manifest.seal(folder, self.identity, self.versions)
        self.last = folder.name
        retain(folder.parent, self.keep, best, newest=step)
        self._upload(folder, step)

    @contextlib.contextmanager
    def _explained(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if ran_out(error):
                raise
            run = folder.parent
            why = "the disk is full" if manifest.out_of_space(error, run) else first_line(error)
            raise CheckpointError(f"{folder} could not be written: {why}; {manifest.standing(run)}") from error

    def _upload(self, folder: Path, step: int) -> None:
        if self.trainer.publisher is not None:
            tokens, loss = progress_of(folder)
            kept = [path.name for path in manifest.folders(folder.parent) if manifest.kind(path) == "sealed"]
            self.trainer.publisher.checkpoint_sealed(folder, step, tokens, loss, kept)

    def _bytes(self) -> int:
        """About what a checkpoint takes on the disk, the parts of all processes together."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        saved = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
        saved *= 2 if trainer.is_fsdp_enabled else 1  # accelerate's own files, and the one for `from_pretrained`
        states = getattr(trainer.optimizer, "state", {}) if trainer.optimizer is not None else {}
        tensors = [t for state in states.values() for t in state.values() if isinstance(t, torch.Tensor)]
        tensors += [copy for _, copy in trainer.copies.pairs] if trainer.copies is not None else []
        return sum(t.numel() * t.element_size() for t in [*saved, *tensors]) + (1 << 20)


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are saved of a model under FSDP2, whole, on the first process; on the others nothing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    adapter = hasattr(model, "peft_config")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
    found: dict[str, torch.Tensor] = get_model_state_dict(model, options=options)
    if not adapter:  # once gathered, tied weights no longer look like one
        names: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if names.setdefault(id(tensor), name) != name:
                found.pop(name, None)
    return found
