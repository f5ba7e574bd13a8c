"""What a run will need before it starts: parameters, memory by part, steps and time. No weight is loaded or made.

The model is built of tensors without storage (PyTorch's `FakeTensorMode`), one training step is run through it, and a
ledger notes which tensors live at the same time. So the figure follows the architecture at hand: its attention, its
dropout (which on a CPU makes sdpa keep all scores), checkpointing, autocast, LoRA. What no ledger sees is added: the
optimizer's state, the output head, the framework, the allocator.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.encode import IGNORE_INDEX
from instructft.errors import UsageError
from instructft.pack import flat
from instructft.schedule import duration, steps

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from trl import SFTConfig

    from instructft.data import Prepared
    from instructft.recipe import Recipe

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

# Measured by benchmarks/memory_estimate.py on Linux: what the first steps touch of torch and its libraries, and the
# share that glibc does not give back (it keeps freed blocks below 32 MiB, and new ones do not always fit the holes).
_CPU_RUNTIME, _CPU_ALLOCATOR = 50 * MIB, 0.07
# Assumed, not measured: CUDA's context with cuBLAS's workspaces, and what the caching allocator cannot use.
_CUDA_RUNTIME, _CUDA_ALLOCATOR = 600 * MIB, 0.05


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run, which decides its memory.

    Args:
        rows: rows (packs) on one device at a time, B.
        width: tokens of the longest row, T.
        supervised: positions of the B longest rows that carry loss.
        packed: rows are packs, with `position_ids`.
    """

    rows: int
    width: int
    supervised: int
    packed: bool = False


@dataclass(frozen=True)
class Step:
    """Bytes that live during one training step of the backbone, beside its weights.

    Args:
        activations: at most, gradients of weights not counted.
        together: at most, all at the same time; gradients arrive while activations go.
        traced: False where the architecture could not be traced and a formula stands in.
    """

    activations: int
    together: int
    traced: bool = True


def estimate(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    args: SFTConfig,
    *,
    device: str | None = None,
    processes: int = 1,
    tokens_per_second: float | None = None,
    base: int | None = None,
) -> dict[str, Any]:
    """Parameters, bytes on each device by part, steps, and time.

    Args:
        args: what `instructft.train.training_arguments` gives.
        device: "cpu" or "cuda"; default: the one that training would take here.
        processes: devices that train together, each with a whole copy of the model (DDP).
        tokens_per_second: of all processes together; default: what the last run of this recipe did.
        base: bytes that a process holds before the model is there; default: what this one holds now.

    >>> estimate(recipe, tokenizer, data, args)["parameters"]
    {'all': 590336, 'trainable': 590336}
    """
    device = device or args.device.type
    accumulation = args.gradient_accumulation_steps
    batch = largest_batch(data, args.per_device_train_batch_size, args.pad_to_multiple_of or 1)
    schedule = steps(data, args, processes)
    model = memory(recipe, tokenizer, batch, args, device, accumulation > 1, processes, base)
    return {**model, "schedule": schedule, "time": duration(recipe, schedule, processes, tokens_per_second)}


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


def largest_batch(data: Prepared, rows: int, multiple: int = 1) -> Batch:
    """The batch of the longest rows, which `group_by_length` puts together and any order can meet.

    >>> largest_batch(data, rows=8)
    Batch(rows=8, width=45, supervised=76, packed=False)
    """
    train = data.splits["train"]
    columns, starts, lengths = flat(train)
    longest = np.argsort(-lengths, kind="stable")[:rows]
    carries = np.concatenate(([0], np.cumsum(columns["labels"] != IGNORE_INDEX)))
    supervised = int((carries[starts + lengths] - carries[starts])[longest].sum())
    width = math.ceil(int(lengths.max()) / multiple) * multiple
    return Batch(min(rows, len(train)), width, supervised, "seq_lengths" in train.column_names)


