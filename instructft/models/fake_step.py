"""What one training step of a model needs in memory, measured on fake tensors: no weight is loaded or made."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instructft.adapters.lora import ADAPTERS, is_peft
from instructft.models.kernels.activations import fuse_activations
from instructft.weights import remote_code
from instructft.weights.model_class import auto_class, freeze_named, freeze_towers
from instructft.weights.model_class import backbone as text_backbone

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from trl import SFTConfig

    from instructft.models.starting_point import StartingPoint
    from instructft.recipe.schema import Recipe

_DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")


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


class MemoryTracker(TorchDispatchMode):
    """Notes each new storage when an operation makes it, and when the last tensor on it goes.

    Works on real tensors as on those of `FakeTensorMode`. A view adds nothing; two tensors on one storage count once.

    >>> with MemoryTracker([]) as tracker:
    ...     x = torch.ones(10)
    ...     y = x + 1
    ...     del x
    >>> tracker.peak(), tracker.peak(without=[y])
    (80, 40)

    Args:
        known: tensors that are there before, and are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        # storages are compared by identity, and looked at no longer than they live
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._numbers[tensor.untyped_storage()] = -1
        self._entries: list[tuple[int, int]] = []  # (number of the storage, bytes: more than 0 made, less freed)
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._numbers:
            return
        number, size = self._next, storage.nbytes()
        self._next += 1
        self._numbers[storage] = number
        self._entries.append((number, size))
        weakref.finalize(storage, self._entries.append, (number, -size))

    def peak(self, without: Iterable[torch.Tensor] = ()) -> int:
        """The most bytes that lived at the same time, those of some tensors left out."""
        left_out = {self._numbers.get(tensor.untyped_storage()) for tensor in without}
        live = most = 0
        for number, size in self._entries:
            if number not in left_out:
                live += size
                most = max(most, live)
        return most


def meta_model(recipe: Recipe, start: StartingPoint, dtype: torch.dtype, device: str) -> tuple[Any, PretrainedConfig]:
    """The model that a run would train, adapter included, on PyTorch's meta device: all shapes, no numbers."""
    config = copy.deepcopy(start.config)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, start.tokens)  # the embeddings grow by the template's own tokens
    attention = recipe.model.attn_implementation
    if device != "cpu" and attention != "eager":  # fused kernels draw dropout inside; a CPU's sdpa has none that do
        for name in _DROPOUTS:
            if hasattr(text, name):
                setattr(text, name, 0.0)
    chosen = {"auto": None, "eager": "eager"}.get(attention, "sdpa")  # flash-attention keeps what fused sdpa keeps
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=chosen, **remote_code.flag())
        freeze_towers(model)
        freeze_named(model, recipe.model.freeze or ())
        fuse_activations(model)  # as `load_model` does: it keeps a third of what GPT-2's own would
        model = ADAPTERS[recipe.adapter.type](model, recipe, start.new_tokens, only_shapes=True)
    return model.train(), config


def to_fake_cpu(model: Any) -> None:
    """Put fake tensors on the CPU in the place of a model's own; under `FakeTensorMode` that takes no memory."""
    made: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    trained = tensors is module._parameters
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if trained else new
                if old is not None:
                    tensors[name] = made[id(old)]


def measure_step(model: Any, config: PretrainedConfig, batch: Batch, args: SFTConfig, passes: int = 1) -> Step:
    """Run one step of the backbone and follow its memory; where that is impossible, `activation_bytes` stands in."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    checkpointing = bool(args.gradient_checkpointing)
    try:
        backbone = text_backbone(model.get_base_model() if is_peft(model) else model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if is_peft(model):
                model.enable_input_require_grads()
        inputs: dict[str, Any] = {"input_ids": torch.zeros(batch.rows, batch.width, dtype=torch.long)}  # (B, T)
        if batch.packed:
            inputs["position_ids"] = torch.arange(batch.width)[None].expand(batch.rows, -1)
        with MemoryTracker([*model.parameters(), *model.buffers()]) as tracker, _without_tracebacks():
            for _ in range(passes):  # the second one finds the gradients of the first
                with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
                    hidden = backbone(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
                hidden.backward(torch.ones_like(hidden))
                del hidden
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return Step(tracker.peak(without=gradients), tracker.peak())
    except (RuntimeError, TypeError, NotImplementedError, AttributeError, ValueError):
        # routing that looks at values, or a kernel without a description of its shapes
        found = activation_bytes(config, batch, (dtype or model.dtype).itemsize, checkpointing)
        return Step(found, found + sum(p.nbytes for p in model.parameters() if p.requires_grad), traced=False)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """What torch cannot trace it also logs as an error, with 22 lines; here that is no trouble (torch 2.13)."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def activation_bytes(config: PretrainedConfig, batch: Batch, element: int, checkpointing: bool = False) -> int:
    """Activations of a transformer by the formula of Korthikanti et al. 2022 (arXiv:2205.05198, section 4).

    A layer keeps s·b·h·(16e + 2) bytes, and with eager attention (or sdpa's fallback) a·b·s²·(2e + 1) of scores;
    with checkpointing s·b·h·e for each layer and one layer whole. For e = 2 that is their s·b·h·(34 + 5·a·s/h).

    Args:
        element: bytes of a number, e.

    Example::

        activation_bytes(GPT2Config(n_layer=1, n_embd=256, n_head=4, attn_pdrop=0.0), Batch(8, 256, 0), element=2)
        # 17825792
    """
    text = config.get_text_config()
    b, s, h = batch.rows, batch.width, text.hidden_size
    dropout = max(getattr(text, name, 0.0) or 0.0 for name in _DROPOUTS)
    layer = s * b * h * (16 * element + 2)
    if getattr(config, "_attn_implementation", None) == "eager" or dropout > 0:
        layer += text.num_attention_heads * b * s * s * (2 * element + 1)
    layers = text.num_hidden_layers
    return layers * s * b * h * element + layer if checkpointing else layers * layer
