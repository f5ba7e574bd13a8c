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
from typing import TYPE_CHECKING

from instructft.errors import ModelError, UsageError
from instructft.merging.arithmetic import Edit
from instructft.merging.edits import find_edits
from instructft.weights import remote_code
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
    names: dict[str, str]  # model parameter -> name of its tensor in the merged files, where there is just one

    @property
    def changed(self) -> dict[str, str]:
        """Those of `names` whose values are not the base's."""
        return {name: place for name, place in self.names.items() if self.outputs[place].edit != Edit()}

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
    names: dict[str, str] = {}

    def add(name: str, tensor: Stored, edit: Edit) -> None:
        shape = (edit.rows, *tensor.shape[1:]) if edit.rows else tensor.shape
        written = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        outputs[name] = Output(Planned(name, written, shape), tensor, edit)

    parameter_of = {checkpoint: name for name, checkpoint in sources.items()}
    for name, tensor in stored.items():
        parameter = parameter_of.get(name)
        edit = edits.get(parameter, Edit()) if parameter else Edit()
        if edit.names and (not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2):
            raise UsageError(f"{base}: {name} is stored as {tensor.dtype}; merge into a base that is not quantized")
        add(name, tensor, edit)
        if parameter:
            names[parameter] = name
    for name in edits:
        if not any(other in sources for other in groups.get(name, [name])):
            raise UsageError(
                f"{base}: {name}, which the adapter changes, is no single tensor in this checkpoint: it is put "
                "together when the model is loaded. No merge into it is proved here; use the adapter as it is"
            )
    untied = any(edits.get(name) != edits.get(group[0]) for group in groups.values() for name in group)
    if untied:  # what was one weight in the base is two now: the one without a tensor of its own gets one
        for group in groups.values():
            source = next((stored[sources[name]] for name in group if name in sources), None)
            for name in group:
                if name not in sources and source is not None:
                    add(name, source, edits.get(name, Edit()))
                    names[name] = name
    return Plan(outputs, model, untied, names)


def plan_names(folder: Path, stored: Mapping[str, Stored]) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model without its weights, and for each parameter the one tensor that it is loaded from, where there is one."""
    model = _skeleton(folder)
    return model, _sources(model, stored, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _skeleton(base: Path) -> PreTrainedModel:
    """The base without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, **remote_code.flag())
    if getattr(config, "quantization_config", None):
        raise UsageError(
            f"{base} is stored quantized (quantization_config in its config.json); an adapter is merged into the "
            "unquantized model: name that as base_model_name_or_path in adapter_config.json"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **remote_code.flag())


def _tied(model: PreTrainedModel) -> dict[str, list[str]]:
    """Parameter -> all names of the same parameter, where there are several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _sources(
    model: PreTrainedModel, stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Model parameter -> the one checkpoint tensor that it is loaded from, where there is one.

    Follows `convert_and_load_state_dict_in_model` of transformers/core_model_loading.py.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    twice: set[str] = set()
    for checkpoint in stored:
        name, converted = rename_source_key(checkpoint, renamings, converters, prefix, known)
        if name not in known and checkpoint in known:
            name, converted = rename_source_key(checkpoint, [], [], prefix, known)
        if name not in known or converted is not None:
            continue
        if stored[checkpoint].shape != shapes[name]:
            raise ModelError(
                f"{checkpoint} in the base: found the shape {stored[checkpoint].shape}, its config.json "
                f"makes it {shapes[name]}"
            )
        if name in found:
            twice.add(name)
        found[name] = checkpoint
    return {name: checkpoint for name, checkpoint in found.items() if name not in twice}


def _grow(model: PreTrainedModel, vocab_size: int, before: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Grow the embeddings as training did. Parameter -> its rows, for each that grew."""
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab_size <= rows:  # they never shrink
        return {}
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    places = {name for name, module in model.named_modules() if any(module is layer for layer in layers)}
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    grown = {}
    for name, tensor in model.state_dict().items():
        if tuple(tensor.shape) == before[name]:
            continue
        if name.rpartition(".")[0] not in places or tuple(tensor.shape[1:]) != before[name][1:]:
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
    # merged: the weight, its delta and the sum in float32, the noise
    return changed + 5 * max(math.prod(out.planned.shape) * 4 for out in plan.outputs.values())
