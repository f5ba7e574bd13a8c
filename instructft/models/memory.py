"""What a run will need before it starts: parameters, memory by part, steps and time. No weight is loaded or made.

The model is built of fake tensors, which have no storage, one training step is run through it, and what lives at the
same time is counted (`fake_step`). So the figure follows the architecture at hand: its attention, its dropout (which
on a CPU makes sdpa keep all scores), checkpointing, autocast, LoRA. What no step shows is added: the optimizer's state,
the output head, the framework, the allocator.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from instructft.adapters.lora import is_peft
from instructft.data.arrow.token_rows import tokens_of
from instructft.models.fake_step import Batch, Step, measure_step, meta_model, to_fake_cpu
from instructft.models.kernels.gpu_head import chunk_size
from instructft.models.load import weights_dtype
from instructft.prompt.loss_mask import IGNORE_INDEX
from instructft.weights.float32_copies import CAN_SUM, in_float32

if TYPE_CHECKING:
    from trl import SFTConfig

    from instructft.data.prepare import Prepared
    from instructft.models.starting_point import StartingPoint
    from instructft.recipe.schema import Recipe

# What a strategy of `instructft launch` divides among the processes; each holds the rest whole.
DIVIDED: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
    "fsdp2": ("weights", "gradients", "optimizer"),
}

MIB, GIB = 1 << 20, 1 << 30

# Bytes of optimizer state per trainable parameter: (states, bytes of each); None: as wide as the parameter.
OPTIMIZER_STATE: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"), (2, None)),
    **dict.fromkeys(("adamw_anyprecision", "stable_adamw", "schedule_free_adamw", "schedule_free_radam"), (2, None)),
    **dict.fromkeys(("adagrad", "rmsprop", "schedule_free_sgd"), (1, None)),
    **dict.fromkeys(("ademamix", "grokadamw"), (3, None)),
    **dict.fromkeys(("sgd", "lomo", "adalomo"), (0, None)),
    **dict.fromkeys(("paged_adamw_32bit",), (2, 4)),
    **dict.fromkeys(("paged_ademamix_32bit",), (3, 4)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), (1, 4)),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), (2, 1 + 4 / 256)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), (3, 1 + 4 / 256)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), (1, 1 + 4 / 256)),
    "adamw_torch_4bit": (2, 0.5 + 4 / 128),
}
# Bytes of a quantized weight with its scales: nf4 in blocks of 64, int8 by rows (bitsandbytes).
_QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}

# Measured by benchmarks/memory_estimate.py on Linux: what the first steps touch of torch and its libraries, and what
# glibc keeps, as a share of what lives in a step: it does not return freed blocks below 32 MiB, and new ones do not
# always fit the holes. (With MALLOC_MMAP_THRESHOLD_=1048576 in the environment it is near 0.)
_CPU_RUNTIME, _CPU_ALLOCATOR = 50 * MIB, 0.4
# Assumed, not measured: CUDA's context with cuBLAS's workspaces, and what the caching allocator cannot use.
_CUDA_RUNTIME, _CUDA_ALLOCATOR = 600 * MIB, 0.05


def estimate(
    recipe: Recipe,
    start: StartingPoint,
    data: Prepared,
    args: SFTConfig,
    *,
    device: str | None = None,
    processes: int = 1,
    strategy: str = "ddp",
    tokens_per_second: float | None = None,
    base: int | None = None,
) -> dict[str, Any]:
    """Parameters, bytes on each device by part, steps, and time.

    Args:
        args: what `instructft.training.arguments.training_arguments` gives.
        device: "cpu" or "cuda"; default: the one that training would take here.
        processes: devices that train together.
        strategy: what they divide among them, as in `DIVIDED`.
        tokens_per_second: of all processes together; default: what the last run of this recipe did.
        base: bytes that a process holds before the model is there; default: what this one holds now.

    Example::

        estimate(recipe, start, data, args)["parameters"]
        # {'all': 590336, 'trainable': 590336}
    """
    device = device or args.device.type
    accumulation = args.gradient_accumulation_steps
    batch = largest_batch(data, args.per_device_train_batch_size, args.pad_to_multiple_of or 1)
    schedule = steps(data, args, processes)
    model = memory(recipe, start, batch, args, device, accumulation > 1, processes, base, strategy)
    return {**model, "schedule": schedule, "time": duration(recipe, schedule, processes, tokens_per_second)}


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


def largest_batch(data: Prepared, rows: int, multiple: int = 1) -> Batch:
    """The batch of the longest rows, which `group_by_length` puts together and any order can meet.

    Example::

        largest_batch(data, rows=8)
        # Batch(rows=8, width=45, supervised=76, packed=False)
    """
    train = data.splits["train"]
    all_rows = tokens_of(train)
    longest = all_rows.some(np.argsort(-all_rows.lengths, kind="stable")[:rows])
    supervised = int((longest.flat()[0]["labels"] != IGNORE_INDEX).sum())
    width = math.ceil(int(longest.lengths[0]) / multiple) * multiple
    return Batch(min(rows, len(train)), width, supervised, "seq_lengths" in train.column_names)


def memory(
    recipe: Recipe,
    start: StartingPoint,
    batch: Batch,
    args: SFTConfig,
    device: str,
    accumulates: bool = False,
    processes: int = 1,
    base: int | None = None,
    strategy: str = "ddp",
) -> dict[str, Any]:
    """`parameters`, `memory` (bytes on one device, by part) and `host_memory` (bytes of the processes of one machine).

    A model that moves to a GPU is read into the memory of its process first, whole, whatever the strategy (see
    recipes/accelerate); where weights are divided, the first process gathers weights and optimizer state to save them.
    """
    model, config = meta_model(recipe, start, weights_dtype(recipe, device), device)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake_cpu(model)
        parameters = list(model.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        counts = {"all": sum(p.numel() for p in parameters), "trainable": sum(p.numel() for p in trainable)}
        head = getattr(model.get_output_embeddings(), "original_module", model.get_output_embeddings()).weight
        copied, optimized = recipe.train["float32_copies"], trainable
        wide = copied and processes == 1 and CAN_SUM  # gradients in float32 beside bfloat16 weights
        if copied:
            optimized = in_float32(trainable)
        for p in trainable if wide else ():
            p.grad_dtype = torch.float32
        step = measure_step(model, config, batch, args, passes=2 if accumulates else 1)
        weights = _bytes(parameters) + _bytes(model.buffers())
        weights -= _saved_by_quantization(model, recipe.model.quantization)
        gradients = _bytes(optimized if wide else trainable)
        copies = _bytes(optimized) if copied else 0
        optimizer, known = optimizer_bytes(str(args.optim), optimized)
        logits = head_bytes(head.shape, head.requires_grad, batch.supervised, device)
    gathered = 0
    if "weights" in DIVIDED[strategy] and processes > 1:
        gathered, step = _divided(recipe, start, batch, args, device, accumulates)
    cpu = device == "cpu"
    whole = weights + optimizer + copies  # what the first process gathers to save
    shares = {part: processes if part in DIVIDED[strategy] else 1 for part in ("weights", "gradients", "optimizer")}
    # gradients arrive while activations go; where micro-batches accumulate they stay
    in_step = max(step.together, gradients) if shares["gradients"] == 1 else step.activations + gradients // processes
    if copied and not wide:  # as the optimizer takes its step, they are there in float32 too
        in_step = max(in_step, gradients + copies)
    communication = gathered or (gradients if processes > 1 else 0)  # whole blocks at work, or DDP's buckets
    read, weights = weights, weights // shares["weights"]
    optimizer, gradients = optimizer // shares["optimizer"], gradients // shares["gradients"]
    needed = weights + copies + optimizer + logits + communication + in_step
    base = resident() if base is None else base
    framework = base + _CPU_RUNTIME if cpu else _CUDA_RUNTIME
    allocator = round(step.together * _CPU_ALLOCATOR if cpu else needed * _CUDA_ALLOCATOR)
    parts = {
        "weights": weights,
        **({"float32_copies": copies} if copied else {}),
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": step.activations,
        "head": logits,
        "communication": communication,
        "allocator": allocator,
        "framework": framework,
        "total": needed + allocator + framework,
    }
    host = parts["total"] if cpu else base + read
    first = host if cpu or not gathered else base + max(read, whole)
    if not cpu and processes == 1 and recipe.train["save_in_background"]:  # a checkpoint's copy
        saved = gradients if is_peft(model) else read
        first = max(first, base + saved + optimizer + copies)
    return {
        "device": device,
        "parameters": counts,
        "memory": parts,
        "host_memory": {
            "process": host,
            "first": first,
            "processes": processes,
            "total": host * (processes - 1) + first,
        },
        "batch": {"rows": batch.rows, "width": batch.width, "supervised_tokens": batch.supervised},
        "exact": {"activations": step.traced, "optimizer": known},
    }


def head_bytes(shape: Any, trained: bool, supervised: int, device: str) -> int:
    """The output head: its gradient, hidden states that carry loss with theirs, and blocks of logits.

    On a CPU `fused_loss` scores blocks of 24 MiB in two buffers. On a GPU `gpu_head` holds a chunk of logits and the
    head's weight in 16 bits.
    """
    vocabulary, hidden = shape
    gradient = 4 * vocabulary * hidden if trained else 0
    if device == "cpu":
        tile = 2 * min(24 * MIB, 4 * vocabulary * max(supervised, 1))
    else:
        tile = 2 * min(supervised, chunk_size(vocabulary)) * vocabulary + 2 * vocabulary * hidden
    return gradient + tile + 2 * 4 * supervised * hidden


def _divided(
    recipe: Recipe, start: StartingPoint, batch: Batch, args: SFTConfig, device: str, accumulates: bool
) -> tuple[int, Step]:
    """(bytes of what is gathered, the step) where weights are divided: they are gathered in the type they compute in.

    So autocast finds nothing to cast. Over whole weights in float32 it keeps a copy of each of them until its gradient
    is there.
    """
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weights_dtype(recipe, device)
    model, config = meta_model(recipe, start, half, device)
    plain: Any = SimpleNamespace(bf16=False, fp16=False, gradient_checkpointing=args.gradient_checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake_cpu(model)
        return gathered_bytes(model), measure_step(model, config, batch, plain, passes=2 if accumulates else 1)


def gathered_bytes(model: Any) -> int:
    """What FSDP2 and ZeRO-3 hold whole while they work: two blocks, and what lies outside of blocks (embeddings, head).

    Example::

        gathered_bytes(llama) / sum(p.nbytes for p in llama.parameters())  # 32 blocks
        # 0.1
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    sizes = [_bytes(block.parameters()) for block in blocks]
    outside = _bytes(model.parameters()) - sum(sizes)
    return outside + sum(sorted(sizes)[-2:])


