"""Which keys a recipe may hold, and what each expects, in words: for error messages and for the schema."""

from __future__ import annotations

import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from instructft.formatting import nearest
from instructft.recipe.aliases import ADAPTER_HOMES, TRAIN_BOUNDS, TRAIN_HOMES, VALUE_HINTS
from instructft.recipe.yaml_reader import KeyPath
from instructft.redaction import is_secret

# Keys of `train:` that are ours, also where SFTConfig has one of that name; all the others are fields of SFTConfig.
OWN_TRAIN_FIELDS: dict[str, dict[str, Any]] = {
    "tokens_per_step": {
        "kinds": ["int", "null"],
        "default": None,
        "help": "global batch in tokens; sets the accumulation",
    },
    "loss_spike_limit": {
        "kinds": ["float", "null"],
        "default": 3.0,
        "help": "times the median loss of the last 50 steps; a step beyond it is told with its rows. null: never",
    },
    "on_loss_spike": {
        "kinds": ["str"],
        "default": "warn",
        "choices": ["warn", "skip"],
        "help": "whether a step beyond loss_spike_limit is taken all the same, or left out",
    },
    "on_divergence": {
        "kinds": ["str"],
        "default": "stop",
        "choices": ["stop", "warn"],
        "help": "at a loss above the first one and above that of a uniform guess: end the run, or only say it",
    },
    "early_stopping_patience": {
        "kinds": ["int", "null"],
        "default": None,
        "help": "evaluations without a better one after which training ends, with the best checkpoint: the lowest "
        "validation loss, or the figure of the answers that train.metric_for_best_model names",
    },
    "torch_compile": {
        "kinds": ["bool", "str"],
        "default": "auto",
        "choices": ["auto"],
        "help": "compile each block of the model, once; auto: on a GPU, where batches have one shape and the run is "
        "long enough to earn it",
    },
    "torch_compile_backend": {"kinds": ["str", "null"], "default": None, "help": "compiler; null: inductor"},
    "torch_compile_mode": {"kinds": ["str", "null"], "default": None, "help": "mode of the compiler inductor"},
    "save_in_background": {
        "kinds": ["bool", "str"],
        "default": "auto",
        "choices": ["auto"],
        "help": "write checkpoints beside training, from a copy in host memory; auto: on a GPU, where host memory has "
        "room for it. One process only",
    },
    "row_history": {
        "kinds": ["bool"],
        "default": True,
        "help": "keep the loss of each training row at its first and last sight, in rows.parquet; `instructft rows` "
        "reads it",
    },
    "evaluation_budget": {
        "kinds": ["float", "null"],
        "default": 0.1,
        "help": "share of the time trained that evaluations, samples and warnings may take; what is due waits, the "
        "last never. null: nothing waits, and the default where eval_steps or eval_strategy is written",
    },
    "fp8": {
        "kinds": ["bool"],
        "default": False,
        "help": "make the matrix products of the blocks in 8-bit floats, on GPUs that have them; trains all weights",
    },
    "float32_copies": {
        "kinds": ["bool"],
        "default": False,
        "help": "keep float32 copies of bfloat16 weights (model.dtype) in the optimizer, which moves these and rounds "
        "them into the weights: no cast in a step, no update lost; trains all weights",
    },
    "deterministic": {
        "kinds": ["bool"],
        "default": False,
        "help": "only kernels whose results never vary, so that runs on a GPU are equal to the last bit too; slower",
    },
}
_KIND_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_KIND_WORDS |= {"list": "a list", "dict": "a mapping", "null": "null"}


@functools.cache
def _shipped_fields() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(__file__).with_name("sft_config_fields.json").read_text(encoding="utf-8"))
    return content


@functools.cache
def legal_train_fields() -> dict[str, dict[str, Any]]:
    """Name -> kinds, default, choices and help of every key that `train:` takes."""
    fields = {name: row for name, row in _shipped_fields()["sft_config"].items() if name not in TRAIN_HOMES}
    theirs = {name: row for name, row in fields.items() if name not in OWN_TRAIN_FIELDS and not is_secret(name)}
    return OWN_TRAIN_FIELDS | theirs


@functools.cache
def legal_lora_fields() -> dict[str, dict[str, Any]]:
    """Name -> kinds, default, choices and help of every field of peft.LoraConfig that `adapter:` takes as it is."""
    return {name: row for name, row in _shipped_fields()["lora_config"].items() if name not in ADAPTER_HOMES}


def section_keys(model: type[BaseModel]) -> list[str]:
    """The legal keys of a section: its fields, less those that hold what is known about the recipe itself."""
    return [name for name, field in model.model_fields.items() if not field.exclude]


def show(value: Any) -> str:
    """What was found, in words that fit on a line.

    >>> show("long"), show(True), show([1, 2])
    ('"long" (text)', 'true', 'a list')
    """
    if isinstance(value, str):
        return f'"{value[:60]}…" (text)' if len(value) > 60 else f'"{value}" (text)'
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing (null)" if value is None else str(value)


def value_hint(key: str, value: Any, wants: str) -> str:
    """What else may help: a word of another tool, a word that YAML 1.1 took for true, a number in quotes."""
    if isinstance(value, str):
        if hint := VALUE_HINTS.get((key, value.lower())):
            return f"; {hint}"
        if "true or false" in wants and value.lower() in ("yes", "no", "on", "off", "y", "n"):
            return (
                f"; in YAML 1.2 `{value}` is a word, write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
            )
        if "number" in wants and re.fullmatch(r"[-+]?[\d._]+(e[-+]?\d+)?", value, re.IGNORECASE):
            return "; take the quotes off"
    return ""


