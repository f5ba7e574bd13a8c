"""When memory runs out in training: what held it, and the recipe keys that would help most, with values for this run.

A system that is short of memory also kills processes that load rows: that one has ended is told here as well.

Weights, gradients and the optimizer's state are counted from the model and the optimizer at hand; activations are what
remains of the peak. What a key would save is reckoned from these, so that the first key named is the one to try first.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

# all of it now: when memory has run out is no time to import
from instructft.checkpoints.manifest import standing
from instructft.errors import InstructftError, OutOfMemoryError
from instructft.formatting import first_line, memory_size
from instructft.models.fake_step import Batch, activation_bytes
from instructft.models.memory import optimizer_bytes, resident
from instructft.weights.float32_copies import in_float32

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe
    from instructft.weights.float32_copies import Float32Copies

# How the allocators of CUDA, HIP, XPU, MPS, cuBLAS, cuDNN and the CPU say it, where they raise a plain RuntimeError.
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "_STATUS_ALLOC_FAILED")
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_LOADER = re.compile(r"DataLoader worker \(pid.*?(killed by signal: \w+|exited unexpectedly(?: with exit code \d+)?)")
_KEYS = 3  # named at most
_ROUND = 64  # tokens; `data.max_length` is proposed in multiples of it


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device.

    >>> ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def explained(recipe: Recipe, trainer: Any) -> Iterator[None]:
    """Turn an error of memory, or of a process that loads rows, into one message; every other error passes through.

    Args:
        trainer: an `instructft.training.trainer.Trainer`.

    Raises:
        OutOfMemoryError: what was being done, what held the memory, and what to change.
        InstructftError: a process that loads rows has ended; what stands, and what to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if ended := _loader_ended(error):
            raise InstructftError(
                f"after step {trainer.state.global_step}: a process that loads rows has ended ({ended}); "
                f"{standing(Path(trainer.args.output_dir))}. The same command resumes the run; where memory is short, "
                "have the training process load the rows, the same ones in the same order: "
                f"train.dataloader_num_workers=0 (found {trainer.args.dataloader_num_workers})"
            ) from error
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        raise OutOfMemoryError(message(recipe, trainer, error)) from error


def _loader_ended(error: BaseException) -> str:
    """How a process that loads rows has ended, where that is what an error says; else ""."""
    if found := _LOADER.search(str(error)):
        return found[1]
    # killed while it handed over what a batch's file descriptor stands for (`torch.multiprocessing.reductions`)
    places = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    handed_over = isinstance(error, ConnectionError) and {"_try_get_data", "rebuild_storage_fd"} <= places
    return first_line(error) if handed_over else ""


