"""Looks at a model that was just saved, before it gets its name: every tensor is there, and has its whole shape.

Where processes share the weights of a model among them, each holds a part only, and what one of them writes can be a
folder that loads and answers nonsense, or no folder at all. Headers are read, no weight: it costs milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructft.errors import ModelError
from instructft.weights.weight_files import ADAPTER_WEIGHTS, read_header, weight_files

Shape = tuple[int, ...]
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


def require_whole(model: Any, folder: Path) -> int:
    """Compare a folder that `save_pretrained` filled with the model in memory; the number of its tensors.

    Args:
        model: the model or `PeftModel` itself, sharded over processes or not. Nothing is gathered.

    >>> require_whole(model, Path("runs/quickstart"))
    28

    Raises:
        ModelError: a tensor is not there, or has another shape.
    """
    adapter = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    found: dict[str, Shape] = {}
    for file in [folder / ADAPTER_WEIGHTS] if adapter else weight_files(folder):
        found |= {name: entry.shape for name, entry in read_header(file).items()}
    wanted = tensors(model, found)
    missing = sorted(set(wanted) - set(found))
    other = sorted(name for name in set(wanted) & set(found) if found[name] != wanted[name])
    problems = []
    if missing:
        problems.append(f"{', '.join(missing[:3])} missing ({len(missing)} of {len(wanted)} tensors)")
    if other:
        name = other[0]
        shapes = f"{list(found[name])}, expected {list(wanted[name])}"
        problems.append(f"{name} has the shape {shapes} ({len(other)} of {len(wanted)} tensors)")
    if problems:
        raise ModelError(
            f"what was saved in {folder} is not the whole model: {'; '.join(problems)}. It was not put in its place"
        )
    return len(wanted)


def without_wrappers(name: str) -> str:
    """A tensor's name without what FSDP, `torch.compile` and checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def tensors(model: Any, found: Mapping[str, Any]) -> dict[str, Shape]:
    """Name -> whole shape of each tensor that belongs on the disk, under the name that it has there.

    Args:
        found: what is on the disk; of tensors that are one in memory (a tied head) one is enough, whichever it is.

    >>> tensors(gpt2, {"transformer.wte.weight": …})["transformer.wte.weight"]
    (50257, 768)
    """
    import torch

    model = getattr(model, "_orig_mod", model)  # torch.compile
    names: dict[int, list[str]] = {}
    shapes: dict[str, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        name = without_wrappers(name)
        if isinstance(tensor, torch.Tensor):
            # DeepSpeed ZeRO-3 leaves an empty tensor that knows what it was; a DTensor says its whole shape itself
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
            shapes[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
            names.setdefault(id(tensor), []).append(name)
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        shapes = get_peft_model_state_dict(model, state_dict=shapes, save_embedding_layers=False)
        return {name: tuple(tensor.shape) for name, tensor in shapes.items()}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for tied in names.values():
        here = [name for name in tied if name in found] or tied[:1]
        ignored |= set(tied) - set(here)
    shapes = _as_on_disk(model, {name: tensor for name, tensor in shapes.items() if name not in ignored})
    return {name: tuple(tensor.shape) for name, tensor in shapes.items()}


def _as_on_disk(model: Any, shapes: dict[str, Any]) -> dict[str, Any]:
    """What transformers fuses when it loads a model (the experts of a mixture) it takes apart again when it saves."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Any] = revert_weight_conversion(model, shapes)
    return reverted
