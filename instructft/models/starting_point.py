"""What a run begins with, found once: weights, the adapter that is trained further, configuration, new tokens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.adapters import lora
from instructft.adapters.adapter_folder import AdapterFolder, is_adapter, read_adapter
from instructft.adapters.attach import locate_base
from instructft.adapters.frozen_pairs import refuse_more_than_pairs
from instructft.errors import UsageError
from instructft.formatting import nearest
from instructft.models.latest import resolve_latest
from instructft.models.tokenizer import new_tokens, not_loaded
from instructft.recipe.schema import thaw
from instructft.weights import remote_code
from instructft.weights.base_record import BaseModelRecord, base_fingerprint, commit_of, is_hub_id
from instructft.weights.model_class import auto_class, freeze_named, refuse_what_does_not_answer
from instructft.weights.readable import reading

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe

# The recipe's keys for what an adapter folder has fixed, under PEFT's names.
_FIXED = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}

# What follows from the weights, the tokenizer or another key of the recipe.
_NOT_OVERRIDDEN = {"model_type", "architectures", "vocab_size", "quantization_config", "transformers_version", "dtype"}
_NOT_OVERRIDDEN |= {"bos_token_id", "eos_token_id", "pad_token_id", "auto_map"}


# Of a model that is made anew: more than any has, and what could be held nowhere.
_COUNTS = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_attention_heads": 100_000,
    "max_position_embeddings": 100_000_000,
    "vocab_size": 100_000_000,
}


@dataclass(frozen=True)
class StartingPoint:
    """Where a run's weights come from; made by `starting_point` when a run begins, and handed on.

    Args:
        name: for `from_pretrained`: a folder or Hub id, of an adapter that is trained further its base; "": random.
        named: `name_or_path`, `revision` and `subfolder` of that base, as the recipe or the adapter folder names it.
        config: of the base, checked against the recipe. A copy is what is changed.
        new_tokens: ids without a trained embedding in the base, where an adapter is to train their rows.
        tokens: that the embeddings must hold.
        stacked: whether the adapter stays as it is, and a new one is trained on top of it.
    """

    name: str
    revision: str
    subfolder: str
    named: dict[str, Any]
    adapter: AdapterFolder | None
    config: PretrainedConfig
    new_tokens: list[int]
    tokens: int
    stacked: bool = False

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the base's weights, which are fetched for it; an adapter's base was verified when it was found.

        Raises:
            ModelError: the weights are not there, or cannot be read.
        """
        if self.adapter is not None and self.adapter.base.fingerprint:
            return self.adapter.base.fingerprint
        return base_fingerprint(self.name, self.revision, self.subfolder)

    @functools.cached_property
    def commit(self) -> str | None:
        """That the name stands for on the Hub: a branch moves, and later nobody could say which weights these were."""
        from huggingface_hub import try_to_load_from_cache

        folder = Path(self.name).expanduser()
        if not folder.is_dir() and is_hub_id(self.name):
            file = try_to_load_from_cache(
                self.name, f"{self.subfolder}/config.json".lstrip("/"), revision=self.revision
            )
            folder = Path(file).parent if isinstance(file, str) else folder
        return commit_of(folder)

    def facts(self) -> dict[str, Any] | None:
        """The base for `run.json`; None for random weights.

        Example::

            starting_point(load_recipe("gpt2-dolly"), tokenizer).facts()
            # {'name_or_path': 'openai-community/gpt2', 'revision': None, 'subfolder': None, 'commit': '…'}
        """
        if not self.name:
            return None
        over = {"stacked_on": str(self.adapter.folder)} if self.adapter is not None and self.stacked else {}
        return {**self.named, "commit": self.commit, **over}

    def record(self, model: PreTrainedModel, quantization: str) -> BaseModelRecord:
        """The base for `base.json`, with the rows and type of its embedding in training."""
        embedding = model.get_input_embeddings().weight  # (V, D)
        return BaseModelRecord(
            **self.named,
            commit=self.commit,
            fingerprint=self.fingerprint,
            vocab_size=embedding.shape[0],
            quantization=quantization,
            dtype=str(embedding.dtype).removeprefix("torch."),
        )


