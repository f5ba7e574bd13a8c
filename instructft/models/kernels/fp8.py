"""Matrix products of the blocks in 8-bit floats (torchao), while a model is trained whole: float32 weights, as before.

torchao converts `nn.Linear` alone, and GPT-2 has none in its blocks: its `Conv1D` are swapped for linear layers, whose
weights lie the other way round, and every `state_dict` that is written or read in the meantime has them as they were.
So checkpoints and the final model are the ones that transformers knows, by name and by layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from instructft.errors import ModelError
from instructft.models.kernels.compiled_blocks import blocks_of

MULTIPLE = 16  # of both sizes of a weight, which the kernels want
WIDE = 2048  # below it a product is too small to earn the conversion of what goes in
_ROUTERS = ("gate", "router")  # choose experts: narrow, and a rounded choice is another expert


@dataclass(frozen=True)
class Converted:
    """What was converted.

    Args:
        layers, of: linear layers with 8-bit products, and all linear layers of the blocks.
        narrow: of the converted ones, those that are too narrow to gain much.
        emulated: on a CPU, where rounding is as on a card and speed is not.
    """

    layers: int
    of: int
    narrow: int
    emulated: bool

    def line(self) -> str:
        """For the person who started the run."""
        said = f"FP8: {self.layers} of {self.of} linear layers of the blocks; head and embeddings stay as they are"
        if self.emulated:
            return f"{said}; emulated, for there is no GPU: rounded as on one, and slower than without"
        if self.narrow:
            said += f"; {self.narrow} of them are narrower than {WIDE:,} and gain little: compare with train.fp8=false"
        return said


@contextlib.contextmanager
def fp8_products(model: nn.Module, *, emulate: bool = False) -> Iterator[Converted]:
    """Convert the linear layers of the blocks in place, and put back what was there when the block of code is left.

    Args:
        emulate: round as a card does, and multiply in float32.

    Raises:
        ModelError: no layer can be converted; the run would be one without FP8 that says it has it.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from transformers.pytorch_utils import Conv1D

    layers = [
        (parent, name, child)
        for block in blocks_of(model)
        for parent in block.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, Conv1D) and name not in _ROUTERS
    ]
    fitting = [layer for layer in layers if all(size % MULTIPLE == 0 for size in layer[2].weight.shape)]
    if not fitting:
        found = sorted({"×".join(map(str, layer[2].weight.shape)) for layer in layers})
        what = f"their linear layers are {', '.join(found[:4])}" if found else "they have no linear layers"
        raise ModelError(
            f"train.fp8: no layer of {type(model).__name__}'s blocks can be converted: {what}, and both sizes have to "
            f"be multiples of {MULTIPLE}; take train.fp8 out"
        )
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)  # tokens of a batch are padded to a multiple
    for parent, name, child in fitting:
        linear = _linear(child) if isinstance(child, Conv1D) else child
        converted = convert_to_float8_training(linear, config=config)
        converted.train(child.training)
        if isinstance(child, Conv1D):
            converted.register_state_dict_post_hook(_as_conv1d)
            converted.register_load_state_dict_pre_hook(_from_conv1d)
        setattr(parent, name, converted)
    narrow = sum(min(getattr(parent, name).weight.shape) < WIDE for parent, name, _ in fitting)
    try:
        yield Converted(len(fitting), len(layers), narrow, emulate)
    finally:
        for parent, name, child in fitting:
            converted = getattr(parent, name)
            if isinstance(child, Conv1D):
                child.weight = _like(converted.weight, converted.weight.detach().t().contiguous())
            child.train(converted.training)
            setattr(parent, name, child)


def _linear(layer: Any) -> nn.Linear:
    """A `Conv1D` as the linear layer that it is; it gives its weight away, so that there is one copy only."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = _like(layer.weight, layer.weight.detach().t().contiguous())
    linear.bias = layer.bias
    layer.weight = None
    return linear


def _like(weight: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=weight.requires_grad)


def _as_conv1d(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"].t().contiguous()


def _from_conv1d(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if f"{prefix}weight" in state:
        state[f"{prefix}weight"] = state[f"{prefix}weight"].t()
