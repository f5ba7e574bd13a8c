"""Merged weights against PEFT's own merge, value by value, and the size of the rounding that storing them costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from instructft.errors import ModelError
from instructft.tensors import Stored, pieces

if TYPE_CHECKING:
    import torch

    from instructft.merge_plan import Plan

FLOOR = 1e-5  # of a tensor's largest weight: what float32 arithmetic in another order may do


def compare_weights(live: Any, plan: Plan, files: Mapping[str, Stored]) -> dict[str, Any]:
    """Hold each merged tensor on disk against what PEFT's merge has made of it in `live`.

    Raises:
        ModelError: a value is further away than rounding to its dtype explains.
    """
    import torch

    compared = 0
    for name, weight in _weights(live):
        if name not in plan.changed:
            continue
        stored = files[plan.changed[name]]
        largest = float(weight.abs().max())
        # in a low precision PEFT rounds the delta and the sum
        units = 0.51 if weight.dtype == torch.float32 else 2.0
        for start, stop in pieces(stored.rows, stored.width):
            ours = stored.read(start, stop).float()
            theirs = weight[start:stop].float().cpu()
            allowed = units * unit_in_last_place(theirs, stored.dtype) + FLOOR * largest
            if not bool(((ours - theirs).abs() <= allowed).all()):
                raise ModelError(
                    f"{stored.name} is not merged as PEFT merges it: a value differs by "
                    f"{float((ours - theirs).abs().max()):.3g}, and the largest weight in it is {largest:.3g}. "
                    "Nothing was kept"
                )
        compared += 1
    if compared < len(plan.changed):
        raise ModelError(f"{len(plan.changed) - compared} merged tensors were not found in PEFT's model")
    return {"tensors": compared}


def unit_in_last_place(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at each value.

    >>> unit_in_last_place(torch.tensor([1.0, 3.0]), torch.bfloat16)
    tensor([0.0078, 0.0156])
    """
    import torch

    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def jitter(live: Any, plan: Plan) -> None:
    """Move each weight that the merge rounded by a random amount of up to half a unit in its last place."""
    import torch

    rounded = {
        name: plan.outputs[place].planned.dtype
        for name, place in plan.names.items()
        if name in plan.changed or plan.outputs[place].planned.dtype != plan.outputs[place].base.dtype
    }
    source = torch.Generator().manual_seed(0)
    for name, weight in _weights(live):
        if name not in rounded or not rounded[name].is_floating_point or not weight.dim():
            continue
        for start, stop in pieces(weight.shape[0], weight[0].numel()):
            rows = weight[start:stop]
            noise = torch.rand(rows.shape, generator=source, dtype=torch.float32) - 0.5
            rows += (noise.to(rows.device) * unit_in_last_place(rows.float(), rounded[name])).to(rows.dtype)


def _weights(live: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the base, and the weight that a PEFT model uses for it, each memory once."""
    seen = set()
    for name, tensor in live.get_base_model().named_parameters(remove_duplicate=False):
        # of a wrapped module the original comes once more, or is the one that is not in use
        if any(part in f".{name}" for part in (".lora_", ".trainable_tokens_", ".original_module.")):
            continue
        for wrapper in (".base_layer", ".token_adapter", ".modules_to_save.default"):
            name = name.replace(wrapper, "")
        if (name, tensor.data_ptr()) not in seen:
            seen.add((name, tensor.data_ptr()))
            yield name, tensor.data