def starting_point(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> StartingPoint:
    """Find what a run begins with, and check the recipe against it, before weights are loaded.

    Args:
        tokenizer: of `load_tokenizer`.

    Example::

        start = starting_point(load_recipe("tinyllama-lora"), tokenizer)
        start.name, start.revision, start.adapter
        # ('TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T', 'main', None)

    Raises:
        UsageError: the model is unknown or unreadable; `data.max_length` is more than its positions; the adapter does
            not fit the architecture, or is another one than the folder holds.
        AdapterError: the adapter that is to be trained further is not whole, or its base is not there.
    """
    recipe, _ = resolve_latest(recipe)
    model = recipe.model
    adapter = adapter_to_train_further(recipe)
    base = model if adapter is None else adapter.base
    named = {"name_or_path": base.name_or_path, "revision": base.revision, "subfolder": base.subfolder}
    where = (str(model.name_or_path or ""), model.revision or "main", model.subfolder or "")
    if adapter is not None:
        where = (str(locate_base(adapter)), "main", "")
    config = _published_config(*where) if model.config is None else _own_config(model.config, tokenizer)
    refuse_what_does_not_answer(config)
    if model.overrides:
        _override(config, model.overrides, recipe.adapter.type)
    positions = positions_of(config)
    if 0 < positions < recipe.data.max_length and "max_length" in recipe.data.model_fields_set:
        raise UsageError(
            f"data.max_length: {recipe.data.max_length} tokens are more than the {positions} positions of "
            f"{model.name_or_path or 'model.config'}; set data.max_length to {positions} or less"
        )
    coefficient = recipe.train.get("router_aux_loss_coef")
    if coefficient and not hasattr(config.get_text_config(), "output_router_logits"):
        raise UsageError(
            f"train.router_aux_loss_coef: found {coefficient:g}, but {named['name_or_path'] or 'model.config'} "
            f"({config.model_type}) is no mixture of experts with a loss of its router; take it out"
        )
    if model.freeze:
        import torch

        with torch.device("meta"):
            freeze_named(auto_class(config).from_config(copy.deepcopy(config), **remote_code.flag()), model.freeze)
    added: list[int] = []
    if recipe.adapter.stack and adapter is None:
        raise UsageError(
            f"adapter.stack: true, but {model.name_or_path or 'model.config'} is no adapter folder that another could "
            "lie on; write adapter.stack: false"
        )
    if recipe.adapter.type != "none" and (adapter is None or recipe.adapter.stack):
        added = new_tokens(recipe, tokenizer, config.get_text_config().vocab_size)
        lora.check(recipe, config, added)
    return StartingPoint(*where, named, adapter, config, added, len(tokenizer), recipe.adapter.stack)


def positions_of(config: PretrainedConfig) -> int:
    """Tokens that a model can attend to; 0 where there is no end (XLNet says -1)."""
    return max(0, getattr(config.get_text_config(), "max_position_embeddings", None) or 0)


def adapter_to_train_further(recipe: Recipe) -> AdapterFolder | None:
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
            f"model.name_or_path: {name} is a LoRA adapter. To train it further write adapter.type: lora; to train "
            f"all weights merge it first: instructft merge {name} FOLDER"
        )
    adapter = read_adapter(folder)
    if recipe.adapter.stack:
        refuse_more_than_pairs(adapter.config, f"adapter.stack: the adapter in {name}")
        refuse_more_than_pairs(recipe.adapter.peft_kwargs(), "adapter.stack: the new adapter")
    for key, (peft_key, value) in ({} if recipe.adapter.stack else _asked(recipe)).items():
        there = adapter.config.get(peft_key, False)
        if key == "target_modules" and isinstance(there, list):  # where there is a tower, names are written out whole
            named = {next((n for n in value if name == n or name.endswith(f".{n}")), name) for name in there}
            there = sorted(named)
        if there != value:
            say = str(there).lower() if isinstance(there, bool) else there
            raise UsageError(f"adapter.{key}: found {value}, but the adapter in {name} has {say}; write {key}: {say}")
    if recipe.model.quantization != adapter.base.quantization:
        raise UsageError(
            f"model.quantization: found {recipe.model.quantization}, but the adapter in {name} was trained on a base "
            f"with {adapter.base.quantization}; write {adapter.base.quantization}"
        )
    return adapter


def _asked(recipe: Recipe) -> dict[str, tuple[str, Any]]:
    """Key of the recipe -> its name in PEFT and its value, of what an adapter that is trained further has fixed."""
    asked = {key: (peft_key, getattr(recipe.adapter, key)) for key, peft_key in _FIXED.items()}
    asked |= {key: (key, value) for key, value in recipe.adapter.peft_kwargs().items() if key in recipe.adapter.more}
    if isinstance(recipe.adapter.target_modules, tuple):
        asked["target_modules"] = ("target_modules", sorted(recipe.adapter.target_modules))
    return asked


def _published_config(name: str, revision: str, subfolder: str) -> PretrainedConfig:
    from transformers import AutoConfig

    with reading(f"model.name_or_path: {name}", Path(name) / subfolder):
        try:
            return AutoConfig.from_pretrained(
                name, revision=revision, subfolder=subfolder, **remote_code.pinned(name, revision)
            )
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(not_loaded("model.name_or_path", name, "a model", error)) from error


def _override(config: PretrainedConfig, fields: Mapping[str, Any], adapter: str) -> None:
    """Set fields of a published configuration anew, where they mean something and will be known afterwards."""
    text = config.get_text_config()
    known = text.to_dict()
    for name, value in fields.items():
        key = f"model.overrides.{name}"
        if name not in known or name in _NOT_OVERRIDDEN:
            hint = nearest(name, sorted(known.keys() - _NOT_OVERRIDDEN))
            raise UsageError(f"{key}: {text.model_type} has no such field that could be set anew{hint}")
        if adapter != "none" and "drop" not in name:
            raise UsageError(
                f"{key}: an adapter is loaded over its base's own configuration later, which would not have this; over "
                "an adapter only dropout may be set anew, which trains and does not answer"
            )
        old = known[name]
        numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (old, value)]
        if numbers == [True, False]:
            raise UsageError(f"{key}: found {value!r}, expected a number such as {old!r}, which the model has")
        setattr(text, name, thaw(value))


def _own_config(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Of a model that starts from random weights; what it does not say follows the tokenizer."""
    from transformers import AutoConfig

    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    follows = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in special}}
    try:
        config = AutoConfig.for_model(**{**follows, **thaw(fields)})
    except Exception as error:  # a configuration checks its fields as it likes
        raise UsageError(f"model.config: {' '.join(str(error).split())}") from error
    for name, most in _COUNTS.items():
        count = getattr(config.get_text_config(), name, None)
        if isinstance(count, int) and not 1 <= count <= most:
            key = config.attribute_map.get(name, name)
            raise UsageError(f"model.config.{key}: found {count:,}, expected a number from 1 to {most:,}")
    if len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"model.config.vocab_size: {config.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens; "
            "leave the key out, and it follows the tokenizer"
        )
    return config
