"""Activations in one kernel: GELU that transformers writes out in several steps, by torch's own GELU instead.

`gelu_new` of GPT-2 and its kin is eight kernels, each of which reads and writes a tensor four times as wide as the
model; under autocast its power raises them to float32. The function is the same, and so are its name in the
configuration, the `state_dict` and what is saved: what changes is the module that computes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# What torch has in one kernel, as its `approximate`. The rest of transformers' activations are one kernel already, or
# no function of torch (QuickGELU, squared ReLU, Laplace, clipped GELU).
_WRITTEN_OUT = {
    "transformers.activations.NewGELUActivation": "tanh",
    "transformers.activations.FastGELUActivation": "tanh",
    "transformers.activations.AccurateGELUActivation": "tanh",
    "transformers.models.bloom.modeling_bloom.BloomGelu": "tanh",
}
# Written out only where the configuration says so (`gelu_python`, `gelu_python_tanh`), by the method that they call.
_BY_METHOD = {"_gelu_python": "none", "_gelu_tanh_python": "tanh"}


def fuse_activations(model: nn.Module) -> int:
    """Give each written-out GELU of a model, or of what PEFT made of it, torch's kernel; returns how many it were.

    >>> from torch import nn
    >>> from transformers.activations import NewGELUActivation
    >>> model = nn.Sequential(nn.Linear(2, 2), NewGELUActivation())
    >>> fuse_activations(model), model[1]
    (1, GELU(approximate='tanh'))
    """
    from torch import nn

    fused = 0
    for parent in model.modules():
        for name, child in parent._modules.items():
            approximate = _approximate(child)
            if approximate is not None:
                setattr(parent, name, nn.GELU(approximate).train(child.training))
                fused += 1
    return fused


def _approximate(module: nn.Module | None) -> str | None:
    """torch's name for the GELU that a module writes out; None for any other module."""
    if module is None or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None  # somebody's own forward or hooks (accelerate's, a kernel from the Hub) would be lost
    kind = type(module)
    if found := _WRITTEN_OUT.get(f"{kind.__module__}.{kind.__qualname__}"):
        return found
    if kind.__module__ == "transformers.activations":
        return _BY_METHOD.get(getattr(getattr(module, "act", None), "__name__", ""))
    return None
