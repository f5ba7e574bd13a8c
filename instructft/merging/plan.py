"""Decides what each tensor of a base checkpoint becomes in a merge, before anything is written.

The base is built without weights, and PEFT puts the adapter's own configuration into it: which modules it reaches, at
which rank and scale, which are transposed, what is tied, is PEFT's word and not a second reading of its options. The
names in a checkpoint become the model's as transformers' loading renames them. An option, a layer or a name that has
no proved merge is refused by its name.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import ModelError, UsageError
from instructft.merging.arithmetic import Edit, Place
from instructft.merging.edits import find_edits
from instructft.weights import remote_code
from instructft.weights.base_manifest import places
from instructft.weights.model_class import auto_class
from instructft.weights.tensor_io import Planned, Stored

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model, and what it is made from."""

    planned: Planned
    base: Stored
    edit: Edit


@dataclass(frozen=True)
class Plan:
    """The whole merge."""

    outputs: dict[str, Output]
    model: PreTrainedModel  # the merged model without its weights, on the meta device
    untied: bool  # training made tied weights differ, so that they are stored each on its own
    places: dict[str, tuple[Place, ...]]  # model parameter -> its tensors in the merged files, where they are known

    @property
    def changed(self) -> dict[str, tuple[Place, ...]]:
        """Those of `places` whose values are not the base's."""
        return {
            name: places
            for name, places in self.places.items()
            if any(self.outputs[place.name].edit != Edit() for place in places)
        }

    @property
    def tensors_changed(self) -> int:
        """Tensors in the merged files whose values are not the base's."""
        return sum(map(len, self.changed.values()))

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the merged weights."""
        sizes: Counter[torch.dtype] = Counter()
        for out in self.outputs.values():
            if out.planned.dtype.is_floating_point:
                sizes[out.planned.dtype] += out.planned.bytes
        return sizes.most_common(1)[0][0]


def make_plan(
    base: Path,
    stored: Mapping[str, Stored],
    adapter: Path,
    shapes: Mapping[str, tuple[int, ...]],
    vocab_size: int,
    dtype: torch.dtype | None,
) -> Plan:
    """Say what every tensor of the base becomes.

    Args:
        stored: the base's tensors, as `read_checkpoint` gives them.
        shapes: the adapter's tensors.
        vocab_size: rows of the input embedding as trained; with fewer than the base has it keeps its own.
        dtype: of the merged weights; None: each keeps the base's.

    Raises:
        UsageError: something in it has no proved merge.
        ModelError: adapter and base do not fit each other.
    """
    model = _skeleton(base)
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = _tied(model)
    sources = _sources(model, stored, before)
    grown = _grow(model, vocab_size, before)
    edits = find_edits(model, adapter, shapes, groups)
    for name, rows in grown.items():
        edits[name] = dataclasses.replace(edits.get(name, Edit()), rows=rows)

    outputs: dict[str, Output] = {}
    found: dict[str, tuple[Place, ...]] = {}

    def add(name: str, tensor: Stored, edit: Edit) -> None:
        shape = (edit.rows, *tensor.shape[1:]) if edit.rows else tensor.shape
        written = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        outputs[name] = Output(Planned(name, written, shape), tensor, edit)

    parameter_of = {place.name: (name, place) for name, places in sources.items() for place in places}
    for name, tensor in stored.items():
        parameter, place = parameter_of.get(name, ("", Place(name)))
        whole = edits.get(parameter, Edit())
        _refuse_parts(base, whole, place)
        edit = whole.at(place)
        if edit.names and (not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2):
            raise UsageError(f"{base}: {name} is stored as {tensor.dtype}; merge into a base that is not quantized")
        add(name, tensor, edit)
        if parameter:
            found[parameter] = sources[parameter]
    for name in edits:
        if not any(other in sources for other in groups.get(name, [name])):
            raise UsageError(
                f"{base}: {name}, which the adapter changes, is no single tensor in this checkpoint: it is put "
                "together when the model is loaded. No merge into it is proved here; use the adapter as it is"
            )
    untied = any(edits.get(name) != edits.get(group[0]) for group in groups.values() for name in group)
    if untied:  # what was one weight in the base is two now: the one without a tensor of its own gets one
        for group in groups.values():
            source = next((stored[sources[name][0].name] for name in group if name in sources), None)
            for name in group:
                if name not in sources and source is not None:
                    add(name, source, edits.get(name, Edit()))
                    found[name] = (Place(name),)
    return Plan(outputs, model, untied, found)


def _refuse_parts(base: Path, edit: Edit, place: Place) -> None:
    """Of a part of a parameter nothing is proved here but LoRA over the whole of it."""
    other = edit.bias or edit.tokens or edit.replaced or edit.rows or (edit.lora and edit.lora.magnitude)
    if other and place.is_part:
        raise UsageError(
            f"{base}: {place.name} is a part of the weight that loading makes of it, and only LoRA over that is merged "
            "into parts; use the adapter as it is"
        )


def plan_places(folder: Path, stored: Mapping[str, Stored]) -> tuple[PreTrainedModel, dict[str, tuple[Place, ...]]]:
    """A model without its weights, and for each parameter the tensors that it is loaded from, where they are known."""
    model = _skeleton(folder)
    return model, _sources(model, stored, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _skeleton(base: Path) -> PreTrainedModel:
    """The base without weights."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, **remote_code.flag())
    if getattr(config, "quantization_config", None):
        raise UsageError(
            f"{base} is stored quantized (quantization_config in its config.json); an adapter is merged into the "
            "unquantized model: name that as base_model_name_or_path in adapter_config.json"
        )
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, **remote_code.flag())
    return model


