"""Is the arithmetic right? Each merged tensor against PEFT's own merge in float64, and its file against that.

Three questions, a tensor at a time, none of which depends on what the model makes of it:

1. The change before it is rounded is PEFT's: `B·A·scale` and all that is like it, at float64's precision, however small
   it is beside the weight.
2. Each number in the file is that value rounded to the file's dtype: one of its two neighbours, or the nearest.
3. The change is in the file: how much of it is (`applied`, 1 where rounding loses nothing), and of how many entries
   nothing is left (`vanished`).

PEFT merges one layer at a time, in copies that are let go again: where the weights are a file that is mapped into
memory, no more than a layer is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from instructft.errors import ModelError
from instructft.merging.arithmetic import unrounded
from instructft.weights.rounding import STOCHASTIC, unit_in_last_place
from instructft.weights.tensor_io import Stored, pieces

if TYPE_CHECKING:
    import torch

    from instructft.merging.plan import Output, Plan

PRECISION = 1e-9  # of the largest change of a tensor, so that the smallest adapter is not passed over
SUMS = 2.0**-50  # of a tensor's largest weight: the same sums in another order, in float64
MEAN = 2.0**-23  # the same where a row is new: its start is a mean, which PEFT's model holds in float32


def compare_weights(
    live: Any, plan: Plan, adapter: Mapping[str, Stored], files: Mapping[str, Stored], rounding: str
) -> dict[str, Any]:
    """Hold each merged tensor against what PEFT's merge makes of it in `live`, which stays as it is.

    Args:
        live: the adapter on its base.
        adapter: the adapter's tensors.
        files: the merged tensors as they lie on disk, written with `rounding`.

    Returns:
        `tensors` compared, `applied` and `vanished` as above, over all of them, and `deviation`, the largest of a
        change before rounding, relative to the largest weight of its tensor.

    Raises:
        ModelError: a change is another one, or a value in a file is not its rounding.
    """
    compared, deviation, sums, changed = 0, 0.0, Changed(), plan.changed
    for name, held, weight in _as_merged(live, changed.keys()):
        for place in changed[name]:
            out, stored = plan.outputs[place.name], files[place.name]
            off = _compare(out, held, place.of(weight), adapter, stored, rounding, sums)
            deviation, compared = max(deviation, off), compared + 1
    if compared < plan.tensors_changed:
        raise ModelError(f"{plan.tensors_changed - compared} merged tensors were not found in PEFT's model")
    return {"tensors": compared, "deviation": deviation, **sums.figures()}


def compare_stored(
    plan: Plan, trained: Mapping[str, Stored], files: Mapping[str, Stored], rounding: str
) -> dict[str, Any]:
    """Hold each stored tensor of a model that was trained whole against what it was trained to.

    Returns:
        `tensors`, `applied` and `vanished`, as `compare_weights` gives them.

    Raises:
        ModelError: a value in a file is not its rounding.
    """
    sums = Changed()
    for place in (place for places in plan.changed.values() for place in places):
        out, start = plan.outputs[place.name], 0
        for exact in unrounded(out.base, out.edit, trained):
            stop = start + len(exact)
            _refuse_no_rounding(files[place.name], start, stop, exact.double(), rounding, out, sums)
            start = stop
    return {"tensors": plan.tensors_changed, **sums.figures()}


def _refuse_no_rounding(
    stored: Stored, start: int, stop: int, value: torch.Tensor, rounding: str, out: Output, sums: Changed
) -> None:
    """Count rows of a file; refuse them where a number is no rounding of its value."""
    units = 1.001 if rounding == STOCHASTIC else 0.501  # of the last place: either neighbour, or the nearest
    found = stored.read(start, stop).double()
    if not bool(((found - value).abs() <= units * unit_in_last_place(value, stored.dtype)).all()):
        raise ModelError(f"{stored.name} in the merged file is not the rounding of its merged value")
    sums.count(found, value, out, start, stop)


def _compare(
    out: Output,
    held: torch.dtype,
    theirs: torch.Tensor,
    adapter: Mapping[str, Stored],
    stored: Stored,
    rounding: str,
    sums: Changed,
) -> float:
    """How far our change of a weight is from PEFT's, relative to its largest weight; refuse another one.

    Args:
        held: the dtype that PEFT's model holds the weight in; one that is narrower than the file's has rounded it.
        stored: the weight in the merged file.
    """
    import torch

    largest = float(theirs.abs().max())
    source = adapter[out.edit.replaced] if out.edit.replaced else out.base
    coarse = held.itemsize < source.dtype.itemsize
    change = _largest_change(out, theirs)
    furthest, start = 0.0, 0
    for exact in unrounded(out.base, out.edit, adapter):
        stop, ours = start + len(exact), exact.double()
        value = theirs[start:stop].cpu()
        allowed = torch.full_like(value, PRECISION * change + SUMS * largest)
        if coarse:
            allowed += unit_in_last_place(value, held)
        allowed[max(0, source.rows - start) :] += MEAN * largest
        difference = (ours - value).abs()
        if not bool((difference <= allowed).all()):  # not a number is no proof either
            raise ModelError(
                f"{out.planned.name} is not merged as PEFT merges it: a value differs by "
                f"{float(difference.max()):.3g}, and the largest weight in it is {largest:.3g}. Nothing was kept"
            )
        _refuse_no_rounding(stored, start, stop, ours, rounding, out, sums)
        furthest, start = max(furthest, float(difference.max())), stop
    return furthest / max(largest, 1e-300)


def _largest_change(out: Output, theirs: torch.Tensor) -> float:
    """The largest change that PEFT's merge makes of a weight of the base."""
    largest = 0.0
    for start, stop in pieces(out.base.rows, out.base.width):
        was = out.base.read(start, stop).double()
        largest = max(largest, float((theirs[start:stop].cpu().reshape(was.shape) - was).abs().max()))
    return largest


