"""Merged weights against PEFT's own merge, value by value, and the size of the rounding that storing them costs.

PEFT merges one layer at a time, in copies that are let go again: where the weights are a file that is mapped into
memory, no more than a layer is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from instructft.errors import ModelError
from instructft.weights.tensor_io import Stored, pieces

if TYPE_CHECKING:
    import torch

    from instructft.merging.plan import Plan

FLOOR = 1e-5  # of a tensor's largest weight: what float32 arithmetic in another order may do


def compare_weights(live: Any, plan: Plan, files: Mapping[str, Stored]) -> dict[str, Any]:
    """Hold each merged tensor on disk against what PEFT's merge makes of it in `live`, which stays as it is.

    Raises:
        ModelError: a value is further away than rounding to its dtype explains.
    """
    import torch

    compared = 0
    for name, weight in _as_merged(live):
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


@contextmanager
def jittered(live: Any, plan: Plan, merge: bool, whole: bool) -> Iterator[None]:
    """Compute with weights that are merged (if asked for) and moved by up to half a unit in their last place.

    Each weight that the merge rounded moves by a random amount. A model that is `whole` in memory stays so afterwards;
    another one is as it was: each of its layers computes in copies.
    """
    rounded = _rounded(plan)
    if whole:
        if merge:
            live.merge_adapter()
        for seed, (name, weight) in enumerate(_weights(live)):
            if name in rounded:
                _move(weight, rounded[name], seed)
        yield
        return
    moved = {  # tied weights are one memory, and are moved alike
        weight.data_ptr(): (rounded[name], seed)
        for seed, (name, weight) in enumerate(_weights(live))
        if name in rounded
    }
    open_: dict[Any, ExitStack] = {}

    def enter(module: Any, *_: Any) -> None:
        places = [(p, moved[p.data_ptr()]) for p in _own(module) if p.data_ptr() in moved]
        open_[module] = stack = ExitStack()
        stack.enter_context(_in_copies(module, merge))
        for parameter, (dtype, seed) in places:
            _move(parameter.data, dtype, seed)

    def leave(module: Any, *_: Any) -> None:
        open_.pop(module).close()

    handles = []
    for _, module in _units(live.get_base_model()):
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(plan: Plan) -> dict[str, torch.dtype]:
    """Parameter -> the dtype that it was rounded to."""
    found = {}
    for name, place in plan.names.items():
        out = plan.outputs[place]
        dtype = out.planned.dtype
        if dtype.is_floating_point and out.planned.shape and (name in plan.changed or dtype != out.base.dtype):
            found[name] = dtype
    return found


def _move(weight: torch.Tensor, dtype: torch.dtype, seed: int) -> None:
    import torch

    source = torch.Generator().manual_seed(seed)
    for start, stop in pieces(weight.shape[0], weight[0].numel()):
        rows = weight[start:stop]
        noise = torch.rand(rows.shape, generator=source, dtype=torch.float32) - 0.5
        rows += (noise.to(rows.device) * unit_in_last_place(rows.float(), dtype)).to(rows.dtype)


def _as_merged(live: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the base, and the weight after PEFT's merge; valid until the next one is asked for."""
    seen: set[tuple[str, int]] = set()
    for place, module in _units(live.get_base_model()):
        before = {id(p): p.data_ptr() for p in _own(module)}
        with _in_copies(module, merge=True):
            for name, parameter in _named(module, place):
                if (name, before[id(parameter)]) not in seen:
                    seen.add((name, before[id(parameter)]))
                    yield name, parameter.data


def _units(base: Any) -> Iterator[tuple[str, Any]]:
    """The modules that hold weights: what PEFT wraps as one, every other module for itself."""
    wrapped: set[Any] = set()
    for name, module in base.named_modules():
        if module in wrapped:
            continue
        if _is_wrapper(module):
            wrapped.update(module.modules())
            yield name, module
        elif module._parameters:
            yield name, module


def _is_wrapper(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


@contextmanager
def _in_copies(module: Any, merge: bool) -> Iterator[None]:
    """A unit with its weights in copies, merged by PEFT if asked for; afterwards it is what it was, to the bit."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules: list[Any] = list(module.modules()) if merge else []
    layers = [layer for layer in modules if isinstance(layer, BaseTunerLayer)]
    kept = [(parameter, parameter.data) for parameter in _own(module)]
    for parameter, data in kept:
        parameter.data = data.clone()
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in reversed(layers):
            layer.unmerge()
        for parameter, data in kept:
            parameter.data = data


def _own(module: Any) -> list[Any]:
    """The parameters of a unit that are the base's."""
    return list(dict.fromkeys(parameter for _, parameter in _named(module, "")))


def _named(module: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Name in the base, and parameter, of each weight in a unit that takes part in what it computes."""
    for name, parameter in module.named_parameters(prefix=place, recurse=_is_wrapper(module), remove_duplicate=False):
        # of a wrapped module the original comes once more, or is the one that is not in use
        if any(part in f".{name}" for part in (".lora_", ".trainable_tokens_", ".original_module.")):
            continue
        for wrapper in (".base_layer", ".token_adapter", ".modules_to_save.default"):
            name = name.replace(wrapper, "")
        yield name.lstrip("."), parameter


def _weights(live: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the base, and the weight that a PEFT model uses for it, each memory once."""
    seen: set[tuple[str, int]] = set()
    for place, module in _units(live.get_base_model()):
        for name, parameter in _named(module, place):
            if (name, parameter.data_ptr()) not in seen:
                seen.add((name, parameter.data_ptr()))
                yield name, parameter.data