def _tied(model: PreTrainedModel) -> dict[str, list[str]]:
    """Parameter -> all names of the same parameter, where there are several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _sources(
    model: PreTrainedModel, stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Place, ...]]:
    """Model parameter -> the checkpoint's tensors that it is loaded from, where it is one or an expert's rows each."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    found: dict[str, tuple[Place, ...]] = {}
    parts: dict[str, dict[str, list[str]]] = {}  # parameter -> pattern of its names -> tensors, expert by expert
    twice: set[str] = set()
    in_order = sorted(stored, key=dot_natural_key)  # in which loading puts them together
    for checkpoint, (name, pattern) in places(model, in_order).items():
        if name is None:
            continue
        if pattern is not None:
            parts.setdefault(name, {}).setdefault(pattern, []).append(checkpoint)
            continue
        if stored[checkpoint].shape != shapes[name]:
            raise ModelError(
                f"{checkpoint} in the base: found the shape {stored[checkpoint].shape}, its config.json "
                f"makes it {shapes[name]}"
            )
        if name in found:
            twice.add(name)
        found[name] = (Place(checkpoint),)
    for name, by_pattern in parts.items():
        converter = converter_of[next(iter(by_pattern))]
        if lies := _experts(converter, by_pattern, stored, shapes[name]):
            twice |= {name} & found.keys()
            found[name] = lies
    return {name: lies for name, lies in found.items() if name not in twice}