def optimizer_bytes(name: str, trainable: list[Any]) -> tuple[int, bool]:
    """Bytes of optimizer state after the first step; False where the optimizer is unknown and AdamW stands in.

    >>> optimizer_bytes("adamw_torch", [torch.zeros(10, 10)])
    (800, True)
    """
    name = name.rpartition(".")[2].lower()  # args.optim is an enum whose text may carry its class
    if name == "adafactor":  # one number a row and one a column (arXiv:1804.04235)
        return sum(4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel())
                   for p in trainable), True  # fmt: skip
    states, width = OPTIMIZER_STATE.get(name, (2, None))
    found = sum(states * p.numel() * (p.element_size() if width is None else width) for p in trainable)
    return round(found), name in OPTIMIZER_STATE


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _saved_by_quantization(model: Any, quantization: str) -> int:
    """Bytes that quantized linear layers do without; embeddings, head and adapters stay as they are."""
    if quantization == "none":
        return 0
    head = model.get_output_embeddings()
    layers = [getattr(m, "base_layer", m) for name, m in model.named_modules() if "lora_" not in name]
    weights = {id(m.weight): m.weight for m in layers if type(m).__name__ in ("Linear", "Conv1D") and m is not head}
    return sum(w.nbytes - round(w.numel() * _QUANTIZED[quantization]) for w in weights.values())


