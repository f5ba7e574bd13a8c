"""Reads an adapter folder, and checks what can be checked without its base: files whole, every tensor with its pair.

It needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import AdapterError, ModelError
from instructft.prompt.sandbox import SECONDS, at_most
from instructft.weights.base_record import BASE, BaseModelRecord, stays_inside
from instructft.weights.weight_files import ADAPTER_WEIGHTS, read_header
from instructft.whole_file import read_whole

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", ADAPTER_WEIGHTS
PREFIX = "base_model.model."  # PEFT puts it before the name of every module of the base
QUANTIZATIONS, DTYPES = ("none", "8bit", "4bit"), ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with a LoRA adapter that is whole, as far as that can be told without its base."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json
    shapes: dict[str, tuple[int, ...]]  # tensor name in adapter_model.safetensors -> shape
    base: BaseModelRecord


@dataclass(frozen=True)
class AdapterMetadata:
    """What stands beside PEFT's files in each folder that holds an adapter: `generation_config.json`, `base.json`."""

    base: BaseModelRecord

    def write(self, model: PeftModel, folder: str | Path) -> None:
        """Write both into a folder that holds the adapter already."""
        model.generation_config.save_pretrained(folder)
        self.base.write(folder)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, whole or not.

    Example::

        is_adapter("runs/tinyllama-lora")
        # True
    """
    return (Path(folder).expanduser() / CONFIG).is_file()


def read_adapter(folder: str | Path) -> AdapterFolder:
    """Read an adapter folder, or a checkpoint of an adapter run, and check all that can be checked without its base.

    Example::

        read_adapter("runs/tinyllama-lora").shapes["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
        # (16, 2048)

    Raises:
        AdapterError: a file is missing, damaged or cut short; it is no LoRA adapter; or its tensors do not go together:
            half of a pair, a rank other than the configuration's, a zero-sized tensor.
    """
    folder = Path(folder).expanduser()
    config = _read_object(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG}: peft_type: found {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(f"{folder / CONFIG}: task_type: found {config['task_type']!r}, expected 'CAUSAL_LM'")
    _require_finite(folder / CONFIG, config)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterError(
                f"{folder} holds pickled weights (adapter_model.bin), which can run code when they are read; load it "
                "once with PEFT where you trust it, and save it again with save_pretrained, as safetensors"
            )
        raise AdapterError(f"{folder} holds no {WEIGHTS}: the adapter is not whole")
    try:
        shapes = {name: entry.shape for name, entry in read_header(folder / WEIGHTS).items()}
    except ModelError as error:
        raise AdapterError(str(error)) from error
    try:
        with at_most(SECONDS):
            _try_patterns(config, shapes)
            problems = list(_problems(config, shapes))
    except TimeoutError as error:
        raise AdapterError(
            f"{folder / CONFIG}: a regular expression in it (target_modules, rank_pattern, …) takes over {SECONDS} "
            "s over the names of the adapter's tensors; it is not used"
        ) from error
    if problems:
        raise AdapterError(f"{folder / WEIGHTS} is not whole:\n" + first_three(problems))
    return AdapterFolder(folder, config, shapes, _read_base(folder, config, shapes))


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        found = json.loads(read_whole(path))
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent} holds no {path.name}: it is no adapter folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def _require_finite(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse NaN and Infinity, which JSON as Python reads it has, as scales of the change: each answer would be one."""
    patterns = config.get("alpha_pattern") or {}
    scales = {"lora_alpha": config.get("lora_alpha"), "lora_dropout": config.get("lora_dropout")}
    scales |= {f"alpha_pattern.{name}": value for name, value in patterns.items()} if isinstance(patterns, dict) else {}
    for key, value in scales.items():
        known = value is None or (isinstance(value, int | float) and abs(value) < _LARGEST)
        if not known or (key == "lora_dropout" and not 0 <= (value or 0) <= 1):
            what = "a share" if key == "lora_dropout" else "a number"
            raise AdapterError(f"{path}: {key}: found {value!r}, expected {what}; copy or download it again")


_LARGEST = 1e9  # of a scale: what is above is none, and no number is below NaN


def first_three(problems: list[str]) -> str:
    """Problems for a message, a line each: the first three, and how many more.

    >>> first_three(["a", "b", "c", "d"])
    '  a\\n  b\\n  c\\n  and 1 more'
    """
    more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
    return "\n".join(f"  {line}" for line in (*problems[:3], *more))


def _read_base(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> BaseModelRecord:
    """`base.json` of a folder, or of the run that a checkpoint is of; for an adapter of PEFT's own what it says."""
    parents = [folder.resolve().parent] if re.fullmatch(r"checkpoint-\d+", folder.resolve().name) else []
    path = next((place / BASE for place in (folder, *parents) if (place / BASE).is_file()), None)
    rows = [max(indices) + 1 for indices in trained_rows(config).values() if indices]
    if path is None:
        name = config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise AdapterError(
                f"{folder / CONFIG} does not name the base it was trained on; write its folder or Hub id to "
                "base_model_name_or_path"
            )
        # PEFT saves the whole embedding when its rows have grown in training
        whole = r".*(embed|wte|word_embeddings)[^.]*(\.base_layer|\.token_adapter\.base_layer)?\.weight"
        rows += [shape[0] for key, shape in shapes.items() if re.fullmatch(whole, key) and len(shape) == 2]
        return BaseModelRecord(name, config.get("revision"), vocab_size=max(rows, default=0))
    found = _read_object(path)
    fields = BaseModelRecord.__dataclass_fields__
    if not set(fields) <= set(found):
        raise AdapterError(f"{path} lacks {', '.join(sorted(set(fields) - set(found)))}; it was not written whole")
    record = BaseModelRecord(**{name: found[name] for name in fields})
    sound = {
        **{key: isinstance(found[key], str) and found[key] != "" for key in ("name_or_path", "fingerprint")},
        **{key: found[key] is None or isinstance(found[key], str) for key in ("revision", "subfolder", "commit")},
        "quantization": record.quantization in QUANTIZATIONS,
        "dtype": record.dtype in DTYPES,
        "vocab_size": isinstance(record.vocab_size, int) and record.vocab_size >= max(rows, default=1),
    }
    bad = next((key for key, fine in sound.items() if not fine), None)
    if bad is None and not stays_inside(record.subfolder):
        bad = "subfolder"
    if bad:
        raise AdapterError(f"{path}: {bad}: found {found[bad]!r}, which is not what instructft writes; bring it back")
    return record


def _try_patterns(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Match every regular expression of an adapter once, so that one without end shows itself here and not in PEFT."""
    found = [(key, config.get(key)) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    for key in ("rank_pattern", "alpha_pattern"):
        found += [(key, pattern) for pattern in (config[key] if isinstance(config.get(key), dict) else ())]
    names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in shapes}
    for key, pattern in found:
        if not isinstance(pattern, str):
            continue
        try:
            for name in names:
                re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise AdapterError(f"{CONFIG}: {key} cannot be read: {pattern!r}: {error}") from error


# the two tensors of a low-rank pair: the ending of the name, which axis is the rank, the ending of the other one
_PAIRS = {
    "lora_A.weight": (0, "lora_B.weight"),
    "lora_B.weight": (1, "lora_A.weight"),
    "lora_embedding_A": (0, "lora_embedding_B"),
    "lora_embedding_B": (1, "lora_embedding_A"),
}


def _problems(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with an adapter's tensors, seen from its configuration alone."""
    if not shapes:
        yield "it holds no tensors at all"
    per_expert = bool(config.get("target_parameters"))  # there a rank is multiplied by the number of experts
    for name, shape in sorted(shapes.items()):
        if not name.startswith(PREFIX):
            yield f"{name} is no name that PEFT gives; expected {PREFIX}…"
        if 0 in shape or not shape:
            yield f"{name} has the shape {shape}: it holds nothing (saved from a sharded model without gathering?)"
            continue
        ending = next((ending for ending in _PAIRS if name.endswith(f".{ending}")), None)
        if ending is None:
            continue
        module = name[: -len(ending) - 1]
        axis, other = _PAIRS[ending]
        if f"{module}.{other}" not in shapes:
            yield f"{module}.{other} is missing, the other half of {ending}"
        rank = _rank(config, module.removeprefix(PREFIX))
        if len(shape) < 2 or (shape[axis] % rank if per_expert else shape[axis] != rank):
            yield f"{name} has the shape {shape}; expected rank {rank} on axis {axis}, as adapter_config.json says"
        if config.get("use_dora") and axis == 0 and f"{module}.lora_magnitude_vector" not in shapes:
            yield f"{module}.lora_magnitude_vector is missing, though adapter_config.json says use_dora"
    for module, indices in trained_rows(config).items():
        ending = f"{module}.token_adapter.trainable_tokens_delta"
        found = [name for name in shapes if name.endswith(ending)]
        if not any(name.endswith(".trainable_tokens_delta") for name in shapes):  # a tied head has no rows of its own
            yield f"{PREFIX}…{ending.removeprefix('.')} is missing: the rows of {len(indices)} trained tokens"
        for name in found:
            if shapes[name][:1] != (len(indices),):
                yield f"{name} has {shapes[name][0]} rows; expected {len(indices)}, one for each of the trained tokens"


def _rank(config: Mapping[str, Any], module: str) -> int:
    """The rank of a module, as PEFT finds it."""
    rank = config.get("r")
    try:
        for pattern, value in (config.get("rank_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                rank = value
                break
    except (re.error, AttributeError) as error:
        raise AdapterError(f"adapter_config.json: rank_pattern cannot be read: {error}") from error
    if not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"adapter_config.json: the rank of {module}: found {rank!r}, expected a whole number from 1")
    return rank


def trained_rows(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Embedding module ("" = the input embedding) -> the rows of it that were trained."""
    found = config.get("trainable_token_indices") or {}
    rows = {"": found} if isinstance(found, list) else found
    if not isinstance(rows, dict) or not all(
        isinstance(indices, list) and all(isinstance(i, int) and i >= 0 for i in indices) for indices in rows.values()
    ):
        raise AdapterError(
            f"adapter_config.json: trainable_token_indices: found {found!r}, expected lists of row numbers"
        )
    return rows