class Changed:
    """What is left in a file of the changes that an adapter made, summed over tensors."""

    def __init__(self) -> None:
        self.entries = self.vanished = 0
        self.kept = self.wanted = 0.0

    def count(self, found: torch.Tensor, value: torch.Tensor, out: Output, start: int, stop: int) -> None:
        """Count some rows of a tensor: as they are found in a file, and before they were rounded."""
        import torch

        known = min(stop, out.base.rows)
        if known <= start:  # rows of new tokens: the base has none
            return
        was = out.base.read(start, known).double()
        found, value = found[: known - start].reshape(was.shape), value[: known - start].reshape(was.shape)
        change, left = value - was, found - was
        self.wanted += float((change * change).sum())
        self.kept += float((change * left).sum())
        self.entries += int(torch.count_nonzero(change))
        self.vanished += int(((change != 0) & (left == 0)).sum())

    def figures(self) -> dict[str, float]:
        """`applied` and `vanished`, as shares."""
        return {
            "applied": self.kept / self.wanted if self.wanted else 1.0,
            "vanished": self.vanished / self.entries if self.entries else 0.0,
        }


def _as_merged(live: Any, wanted: KeysView[str]) -> Iterator[tuple[str, torch.dtype, torch.Tensor]]:
    """Name in the base, its dtype, and the weight after PEFT's merge in float64; valid until the next is asked for."""
    seen: set[tuple[str, int]] = set()
    for place, module in _units(live.get_base_model()):
        if wanted.isdisjoint(name for name, _ in _named(module, place)):
            continue
        before = {id(p): p.data for p in _own(module)}
        with _merged_in_copies(module):
            for name, parameter in _named(module, place):
                was = before[id(parameter)]
                if name in wanted and (name, was.data_ptr()) not in seen:
                    seen.add((name, was.data_ptr()))
                    yield name, was.dtype, parameter.data


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
def _merged_in_copies(module: Any) -> Iterator[None]:
    """A unit with its weights in copies of float64, merged by PEFT; afterwards it is what it was, to the bit."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    kept = [(parameter, parameter.data) for parameter in module.parameters(recurse=_is_wrapper(module))]
    for parameter, data in kept:
        parameter.data = data.to(torch.float64, copy=True)
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
