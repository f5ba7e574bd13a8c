"""A model of shapes alone: built as the recipe says, run for one step, with no weight loaded or made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructft.adapters.lora import ADAPTERS
from instructft.weights import remote_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from trl import SFTConfig

    from instructft.recipe.schema import Recipe


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


@contextlib.contextmanager
def storageless() -> Iterator[None]:
    """Tensors made here have shapes and no storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def skeleton(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, dtype: Any, device: str
) -> tuple[Any, PretrainedConfig]:
    """The model that a run would train, adapter included, on PyTorch's meta device: all shapes, no numbers."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from instructft.models.load import load_config, new_tokens

    config = copy.deepcopy(load_config(recipe, tokenizer))
    text = config.get_text_config()
    added = new_tokens(recipe, tokenizer, text.vocab_size) if recipe.adapter.type != "none" else []
    text.vocab_size = max(text.vocab_size, len(tokenizer))  # the embeddings grow by the template's own tokens
    attention = recipe.model.attn_implementation
    if device != "cpu" and attention != "eager":  # fused kernels draw dropout inside; a CPU's sdpa has none that do
        for name in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"):
            if hasattr(text, name):
                setattr(text, name, 0.0)
    chosen = {"auto": None, "eager": "eager"}.get(attention, "sdpa")  # flash-attention keeps what fused sdpa keeps
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=chosen, **remote_code.flag())
        model = ADAPTERS[recipe.adapter.type](model, recipe, added, only_shapes=True)
    return model.train(), config


def pretend(model: Any) -> None:
    """Let a model's tensors say that they are on the CPU; under `storageless` that takes no memory."""
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


def one_step(model: Any, config: PretrainedConfig, batch: Batch, args: SFTConfig, passes: int = 1) -> Step:
    """Run one step of the backbone through a ledger; where that is impossible, `activation_bytes` stands in."""
    import torch

    from instructft.models.ledger import Ledger

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
            for _ in range(passes):  # the second one finds the gradients of the first
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
        return Step(found, found + sum(map(nbytes, gradients)), traced=False)


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


def nbytes(tensor: Any) -> int:
    """Bytes that a tensor would take."""
    return tensor.numel() * tensor.element_size()