def _experts(
    converter: Any, by_pattern: Mapping[str, list[str]], stored: Mapping[str, Stored], shape: tuple[int, ...]
) -> tuple[Place, ...]:
    """Where the tensors of single experts lie in the parameter (E, rows, columns) that loading makes of them.

    So too of all experts in one tensor, each transposed, and of a layer that the checkpoint has as several. Nothing for
    what is put together otherwise than experts one after the other, and of each the rows of its tensors.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    kinds = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    names = [name for pattern in converter.source_patterns for name in by_pattern.get(pattern, [])]
    if [kind for kind, _ in kinds] == [Transpose] and len(names) == 1 and len(shape) == 3:
        step, there = converter.operations[0], stored[names[0]].shape
        if (step.dim0, step.dim1) != (1, 2) or there not in (shape, (shape[0], shape[2], shape[1])):
            return ()
        return (Place(names[0], transposed=not step.check_dims or there != shape),)  # as transformers' loading decides
    if kinds == [(Concatenate, 0)] and len(shape) == 2 and len(names) == len(converter.source_patterns):
        return _rows(names, stored, shape)
    if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]) or len(shape) != 3:
        return ()
    found, start = [], 0
    for pattern in converter.source_patterns:
        tensors = by_pattern.get(pattern, [])
        sizes = {stored[name].shape for name in tensors}
        if len(tensors) != shape[0] or len(sizes) != 1 or len(size := sizes.pop()) != 2 or size[1] != shape[2]:
            return ()
        found += [Place(name, expert, start, start + size[0]) for expert, name in enumerate(tensors)]
        start += size[0]
    return tuple(found) if start == shape[1] else ()


def _rows(names: list[str], stored: Mapping[str, Stored], shape: tuple[int, ...]) -> tuple[Place, ...]:
    """Where tensors lie in the layer (rows, columns) that they are, one below the other."""
    found, start = [], 0
    for name in names:
        if len(stored[name].shape) != 2 or stored[name].shape[1] != shape[1]:
            return ()
        found.append(Place(name, start=start, stop=start + stored[name].shape[0]))
        start += stored[name].shape[0]
    return tuple(found) if start == shape[0] else ()


def _grow(model: PreTrainedModel, vocab_size: int, before: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Grow the embeddings as training did. Parameter -> its rows, for each that grew."""
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab_size <= rows:  # they never shrink
        return {}
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    grown = {}
    for name, tensor in model.state_dict().items():
        if tuple(tensor.shape) == before[name]:
            continue
        if tuple(tensor.shape[1:]) != before[name][1:]:
            raise UsageError(f"{name} grows with the vocabulary, and no merge of such a weight is proved here")
        grown[name] = tensor.shape[0]
    return grown


# --------------------------------------------------------------------------------------------------------------------
# Where the proof of it runs
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where the models of a proof run."""

    device: str
    dtype: torch.dtype
    whole: bool = True  # in memory; else mapped from its files


def choose_machine(plan: Plan) -> Machine:
    """Float32 where one model fits in memory that way, else the merged weights' own dtype, else mapped from its files.

    Raises:
        UsageError: not even what must be in memory of a mapped model fits.
    """
    import psutil
    import torch

    stored = plan.dtype
    parameters = sum(tensor.numel() for tensor in plan.model.parameters())
    free = {"cpu": psutil.virtual_memory().available}
    if torch.cuda.is_available():
        free = {"cuda": torch.cuda.mem_get_info()[0], **free}
    rest = 1 << 30  # activations, logits
    for device, room in free.items():
        for dtype in dict.fromkeys((torch.float32, stored)):
            if parameters * dtype.itemsize * 1.15 + rest <= room:  # the largest weight once more
                return Machine(device, dtype)
    need = in_memory(plan) + rest
    if need <= free["cpu"]:
        return Machine("cpu", stored, whole=False)
    raise UsageError(
        f"the proof needs about {need / 1e9:.1f} GB of memory, and {free['cpu'] / 1e9:.1f} GB are free; merge on a "
        "larger machine, or without the proof: --no-verify"
    )


def in_memory(plan: Plan) -> int:
    """Bytes of a mapped model that are in memory all the same: weights that loading changes, one layer in copies."""
    changed = sum(
        math.prod(out.planned.shape) * plan.dtype.itemsize
        for out in plan.outputs.values()
        if out.edit.rows or {out.base.dtype, out.planned.dtype} != {plan.dtype}
    )
    # merged: the weight, its delta and the sum in float32, the noise; experts are merged a layer at a time
    whole = (sum(math.prod(plan.outputs[at.name].planned.shape) for at in places) for places in plan.places.values())
    return changed + 5 * max(*whole, *(math.prod(out.planned.shape) for out in plan.outputs.values())) * 4