def field_problem(key: str, row: Mapping[str, Any], value: Any) -> str:
    """What is wrong with a field of SFTConfig or LoraConfig, or "".

    >>> field_problem("train.max_steps", {"kinds": ["int"]}, "ten")
    'found "ten" (text), expected a whole number above 0 (steps), or -1 to follow num_train_epochs'
    """
    kinds, choices = row["kinds"], row.get("choices", [])
    least, greatest, words = TRAIN_BOUNDS.get(key.removeprefix("train."), (None, None, ""))
    if choices:
        few = choices if len(choices) < 10 else [*choices[:8], "…"]
        others = [_KIND_WORDS[kind] for kind in kinds if kind != "str"]
        words = " or ".join([f"one of {', '.join(few)}", *others])
    wants = words or " or ".join(_KIND_WORDS[kind] for kind in kinds)
    fits = {
        bool: "bool" in kinds,
        int: "int" in kinds or "float" in kinds,
        float: "float" in kinds and isinstance(value, float) and math.isfinite(value),
        str: "str" in kinds,
        list: "list" in kinds,
        dict: "dict" in kinds,
        type(None): "null" in kinds,
    }[type(value)]
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    strange = [text for text in texts if choices and text not in choices]
    if strange:
        hint = value_hint(key, strange[0], wants) or nearest(strange[0], choices)
        return f"found {show(strange[0])}, expected {wants}{hint}"
    if fits and isinstance(value, int | float) and not isinstance(value, bool):
        steps = key in ("train.logging_steps", "train.eval_steps", "train.save_steps") and value > 1
        fits = (least is None or value >= least) and (greatest is None or value <= greatest)
        fits = fits and not (steps and value != int(value)) and not (key == "train.max_steps" and value == 0)
    return "" if fits else f"found {show(value)}, expected {wants}{value_hint(key, value, wants)}"


def wrong_value(key: str, value: Any, model: type[BaseModel], path: KeyPath) -> str:
    """What is wrong with the value of one of our own keys."""
    wants = describe(model, path)
    choices = (
        re.findall(r"[\w-]+", wants.partition(" (")[0].removeprefix("one of")) if wants.startswith("one of") else []
    )
    hint = value_hint(key, value, wants) or (nearest(value, choices) if isinstance(value, str) else "")
    found = "empty" if value in ("", [], {}) else f"found {show(value)}"
    return f"{found}, expected {wants}{hint}"


def describe(model: type[BaseModel], path: KeyPath) -> str:
    """What is expected at a path: the kind of value, its bounds and its unit.

    >>> from instructft.recipe.schema import Recipe
    >>> describe(Recipe, ("data", "max_length"))
    'a whole number above 1 (tokens per row)'
    """
    annotation: Any = model
    field: FieldInfo | None = None
    for part in path:
        section = section_of(annotation)
        if isinstance(part, int):
            annotation, field = typing.get_args(_list_of(annotation))[0], None
        elif section is not None and part in section.model_fields:
            field = section.model_fields[str(part)]
            annotation = field.annotation
        else:
            annotation, field = str, None  # a value of a mapping
    bounds = "".join(
        f" {word} {getattr(limit, name)}"
        for limit in (field.metadata if field else [])
        for name, word in {"gt": "above", "ge": "from", "lt": "below", "le": "to"}.items()
        if getattr(limit, name, None) is not None
    )
    unit = (field.description or "").partition(";")[0] if field else ""
    return _kind(annotation) + bounds + (f" ({unit})" if unit else "")


def _kind(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in args if part is not type(None))
    if origin is typing.Literal:
        return f"one of {', '.join(args)}" if len(args) > 1 else str(args[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with keys such as {', '.join(section_keys(annotation)[:4])}"
    if origin is tuple and section_of(annotation):
        return "a name, a mapping, or a list of these"
    known = {int: "int", float: "float", bool: "bool", str: "str", tuple: "list"}
    return _KIND_WORDS[known.get(origin or annotation, "dict")]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, also in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := section_of(part))), None)


def _list_of(annotation: Any) -> Any:
    """The `tuple[…]` in an annotation."""
    if typing.get_origin(annotation) is tuple:
        return annotation
    return next((part for part in typing.get_args(annotation) if typing.get_origin(part) is tuple), tuple[str, ...])


@functools.cache
def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Key -> the dotted paths at which it is legal."""
    found: dict[str, list[str]] = {}
    for key in section_keys(model):
        section = section_of(model.model_fields[key].annotation)
        if section is None and key not in ("train",):
            found.setdefault(key, []).append(prefix + key)
        elif section is not None:
            inner = prefix + key + (".0." if typing.get_origin(model.model_fields[key].annotation) is tuple else ".")
            if key in ("datasets", "validation", "test"):
                found.setdefault(key, []).append(prefix + key)
            if key in ("validation", "test"):
                continue  # entries like those of `datasets`, which are named already
            for name, paths in leaves(section, inner).items():
                found.setdefault(name, []).extend(paths)
    if not prefix:
        for name in legal_train_fields():
            found.setdefault(name, []).append(f"train.{name}")
        for name in legal_lora_fields():
            found.setdefault(name, []).append(f"adapter.{name}")
    return {name: list(dict.fromkeys(paths)) for name, paths in found.items()}