def memory(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    args: SFTConfig,
    device: str,
    accumulates: bool = False,
    processes: int = 1,
    base: int | None = None,
) -> dict[str, Any]:
    """`parameters`, `memory` (bytes on one device, by part) and `host_memory` (bytes of one process)."""
    import torch

    dtype = torch.float32 if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    model, config = skeleton(recipe, tokenizer, dtype, device)
    with _storageless():
        _pretend(model)
        parameters = list(model.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        counts = {"all": sum(p.numel() for p in parameters), "trainable": sum(p.numel() for p in trainable)}
        head = model.get_output_embeddings().weight
        step = one_step(model, config, batch, args)
        weights = sum(map(_nbytes, parameters)) + sum(map(_nbytes, model.buffers()))
        weights -= _saved_by_quantization(model, recipe.model.quantization)
        gradients = sum(map(_nbytes, trainable))
        optimizer, known = optimizer_bytes(str(args.optim), trainable)
        logits = head_bytes(head.shape, head.requires_grad, batch.supervised, device)
    cpu = device == "cpu"
    communication = gradients if processes > 1 else 0  # DDP's buckets
    needed = weights + optimizer + logits + communication
    # glibc keeps what is freed in small blocks, so on a CPU gradients and activations do not take turns
    needed += gradients + step.activations if cpu or accumulates else max(step.together, gradients)
    base = resident() if base is None else base
    framework = base + _CPU_RUNTIME if cpu else _CUDA_RUNTIME
    allocator = round(needed * (_CPU_ALLOCATOR if cpu else _CUDA_ALLOCATOR))
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": step.activations,
        "head": logits,
        "communication": communication,
        "allocator": allocator,
        "framework": framework,
        "total": needed + allocator + framework,
    }
    # a model that moves to a GPU is read into the memory of its process first
    host = parts["total"] if cpu else base + weights
    return {
        "device": device,
        "parameters": counts,
        "memory": parts,
        "host_memory": {"process": host, "processes": processes, "total": host * processes},
        "batch": {"rows": batch.rows, "width": batch.width, "supervised_tokens": batch.supervised},
        "exact": {"activations": step.traced, "optimizer": known},
    }


def skeleton(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, dtype: Any, device: str
) -> tuple[Any, PretrainedConfig]:
    """The model that a run would train, adapter included, on PyTorch's meta device: all shapes, no numbers."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from instructft.models import load_config

    config = copy.deepcopy(load_config(recipe, tokenizer))
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))  # the embeddings grow by the template's own tokens
    attention = recipe.model.attn_implementation
    if device != "cpu" and attention != "eager":  # fused kernels draw dropout inside; a CPU's sdpa has none that do
        for name in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"):
            if hasattr(text, name):
                setattr(text, name, 0.0)
    chosen = {"auto": None, "eager": "eager"}.get(attention, "sdpa")  # flash-attention keeps what fused sdpa keeps
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=chosen)
        if recipe.adapter.type == "lora":
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(task_type="CAUSAL_LM", **recipe.adapter.peft_kwargs())
            try:
                model = get_peft_model(model, lora, low_cpu_mem_usage=True)
            except (ValueError, NotImplementedError) as error:  # no module of such a name, a layer that takes no LoRA
                raise UsageError(f"adapter: {error}") from error
    return model.train(), config


def _pretend(model: Any) -> None:
    """Let a model's tensors say that they are on the CPU; under `_storageless` that takes no memory."""
    import torch

    made: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None:
                continue
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if name in module._parameters else new
            (module._parameters if name in module._parameters else module._buffers)[name] = made[id(old)]


