"""Finds and loads what training left, by name or path: a run folder, a checkpoint, an adapter folder, a Hub id.

An adapter comes on its base, so that every command takes it as it takes a full model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from instructft.adapters import quantization
from instructft.adapters.adapter_folder import AdapterFolder, is_adapter, read_adapter
from instructft.adapters.attach import attach, check_fit, locate_base
from instructft.errors import ModelError, ModelFileError, UsageError
from instructft.models.first_look import missing
from instructft.models.kernels.activations import fuse_activations
from instructft.models.tokenizer import adds_bos
from instructft.prompt.templates import TEMPLATES
from instructft.weights import remote_code
from instructft.weights.base_record import adapter_on_hub, commit_of
from instructft.weights.model_class import auto_class
from instructft.weights.readable import reading, require_patterns_end

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def locate(name: str) -> tuple[str, str]:
    """The folder or Hub id that `name` stands for, and its revision, without loading anything.

    >>> locate("org/name@v2")
    ('org/name', 'v2')

    Raises:
        UsageError: it is neither a folder with a model or an adapter nor a Hub id.
        AdapterError: it is an adapter folder that is broken.
    """
    return _find(name)[:2]


def find_adapter(name: str) -> AdapterFolder | None:
    """The adapter that a folder or Hub id holds; None for any other model.

    Raises:
        AdapterError: it is broken.
    """
    return _find(name, on_hub=True)[2]


def _find(name: str, on_hub: bool = False) -> tuple[str, str, AdapterFolder | None]:
    """Folder or Hub id, revision, and the adapter that is there: read once, and from the Hub where that is asked."""
    path = Path(name).expanduser()
    if not path.exists():
        if why := missing(name, bare=False, cached=False):
            raise UsageError(why)
        location, _, revision = name.partition("@")
        folder = adapter_on_hub(location, revision) if on_hub else None
        return location, revision or "main", read_adapter(folder) if folder else None
    if is_adapter(path):
        return str(path), "main", read_adapter(path)
    if not (path / "config.json").is_file():
        checkpoints = sorted(p.name for p in path.glob("checkpoint-*"))
        hint = f"; its run is unfinished, but it holds {', '.join(checkpoints)}" if checkpoints else ""
        raise UsageError(f"{name} holds no model (there is no adapter_config.json and no config.json in it){hint}")
    return str(path), "main", None


def load_for_inference(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a run folder, a checkpoint in it, any other folder, or a Hub id `org/name[@revision]`, ready to answer.

    The device is CUDA, else MPS, else the CPU; weights keep their dtype on a GPU and are float32 on the CPU. A model
    without a chat template is asked with the template `instruction`, and stderr says so.

    An adapter folder, or one on the Hub, comes as a `peft.PeftModel` on its base. A base that was quantized in training
    is quantized again where bitsandbytes works; elsewhere it comes whole, and stderr says so.

    Raises:
        UsageError: there is no such model.
        AdapterError: an adapter that is broken, or does not fit its base; before weights are loaded.
        ModelError: it is there, but cannot be loaded whole.
    """
    model, tokenizer = load_bare(name)
    return model, with_template(name, tokenizer)


