"""A saved model against its base: every tensor there, in its shape and its type, or a reason why not.

What a run saves shall load where its base loads. Weights are trained in float32 and lie on the disk as the base's do:
rounded by chance to bfloat16, so that small changes are kept on average, and what was not trained comes back bit for
bit. Tensors that transformers has no place for (layers that guess several tokens ahead) are carried over as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import ModelError
from instructft.weights.rounding import STOCHASTIC, Rounder
from instructft.weights.tensor_io import Planned, Stored, pieces, read_checkpoint, read_tensors, write_shard, write_text
from instructft.weights.weight_files import NAMES, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def places(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str | None, str | None]]:
    """Tensor in a checkpoint -> the parameter that it is loaded into (None: none), and as part of one its pattern.

    Follows `convert_and_load_state_dict_in_model` of transformers/core_model_loading.py.

    Example::

        places(qwen3_moe, ["model.layers.0.mlp.experts.0.up_proj.weight"])
        # {'model.layers.0.mlp.experts.0.up_proj.weight':
        #  ('model.layers.0.mlp.experts.gate_up_proj', 'mlp.experts.*.up_proj.weight')}
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[str | None, str | None]] = {}
    for checkpoint in stored:
        name, converted = rename_source_key(checkpoint, renamings, converters, prefix, known)
        if name not in known and checkpoint in known:
            name, converted = rename_source_key(checkpoint, [], [], prefix, known)
        found[checkpoint] = (name if name in known else None, converted)
    return found


def save_like_base(model: PreTrainedModel, folder: Path, base: Path, keep_dtype: bool) -> dict[str, Any]:
    """Give what was saved in `folder` the types of its base, and compare the two.

    Args:
        model: in memory, as it was trained.
        keep_dtype: the recipe names the type of the weights; they stay in it.

    Returns:
        for `run.json`: `tensors`, `dtype` (of most of the weights), and where there are some `carried`, `grown`, and
        `not_carried`.

    Raises:
        ModelError: a tensor of the base is not there, is new or has another shape, and nothing explains it.
    """
    before, after = read_checkpoint(base), read_checkpoint(folder)
    there = places(model, [*before, *after])
    grown = _compare(model, before, after, there, folder)
    foreign = [name for name in before if there[name][0] is None and name not in after]
    parts: dict[str, torch.dtype] = {
        place: tensor.dtype for name, tensor in before.items() if (place := there[name][0])
    }
    alike = all(name in before for name in after if there[name][0] in parts)
    carried = foreign if alike else []  # not beside tensors that lie there under new names
    dtypes: dict[str, torch.dtype] = {}
    for name, tensor in after.items():
        old = before[name].dtype if name in before else parts.get(there[name][0] or "")
        if not keep_dtype and old is not None and _halves(old, tensor.dtype):
            dtypes[name] = old
    if dtypes or carried:
        _write_again(folder, after, dtypes, {name: before[name] for name in carried})
    sizes: Counter[str] = Counter()
    for name, tensor in after.items():
        sizes[str(dtypes.get(name, tensor.dtype)).removeprefix("torch.")] += tensor.rows * tensor.width
    dtype = sizes.most_common(1)[0][0]
    if dtypes:
        _tell_config(folder / "config.json", dtype)
    facts: dict[str, Any] = {"tensors": len(after) + len(carried), "dtype": dtype}
    more = {"carried": carried, "grown": grown, "not_carried": [] if carried else foreign}
    return facts | {key: names for key, names in more.items() if names}


def _halves(old: torch.dtype, now: torch.dtype) -> bool:
    """Whether a trained weight goes back to a narrower type of its base."""
    floats = old.is_floating_point and now.is_floating_point
    return floats and 2 <= old.itemsize < now.itemsize


def _compare(
    model: PreTrainedModel,
    before: Mapping[str, Stored],
    after: Mapping[str, Stored],
    there: Mapping[str, tuple[str | None, str | None]],
    folder: Path,
) -> list[str]:
    """Names of the tensors that grew with the vocabulary; all else must be as it was."""
    names: dict[int, set[str]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        names.setdefault(id(weight), set()).add(name)
    together = {name: group for group in names.values() for name in group}  # a tied weight has several names
    old = {place for name in before if (place := there[name][0])}
    new = {place for name in after if (place := there[name][0])}
    missing = sorted(place for place in old if not together.get(place, {place}) & new)
    added = sorted(place for place in new if not together.get(place, {place}) & old)
    rows = max((after[n].shape[0] for n in after if n in before and before[n].shape != after[n].shape), default=0)
    grown: list[str] = []
    other: list[str] = []
    for name in sorted(before.keys() & after.keys()):
        was, now = before[name].shape, after[name].shape
        if was != now:
            (grown if was[1:] == now[1:] and was[0] < now[0] == rows else other).append(name)
    problems = [f"{', '.join(missing[:3])} of the base missing ({len(missing)} in all)"] if missing else []
    problems += [f"{', '.join(added[:3])} new, which the base does not have ({len(added)} in all)"] if added else []
    problems += [f"{n} has the shape {list(after[n].shape)}, in the base {list(before[n].shape)}" for n in other[:1]]
    if problems:
        raise ModelError(f"what was saved in {folder} is not what its base is: {'; '.join(problems)}")
    return grown


def _write_again(
    folder: Path, after: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype], carried: Mapping[str, Stored]
) -> None:
    """The weight files anew, one after the other: in other types, and in the last one what is carried over."""
    files, total = weight_files(folder), 0
    where: dict[str, str] = {}
    for file in files:
        held = {**read_tensors(file), **(carried if file == files[-1] else {})}
        plan = [Planned(name, dtypes.get(name, tensor.dtype), tensor.shape) for name, tensor in held.items()]

        def produce(name: str, held: Mapping[str, Stored] = held) -> Iterator[torch.Tensor]:
            tensor = held[name]
            rounded = Rounder(name, dtypes.get(name, tensor.dtype), STOCHASTIC)
            for start, stop in pieces(tensor.rows, tensor.width):
                yield rounded(tensor.read(start, stop))

        anew = file.with_name(f"{file.name}.anew")
        write_shard(anew, plan, produce)
        anew.replace(file)
        where |= dict.fromkeys(held, file.name)
        total += sum(tensor.bytes for tensor in plan)
    index = folder / NAMES[0][1]
    if index.is_file():
        text = {"metadata": {"total_size": total}, "weight_map": where}
        write_text(index, json.dumps(text, indent=2, sort_keys=True) + "\n")


def _tell_config(path: Path, dtype: str) -> None:
    """The type of the weights, also in the sections of a model of several parts."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in section or (section is config and key == "dtype"):
                section[key] = dtype
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