def one_step(model: Any, config: PretrainedConfig, batch: Batch, args: SFTConfig) -> Step:
    """Run one step of the backbone through a ledger; where that is impossible, `activation_bytes` stands in."""
    import torch

    from instructft.ledger import Ledger

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    checkpointing = bool(args.gradient_checkpointing)
    try:
        backbone = model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if hasattr(model, "get_base_model"):
                model.enable_input_require_grads()
        inputs: dict[str, Any] = {"input_ids": torch.zeros(batch.rows, batch.width, dtype=torch.long)}  # (B, T)
        if batch.packed:
            inputs["position_ids"] = torch.arange(batch.width)[None].expand(batch.rows, -1)
        ledger = Ledger([*model.parameters(), *model.buffers()])
        with ledger:
            with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
                hidden = backbone(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
            hidden.backward(torch.ones_like(hidden))
            del hidden
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return Step(ledger.peak(without=gradients), ledger.peak())
    except (RuntimeError, TypeError, NotImplementedError, AttributeError, ValueError):
        # routing that looks at values, or a kernel without a description of its shapes
        element = dtype.itemsize if dtype else model.dtype.itemsize
        found = activation_bytes(config, batch, element, checkpointing)
        gradients = [p for p in model.parameters() if p.requires_grad]
        return Step(found, found + sum(map(_nbytes, gradients)), traced=False)


def activation_bytes(config: PretrainedConfig, batch: Batch, element: int, checkpointing: bool = False) -> int:
    """Activations of a transformer by the formula of Korthikanti et al. 2022 (arXiv:2205.05198, section 4).

    A layer keeps s·b·h·(16e + 2) bytes, and with eager attention (or sdpa's fallback) a·b·s²·(2e + 1) of scores;
    with checkpointing s·b·h·e for each layer and one layer whole. For e = 2 that is their s·b·h·(34 + 5·a·s/h).

    Args:
        element: bytes of a number, e.

    >>> activation_bytes(GPT2Config(n_layer=1, n_embd=256, n_head=4, attn_pdrop=0.0), Batch(8, 256, 0), element=2)
    17825792
    """
    text = config.get_text_config()
    b, s, h = batch.rows, batch.width, text.hidden_size
    dropout = max(
        getattr(text, n, 0.0) or 0.0 for n in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
    )
    layer = s * b * h * (16 * element + 2)
    if getattr(config, "_attn_implementation", None) == "eager" or dropout > 0:
        layer += text.num_attention_heads * b * s * s * (2 * element + 1)
    layers = text.num_hidden_layers
    return layers * s * b * h * element + layer if checkpointing else layers * layer


def head_bytes(shape: Any, trained: bool, supervised: int, device: str) -> int:
    """The output head: its gradient, hidden states that carry loss with theirs, and blocks of logits.

    On a CPU `instructft.head` scores blocks of 24 MiB in two buffers. On a GPU it is TRL's head (trl 1.16), tiles of
    4,096 tokens by 32,768 entries in float32.
    """
    vocabulary, hidden = shape
    gradient = 4 * vocabulary * hidden if trained else 0
    if device == "cpu":
        tile = 2 * min(24 * MIB, 4 * vocabulary * max(supervised, 1))
    else:
        tile = 4 * min(supervised, 4096) * min(vocabulary, 32768)
    return gradient + tile + 2 * 4 * supervised * hidden


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


def _saved_by_quantization(model: Any, quantization: str) -> int:
    """Bytes that quantized linear layers do without; embeddings, head and adapters stay as they are."""
    if quantization == "none":
        return 0
    head = model.get_output_embeddings()
    layers = [getattr(m, "base_layer", m) for name, m in model.named_modules() if "lora_" not in name]
    weights = {id(m.weight): m.weight for m in layers if type(m).__name__ in ("Linear", "Conv1D") and m is not head}
    return sum(_nbytes(w) - round(w.numel() * _QUANTIZED[quantization]) for w in weights.values())


def _nbytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def _storageless() -> Iterator[None]:
    """Tensors made here have shapes and no storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def resident() -> int:
    """Bytes of memory that this process holds now: what the libraries and the data take before a model is there."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # no /proc: macOS, Windows
        return 450 * MIB