def with_template(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that its model is asked with; stderr says where that is not its own."""
    if isinstance(tokenizer.chat_template, dict):  # some models carry several; the one for chatting is called default
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        print(f"{name} has no chat template; it is asked with the template instruction.", file=sys.stderr)
        text = TEMPLATES["instruction"].text()
        tokenizer.chat_template = ("{{- bos_token -}}\n" if adds_bos(tokenizer) else "") + text
    return tokenizer


def load_tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `load_for_inference`, without the model.

    Raises:
        UsageError, AdapterError, ModelError: as there.
    """
    return with_template(name, load_bare_tokenizer(name))


def load_bare_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`load_tokenizer_of` with the chat template that was saved, or none."""
    location, revision, adapter = _find(name, on_hub=True)
    if adapter is None:
        return _load_tokenizer(name, location, revision=revision)
    return _tokenizer_of(name, adapter, locate_base(adapter))


def context_of(name: str) -> int | None:
    """Tokens that a model takes, by its configuration alone; None where that names no end.

    Raises:
        UsageError, AdapterError, ModelError: as `load_for_inference`.
    """
    from transformers import AutoConfig

    location, revision, adapter = _find(name, on_hub=True)
    if adapter is not None:
        location, revision = str(locate_base(adapter)), "main"
    trust = remote_code.pinned(location, revision)
    config = _whole(name, AutoConfig.from_pretrained, location, **{"revision": revision, **trust})
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return positions if positions > 0 else None


def load_bare(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_for_inference` for a caller that brings the chat template: the tokenizer's stays as it was saved."""
    location, revision, adapter = _find(name, on_hub=True)
    if adapter is None:
        tokenizer = _load_tokenizer(name, location, revision=revision)
        return _load_weights(name, location, revision=revision), tokenizer
    base = locate_base(adapter)
    check_fit(adapter, base)
    tokenizer = _tokenizer_of(name, adapter, base)
    model = attach(load_base(adapter, base), adapter)
    if (adapter.folder / "generation_config.json").is_file():
        model.generation_config = _whole(name, type(model.generation_config).from_pretrained, adapter.folder)
    return model, tokenizer


def load_base(adapter: AdapterFolder, base: Path | None = None) -> PreTrainedModel:
    """The base of an adapter as it is before training, from `base` (default: `locate_base`), as `load_for_inference`.

    Raises:
        AdapterError: it is not there, or another one.
        ModelError: it cannot be loaded whole.
    """
    import torch

    base = base or locate_base(adapter)
    device, options = _device(), _quantized(adapter)
    if device != "cpu" and adapter.base.fingerprint:
        options["dtype"] = getattr(torch, adapter.base.dtype)
    return _load_weights(str(base), str(base), **options)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _tokenizer_of(name: str, adapter: AdapterFolder, base: Path) -> PreTrainedTokenizerBase:
    """An adapter's tokenizer: beside it, beside its run where this is a checkpoint, or its base's."""
    here = adapter.folder.resolve()
    places = [here, here.parent, base] if here.name.startswith("checkpoint-") else [here, base]
    place = next((p for p in places if (p / "tokenizer_config.json").is_file()), base)
    if commit := commit_of(place) if place == base else None:  # of a base on the Hub only its weights were fetched
        return _load_tokenizer(name, adapter.base.name_or_path, revision=commit, subfolder=adapter.base.subfolder or "")
    return _load_tokenizer(name, str(place))


def _load_tokenizer(name: str, location: str, **where: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    trust = remote_code.pinned(location, where.get("revision"))
    tokenizer = _whole(name, AutoTokenizer.from_pretrained, location, **where, **trust)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of a folder with none
        raise ModelError(f"{name} has no tokenizer: there is none in {location}; save one there")
    require_patterns_end(tokenizer, name)
    return cast("PreTrainedTokenizerBase", tokenizer)


def _quantized(adapter: AdapterFolder) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base as it was held in training; none where that does not work here."""
    import torch

    how, device = adapter.base.quantization, _device()
    if how == "none":
        return {}
    if trouble := quantization.trouble_with(device, how):
        print(
            f"{adapter.folder} was trained on a base with {how} weights through bitsandbytes, which {trouble}: the "
            "base is loaded unquantized, and answers may differ a little.",
            file=sys.stderr,
        )
        return {}
    dtype = torch.float32 if device == "cpu" else getattr(torch, adapter.base.dtype)
    return {"quantization_config": quantization.configuration(how, dtype), "device_map": {"": device}}


def _load_weights(name: str, location: str, **options: Any) -> PreTrainedModel:
    """`from_pretrained` that takes no missing weight for granted, in evaluation mode on this machine's device."""
    import torch
    from transformers import AutoConfig

    device = _device()
    options = {"dtype": torch.float32 if device == "cpu" else "auto", **options}
    options |= remote_code.pinned(location, options.get("revision"))
    where = {key: options[key] for key in ("revision", "trust_remote_code", "code_revision") if key in options}
    config = _whole(name, AutoConfig.from_pretrained, location, **where)
    load = auto_class(config).from_pretrained
    model, info = _whole(name, load, location, config=config, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers and goes on
        raise ModelFileError(
            f"{name} is not whole: it holds no weights for {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    placed = model if "device_map" in options else model.to(device)
    fuse_activations(placed)
    return cast("PreTrainedModel", quantization.fix_layout(placed).eval())


def _whole(name: str, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `load` returns of the folder or Hub id that it is given first; its many ways to fail as a `ModelError`."""
    with reading(name, args[0]):
        return load(*args, **options)
