"""A model that was trained whole, stored in less than it was trained in: a merge that replaces every weight.

Training holds weights in float32 (`models.load.weights_dtype`), and who serves a model wants bfloat16. What training
changed is as small beside a weight as an adapter's change, and rounds away as it does: so the same roundings are
measured, against the model that it began from, where that is here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from instructft.adapters.adapter_folder import AdapterFolder
from instructft.errors import ModelError, UsageError
from instructft.merging.arithmetic import Edit
from instructft.merging.metadata import find, places, run_recipe
from instructft.merging.plan import Output, Plan, plan_places
from instructft.weights.base_record import BaseModelRecord, base_folder
from instructft.weights.tensor_io import Planned, Stored, read_checkpoint

if TYPE_CHECKING:
    import torch


def read_full(run: Path) -> AdapterFolder:
    """A folder with a whole model, read as if it were an adapter without a configuration: its tensors replace all.

    What it began from stands in `run.json`, or while the run goes on in the recipe beside a checkpoint.
    """
    written, recipe = find("run.json", places(run)), run_recipe(run)
    try:
        base = json.loads(written.read_text(encoding="utf-8")).get("base") if written else None
    except (ValueError, AttributeError):
        base = None
    if base is None and recipe is not None and recipe.model.name_or_path:
        model = recipe.model
        base = {"name_or_path": model.name_or_path, "revision": model.revision, "subfolder": model.subfolder}
    known = {name: value for name, value in (base or {}).items() if name in BaseModelRecord.__dataclass_fields__}
    record = BaseModelRecord(**known) if known.get("name_or_path") else BaseModelRecord("")
    return AdapterFolder(run, {}, {}, record)


def is_full(found: AdapterFolder) -> bool:
    """Whether it is a whole model, of `read_full`."""
    return not found.config


def start_of(full: AdapterFolder) -> Path:
    """The folder of the model that it began from; its own, where it began from random weights or that is not here."""
    base = full.base
    if not base.name_or_path:
        return full.folder
    try:
        return base_folder(base.name_or_path, base.commit or base.revision, base.subfolder) or full.folder
    except ModelError:
        return full.folder


def full_plan(full: AdapterFolder, start: Path, dtype: torch.dtype) -> Plan:
    """What every tensor becomes: the trained one in `dtype`, beside the one that it began as.

    Raises:
        UsageError: nothing would be narrower than it is.
    """
    stored, before = read_checkpoint(full.folder), read_checkpoint(start)
    model, known = plan_places(full.folder, stored)
    outputs, loaded = {}, {place.name for lies in known.values() for place in lies}
    for name, tensor in stored.items():
        trained = name in loaded and tensor.dtype.is_floating_point
        edit = Edit(replaced=name) if trained else Edit()
        written = dtype if tensor.dtype.is_floating_point else tensor.dtype
        outputs[name] = Output(Planned(name, written, tensor.shape), _was(tensor, before.get(name)), edit)
    if not any(out.planned.dtype.itemsize < stored[name].dtype.itemsize for name, out in outputs.items()):
        raise UsageError(
            f"{full.folder} holds a full model already, and --dtype {str(dtype).removeprefix('torch.')} is no narrower "
            "than what it is stored in: there is nothing to merge and nothing to store in less"
        )
    return Plan(outputs, model, False, known)


def _was(tensor: Stored, before: Stored | None) -> Stored:
    """What a tensor began as: of the same shape, but for rows that are new; else itself."""
    alike = before is not None and before.shape[1:] == tensor.shape[1:] and before.rows <= tensor.rows
    return before if alike and before is not None and before.dtype.is_floating_point else tensor
