"""The base model of an adapter: where it lies, here or on the Hub, and the record of it beside the adapter."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from instructft.errors import AdapterError, ModelError
from instructft.formatting import first_line
from instructft.weights.weight_files import NAMES, fingerprint

BASE = "base.json"


@dataclass(frozen=True)
class BaseModelRecord:
    """The base that an adapter was trained on, as `base.json` has it."""

    name_or_path: str  # as the recipe named it
    revision: str | None = None
    subfolder: str | None = None
    commit: str | None = None  # that `revision` stood for on the Hub
    fingerprint: str = ""  # "": never recorded, so the base cannot be verified
    vocab_size: int = 0  # rows of the input embedding in training, new tokens included; 0: as many as the base has
    quantization: str = "none"  # none | 8bit | 4bit: how the base was held in training
    dtype: str = "float32"  # of the base's weights in training

    def write(self, folder: str | Path) -> None:
        """Write `base.json` beside an adapter."""
        (Path(folder) / BASE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def base_folder(name: str, revision: str | None = None, subfolder: str | None = None) -> Path | None:
    """The local folder with the configuration and weights of a base, fetched from the Hub where `name` is an id there.

    Of a Hub repository only what `from_pretrained` reads is fetched: no other formats, no other folders. With
    HF_HUB_OFFLINE=1, or without a network, the cache serves. None: there is no such folder, and the Hub has no such
    id, or it cannot be reached and the cache does not hold it.

    Raises:
        AdapterError: `subfolder` leaves the repository.
    """
    if not stays_inside(subfolder):
        raise AdapterError(f"subfolder: found {subfolder}, expected a folder inside {name}")
    local = Path(name).expanduser() / (subfolder or "")
    if (local / "config.json").is_file():
        return local
    if not is_hub_id(name):
        return None
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    where: Any = {"revision": revision or "main", "subfolder": subfolder or ""}
    optional = {
        **where,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        config = cached_file(name, "config.json", **optional)
        if config is None:
            return None
        cached_file(name, "generation_config.json", **optional)
        for single, index in NAMES:
            if cached_file(name, single, **optional):
                break
            if found := cached_file(name, index, **optional):
                get_checkpoint_shard_files(name, found, **where)
                break
    except (OSError, ValueError):
        return None
    return Path(config).parent


def stays_inside(path: str | None) -> bool:
    """Whether a path lies within the folder or repository that it is relative to, on any system.

    >>> stays_inside("instruct/"), stays_inside("a/../../b"), stays_inside("C:/b")
    (True, False, False)
    """
    text = path or ""
    return not (text.startswith(("/", "~")) or ".." in text.split("/") or re.search(r"[\\:\x00-\x1f]", text))


# what an adapter repository may hold beside its configuration
_ADAPTER_FILES = [
    "adapter_model.safetensors",
    BASE,
    "generation_config.json",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
]


def adapter_on_hub(name: str, revision: str | None = None) -> Path | None:
    """The local copy of an adapter on the Hub, from the cache where it can; None: `name` is no adapter there.

    Raises:
        ModelError: it is one, but its files could not be fetched.
    """
    if not is_hub_id(name):
        return None
    from transformers.utils.hub import cached_file, cached_files

    quiet: Any = {
        "revision": revision or "main",
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    try:
        config = cached_file(name, "adapter_config.json", **quiet)
    except (OSError, ValueError):  # no such repository: whoever loads the model says so
        return None
    if config is None:
        return None
    try:
        cached_files(name, _ADAPTER_FILES, **quiet)
    except (OSError, ValueError) as error:
        raise ModelError(f"the adapter {name} could not be fetched: {first_line(error)}") from error
    return Path(config).parent


def is_hub_id(name: str) -> bool:
    """Whether the Hub could know a repository by this name.

    >>> is_hub_id("openai-community/gpt2"), is_hub_id("./models/gpt2")
    (True, False)
    """
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder in the Hub's cache is a copy of; None for any other folder."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", folder.as_posix())
    return found.group(1) if found else None


def base_fingerprint(name_or_path: str, revision: str | None = None, subfolder: str | None = None) -> str:
    """`weight_files.fingerprint` of a model that a folder or Hub id names.

    Raises:
        ModelError: the model is not there, or its weights cannot be read.
    """
    found = base_folder(name_or_path, revision, subfolder)
    if found is None:
        raise ModelError(f"the base {name_or_path} is neither a folder with a config.json nor to be had from the Hub")
    return fingerprint(found)