def resident() -> int:
    """Bytes of memory that this process holds now: what the libraries and the data take before a model is there."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # no /proc: macOS, Windows
        return 450 * MIB


def return_freed() -> None:
    """Return to the system what was freed and glibc kept, so that what is loaded next does not stand on top of it.

    After training that is most of the activations (`_CPU_ALLOCATOR`). No other allocator has a call like it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


# --------------------------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------------------------


def steps(data: Prepared, args: SFTConfig, processes: int = 1) -> dict[str, Any]:
    """Steps of a run, with rows and tokens of each, as `transformers.Trainer` counts them."""
    rows, tokens = len(data.splits["train"]), data.tokens["train"]
    share = math.floor if args.dataloader_drop_last else math.ceil
    batches = share(share(rows / args.per_device_train_batch_size) / processes)  # of one process in one epoch
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    count = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return {
        "rows": rows,
        "tokens": tokens,
        "steps": count,
        "steps_per_epoch": per_epoch,
        "epochs": count / per_epoch,
        "rows_per_step": rows_per_step,
        "tokens_per_step": round(tokens / per_epoch),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": processes,
        "total_tokens": round(tokens * count / per_epoch),
    }


def duration(recipe: Recipe, schedule: dict[str, Any], processes: int, given: float | None) -> dict[str, Any]:
    """Seconds of training, from a given speed or the last run of this recipe on as many processes."""
    speed, source = given, "given"
    if speed is None:
        speed, source = last_speed(recipe, processes)
    seconds = schedule["total_tokens"] / speed if speed else None
    return {"tokens_per_second": speed, "source": source if speed else None, "seconds": seconds}


def last_speed(recipe: Recipe, processes: int) -> tuple[float | None, str]:
    """Tokens per second of the newest run of a recipe of this name beside `output_dir`, and its `run.json`."""
    found = sorted(Path(recipe.output_dir).parent.glob("*/run.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    title = f"# {' '.join(recipe.name.split())}:"  # the first line of a run's recipe.yaml names the recipe
    for path in found:
        try:
            with path.with_name("recipe.yaml").open(encoding="utf-8") as file:
                same = file.readline().startswith(title)
            facts = json.loads(path.read_text(encoding="utf-8"))
            if same and facts["hardware"]["processes"] == processes:
                return float(facts["train"]["tokens_per_second"]), str(path)
        except (OSError, ValueError, KeyError, TypeError):  # of another version, or cut off
            continue
    return None, ""
