"""Where a run's weights come from: the model that a recipe names, or the base of an adapter that is trained further."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from instructft.adapters.attach import AdapterFolder, is_adapter, locate_base, read_adapter
from instructft.errors import UsageError
from instructft.weights.base_record import commit_of, is_hub_id

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe

# The recipe's keys for what an adapter folder has fixed, under PEFT's names.
_FIXED = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}


def adapter_to_go_on_with(recipe: Recipe) -> AdapterFolder | None:
    """The adapter folder that `model.name_or_path` is, if it is one.

    Raises:
        UsageError: the recipe asks for another adapter than the one that is there, or for none.
        AdapterError: the adapter is not whole.
    """
    name = recipe.model.name_or_path
    folder = Path(name or "").expanduser() / (recipe.model.subfolder or "")
    if name is None or not is_adapter(folder):
        return None
    if recipe.adapter.type == "none":
        raise UsageError(
            f"model.name_or_path: {name} is a LoRA adapter. To go on training it write adapter.type: lora; to train "
            f"all weights merge it first: instructft merge {name} FOLDER"
        )
    adapter = read_adapter(folder)
    asked = {key: (peft_key, getattr(recipe.adapter, key)) for key, peft_key in _FIXED.items()}
    asked |= {key: (key, value) for key, value in recipe.adapter.peft_kwargs().items() if key in recipe.adapter.more}
    if isinstance(recipe.adapter.target_modules, tuple):
        asked["target_modules"] = ("target_modules", sorted(recipe.adapter.target_modules))
    for key, (peft_key, value) in asked.items():
        there = adapter.config.get(peft_key, False)
        there = sorted(there) if key == "target_modules" and isinstance(there, list) else there
        if there != value:
            say = str(there).lower() if isinstance(there, bool) else there
            raise UsageError(f"adapter.{key}: found {value}, but the adapter in {name} has {say}; write {key}: {say}")
    if recipe.model.quantization != adapter.base.quantization:
        raise UsageError(
            f"model.quantization: found {recipe.model.quantization}, but the adapter in {name} was trained on a base "
            f"with {adapter.base.quantization}; write {adapter.base.quantization}"
        )
    return adapter


def weights_of(recipe: Recipe) -> tuple[str, str, str]:
    """(name, revision, subfolder) for `from_pretrained`.

    >>> weights_of(load_recipe("tinyllama-lora"))
    ('TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T', 'main', '')
    """
    adapter = adapter_to_go_on_with(recipe)
    if adapter is not None:
        return str(locate_base(adapter)), "main", ""
    return str(recipe.model.name_or_path), recipe.model.revision or "main", recipe.model.subfolder or ""


def base_record(recipe: Recipe) -> dict[str, str | None]:
    """`name_or_path`, `revision` and `subfolder` of the base, as an adapter folder names it."""
    adapter = adapter_to_go_on_with(recipe)
    base = recipe.model if adapter is None else adapter.base
    return {"name_or_path": base.name_or_path, "revision": base.revision, "subfolder": base.subfolder}


def started_from(recipe: Recipe) -> dict[str, str | None] | None:
    """`base_record` with the commit that the name stood for when the base was fetched; None for random weights.

    A branch on the Hub moves on: without its commit nobody could say later which weights these were.

    >>> started_from(load_recipe("gpt2-dolly"))
    {'name_or_path': 'openai-community/gpt2', 'revision': None, 'subfolder': None, 'commit': '…'}
    """
    if recipe.model.config is not None:
        return None
    from huggingface_hub import try_to_load_from_cache

    name, revision, subfolder = weights_of(recipe)
    folder = Path(name).expanduser()
    if not folder.is_dir() and is_hub_id(name):
        file = try_to_load_from_cache(name, f"{subfolder}/config.json".lstrip("/"), revision=revision)
        folder = Path(file).parent if isinstance(file, str) else folder
    return {**base_record(recipe), "commit": commit_of(folder)}
