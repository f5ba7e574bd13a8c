"""Where the tests put their models: on the CPU, or with `INSTRUCTFT_TEST_DEVICE=cuda` on a GPU.

On a GPU the recipes of the tests train there, in float32, so that figures can be held against others that were worked
out by hand; what bfloat16 and attention kernels do is for `make gpu-check`. Tests of several processes stay on the CPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import pytest

DEVICE = os.environ.get("INSTRUCTFT_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"
of_the_cpu = pytest.mark.skipif(ON_GPU, reason="what it shows is of the CPU")


def here(recipe: str) -> str:
    """The text of a recipe that says `use_cpu: true`, for the device of the tests.

    >>> here("train: {max_steps: 2, use_cpu: true}")  # with INSTRUCTFT_TEST_DEVICE=cuda
    'train: {max_steps: 2, use_cpu: false, bf16: false}'
    """
    if not ON_GPU:
        return recipe
    recipe = re.sub(r"^( *)use_cpu: true$", r"\1use_cpu: false\n\1bf16: false", recipe, flags=re.M)
    return recipe.replace("use_cpu: true", "use_cpu: false, bf16: false")


def in_float32(*given: str) -> tuple[str, ...]:
    """Overrides of a recipe with an adapter: what is frozen is held in float32 too, on a GPU as on the CPU."""
    return (*(("model.dtype=float32",) if ON_GPU else ()), *given)


def on(model: Any, batch: Any) -> Any:
    """A tensor, or a mapping of tensors, where the model is."""
    if isinstance(batch, Mapping):
        return {name: on(model, value) for name, value in batch.items()}
    return batch.to(model.device) if hasattr(batch, "to") else batch


def apart(model: Any, other: Any, ids: Any) -> float:
    """The largest difference of a logit, both models on the device of the first, so that the same kernels work."""
    import torch

    with torch.no_grad():
        one, two = (each(on(model, ids)).logits for each in (model, other.to(model.device)))
    return float((one - two).abs().max())


def near(tolerance: float) -> float:
    """A tolerance that holds on the CPU, or what figures from two devices may differ by in float32."""
    return max(tolerance, 2e-4) if ON_GPU else tolerance