def message(recipe: Recipe, trainer: Any, error: BaseException) -> str:
    """The text of an `OutOfMemoryError`.

    Example::

        print(message(recipe, trainer, error))
        # step 3: memory ran out on cuda:0, with a batch of 8 × 1,024 tokens (2.0 GiB more were asked for).
        # It held weights 3.0 GiB, gradients 3.0 GiB, optimizer state 6.0 GiB, activations and the rest …
        # What would help most:
        #   train.per_device_train_batch_size=4 train.gradient_accumulation_steps=4  (about 33.2 GiB; …)
        #   …
    """
    what, shape = trainer.micro_batches.under_way
    model = trainer.accelerator.unwrap_model(trainer.model)
    held = measure(model, trainer.optimizer, trainer.args.device, trainer.copies)
    batch = f", with a batch of {shape[0]} × {shape[1]:,} tokens" if shape else ""
    asked = f" ({memory_size(more)} more were asked for)" if (more := _asked_for(str(error))) else ""
    parts = ", ".join(f"{name} {memory_size(count)}" for name, count in held.parts().items())
    rest = "activations and the rest" if trainer.args.device.type == "cuda" else "activations, libraries and the rest"
    lines = [
        f"{what}: memory ran out on {trainer.args.device}{batch}{asked}.",
        f"It held {parts}, {rest} {memory_size(held.rest)}; {held.of_how_much}.",
    ]
    keys = advice(recipe, trainer, held)
    if keys:
        lines += ["What would help most:", *(f"  {key}  ({why})" for key, why in keys)]
    else:
        lines.append("Every key that would help is set already; it takes a smaller model, or more memory")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# What held it
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Bytes on this device, in this process.

    Args:
        weights, gradients, optimizer: counted. Gradients and optimizer state are 0 where there were none yet.
        rest: what remains of the peak: activations, logits, workspaces, and on a CPU the libraries and the data.
        of_how_much: the peak and the size of the device, in words.
    """

    weights: int
    gradients: int
    optimizer: int
    rest: int
    of_how_much: str

    def parts(self) -> dict[str, int]:
        """What was counted, under the names that a person knows."""
        return {"weights": self.weights, "gradients": self.gradients, "optimizer state": self.optimizer}


def measure(model: Any, optimizer: Any, device: Any, copies: Float32Copies | None = None) -> Held:
    """Count what a model and its optimizer hold, copies too; of sharded weights, the part of this process."""
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(map(_bytes, tensors))
    gradients = sum(_bytes(p.grad) for p in model.parameters() if p.grad is not None)
    states = getattr(optimizer, "state", None) or {}
    state = sum(_bytes(copy) for _, copy in copies.pairs) if copies else 0
    state += sum(_bytes(t) for values in states.values() for t in values.values() if hasattr(t, "element_size"))
    peak, words = _peak(device)
    return Held(weights, gradients, state, max(peak - weights - gradients - state, 0), words)


def _bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def _peak(device: Any) -> tuple[int, str]:
    """The most bytes that were held at once, and what that is measured against."""
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
        held = f"at most {memory_size(peak)} in all, {memory_size(reserved)} reserved by PyTorch"
        return peak, f"{held}, of {memory_size(total)} on the GPU"
    peak = peak_of_process()
    return peak, f"at most {memory_size(peak)} in all, of {memory_size(psutil.virtual_memory().total)} of this machine"


def peak_of_process() -> int:
    """The most bytes of the machine's memory that this process has held at once."""
    if resource is None:
        return resident()
    held: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def _asked_for(text: str) -> int:
    found = _ASKED.search(text)
    return round(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


# --------------------------------------------------------------------------------------------------------------------
# What would help
# --------------------------------------------------------------------------------------------------------------------


def advice(recipe: Recipe, trainer: Any, held: Held) -> list[tuple[str, str]]:
    """(overrides, what they save) of the keys that would save most, the most first; none that is set already."""
    found = [*_smaller_batches(recipe, trainer, held), *_smaller_model(recipe, trainer, held)]
    found.sort(key=lambda entry: -entry[0])  # stable: of equals, those come first that change nothing that is learned
    return [(keys, f"about {memory_size(saved)}; {why}") for saved, keys, why in found[:_KEYS] if saved > 0]


def _smaller_batches(recipe: Recipe, trainer: Any, held: Held) -> Iterator[tuple[float, str, str]]:
    args, train = trainer.args, recipe.train
    what, shape = trainer.micro_batches.under_way
    if not shape:
        return
    now, recomputed = activations(trainer, shape)
    if args.device.type == "cuda":
        recomputed *= max(held.rest / max(now, 1), 1)
        now = max(held.rest, now)
    if what == "validation":
        rows = args.per_device_eval_batch_size
        if rows > 1:
            key = f"train.per_device_eval_batch_size={rows // 2}"
            yield now * (1 - (rows // 2) / rows), key, "the same validation loss"
    else:
        rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        if rows > 1 and trainer.micro_batches.rows_at_once is None:
            fewer = next(n for n in range(rows // 2, 0, -1) if rows % n == 0)  # the step keeps its rows
            key = f"train.per_device_train_batch_size={fewer}"
            if not train.get("tokens_per_step"):
                key += f" train.gradient_accumulation_steps={accumulation * rows // fewer}"
            yield now * (1 - fewer / rows), key, "the same rows in a step"
        if not args.gradient_checkpointing:
            yield now - recomputed, "train.gradient_checkpointing=true", "the same gradients, a fifth slower or more"
    shorter = math.ceil(shape[1] / 2 / _ROUND) * _ROUND
    if shorter < shape[1]:
        yield now * (1 - shorter / shape[1]), f"data.max_length={shorter}", "longer rows are cut"


def _smaller_model(recipe: Recipe, trainer: Any, held: Held) -> Iterator[tuple[float, str, str]]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    shards = trainer.args.world_size if trained and hasattr(trained[0], "to_local") else 1
    copies = recipe.train["float32_copies"]
    moved = in_float32(trained) if copies else trained
    gradients = sum(map(_bytes, trained))
    optimizer = optimizer_bytes(str(trainer.args.optim), moved)[0] / shards  # as it is after the first step
    if recipe.model.name_or_path is not None and recipe.adapter.type == "none":
        key = "adapter.type=lora" + (" train.float32_copies=false" if copies else "")
        yield gradients + optimizer, key, "a small adapter is trained, and the model stays as it is"
    if recipe.adapter.type != "none" and recipe.model.quantization == "none" and _installed("bitsandbytes"):
        element = max(p.element_size() for p in model.parameters())
        yield held.weights * (1 - 0.5625 / element), "model.quantization=4bit", "the frozen weights are rounded"
    adamw = str(trainer.args.optim).rpartition(".")[2].lower() in ("adamw_torch", "adamw_torch_fused")
    if adamw and not copies and trainer.args.device.type == "cuda" and _installed("bitsandbytes"):
        yield optimizer * 0.75, "train.optim=adamw_8bit", "AdamW with its state in 8 bits"


def activations(trainer: Any, shape: tuple[int, ...]) -> tuple[float, float]:
    """Bytes of activations of a batch of this shape by formula, as it is run now, and with checkpointing."""
    args = trainer.args
    element = 2 if args.bf16 or args.fp16 else 4
    batch = Batch(shape[0], math.prod(shape[1:]), 0)
    config = trainer.accelerator.unwrap_model(trainer.model).config
    recomputed = activation_bytes(config, batch, element, checkpointing=True)
    return (recomputed if args.gradient_checkpointing else activation_bytes(config, batch, element)), recomputed


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
