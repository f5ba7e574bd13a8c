"""Reads a file of `torch.save` that holds a GPT-2 state dict: its tensors, and the sizes that were saved beside them.

::

    {"transformer.wte.weight": …}                            a bare state dict
    {"model": {…}, "model_args": {…}, "optimizer": …}        nanoGPT
    {"model": {…}, "config": GPTConfig(…), "step": …}        build-nanogpt
    {"model_state_dict": {…}, "optimizer_state_dict": …}     LLMs from scratch
    {"state_dict": {…}, "hyper_parameters": {…}}             Lightning

Nothing in the file is run: it is read with `weights_only=True`. A settings object such as build-nanogpt's `GPTConfig`
is read into a plain stand-in of this module, so that its own class is never looked up.
"""

from __future__ import annotations

import errno
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError
from instructft.formatting import first_line, short

if TYPE_CHECKING:
    import torch

STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state")
# Where sizes lie, the surest first: nanoGPT's `config` holds what was asked for, `model_args` what was built.
SETTINGS_KEYS = ("model_args", "model_config", "hyper_parameters", "hparams", "config", "cfg", "args")
# our name -> what others call it
_NAMES = {
    "n_layer": ("n_layer", "n_layers", "num_layers", "num_hidden_layers"),
    "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads"),
    "n_embd": ("n_embd", "emb_dim", "d_model", "embed_dim", "hidden_size"),
    "block_size": ("block_size", "context_length", "n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
    "dropout": ("dropout", "drop_rate"),
    "bias": ("bias",),
    "activation": ("activation_function",),
}
# A setting with one of these in its name, switched on, makes another model than GPT-2 of the same tensors.
_OTHER_MODEL = re.compile(
    r"rms|(?:^|_)rope|rotary|alibi|relu|glu|softerm|softcap|moe|expert|qk_norm|window|post_?norm|"
    r"parallel_(?:residual|block)"
)
_SETTINGS_CLASS = re.compile(r"(Config|Configuration|Args|Arguments|Namespace|Params|Options|Settings)$")
_KINDS = "a state dict, or a dict that holds one under " + ", ".join(STATE_KEYS)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Args:
        place: the key under which the state dict lay; empty for a bare one.
        tensors: by the names in the file.
        settings: sizes by nanoGPT's names (`n_layer`, `n_head`, …), as far as the file gives them.
        settings_place: the key under which they lay; empty for none.
        left_out: the other keys of the file, as `optimizer`.
    """

    file: Path
    place: str
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]
    settings_place: str
    left_out: tuple[str, ...]


class _Settings:
    """Stands in for the class of a settings object; it has its values and none of its code."""

    def __init__(self, *_: Any, **values: Any):
        self.__dict__.update(values)


def read_file(file: Path) -> Checkpoint:
    """Read a checkpoint file; its tensors are mapped, not copied into memory, where its format allows it.

    Example::

        read_file(Path("ckpt.pt")).settings["n_head"]
        # 12

    Raises:
        UsageError: it is not there, no such file, holds code, or holds no state dict.
    """
    import torch

    found = _load(file)
    if not isinstance(found, Mapping):
        raise UsageError(f"{file} holds a {type(found).__name__}, expected {_KINDS}")
    place, state = "", found
    if not _is_state(found):
        place = next((key for key in STATE_KEYS if _is_state(found.get(key))), "")
        if not place:
            keys = ", ".join(str(key) for key in list(found)[:8]) or "nothing"
            raise UsageError(f"{file} holds {keys}, expected {_KINDS}")
        state = found[place]
    if odd := [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise UsageError(f"{file}: {', '.join(odd[:5])} in its state dict: no tensor ({len(odd)} in all)")
    tensors = {str(key): value.detach() for key, value in state.items()}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UsageError(f"{file}: {name} is packed or sparse, expected plain weights")
    settings_place, settings = _settings(file, found) if place else ("", {})
    others = tuple(str(key) for key in found if key not in (place, settings_place)) if place else ()
    return Checkpoint(file, place, tensors, settings, settings_place, others)


def _is_state(value: Any) -> bool:
    import torch

    if not isinstance(value, Mapping):
        return False
    tensors = [key for key, item in value.items() if isinstance(item, torch.Tensor)]
    return any("." in str(key) for key in tensors) and len(tensors) * 2 > len(value)


def _load(file: Path) -> Any:
    import torch

    if file.is_dir():
        raise UsageError(
            f"{file} is a folder, expected a file of torch.save; from_pretrained loads folders as they are"
        )
    if not file.is_file():
        raise UsageError(f"there is no file {file}; name the checkpoint, as out/ckpt.pt")
    _refuse_damaged_archive(file)
    foreign = _foreign_classes(file)
    if code := [name for name in foreign if not _SETTINGS_CLASS.search(name)]:
        raise _holds_code(file, ", ".join(code[:5]))
    try:
        with torch.serialization.safe_globals([(_Settings, name) for name in foreign]):
            try:
                return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # a file in the format from before torch 1.6, which cannot be mapped
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _holds_code(file, name[1]) from error
        raise _unreadable(file, error) from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a seek beyond the end of a file that is cut short
            raise _unreadable(file, error) from error
        raise UsageError(f"{file} could not be read: {error.strerror or error}") from error
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError) as error:
        raise _unreadable(file, error) from error


def _refuse_damaged_archive(file: Path) -> None:
    """What torch writes is a ZIP archive with a sum for every entry, and torch compares none of them."""
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, zlib.error) as error:
        raise _unreadable(file, error) from error
    if damaged:
        raise UsageError(f"{file} is damaged: {damaged} in it is not what was written (its sum differs); copy it again")


def _foreign_classes(file: Path) -> list[str]:
    """The classes and functions that a file names beside tensors; empty where its format does not tell."""
    import torch

    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, pickle.UnpicklingError, EOFError):
        return []


def _holds_code(file: Path, names: str) -> UsageError:
    return UsageError(
        f"{file} holds more than tensors and numbers ({names}): to load it would run code, and it was not loaded. "
        "Where it was made, save the state dict alone: torch.save(model.state_dict(), 'model.pt')"
    )


def _unreadable(file: Path, error: Exception) -> UsageError:
    reason = f"{type(error).__name__}: {short(first_line(error), 200)}"
    return UsageError(f"{file} is no file of torch.save, or is cut short; expected {_KINDS}\n  {reason}")


def _settings(file: Path, found: Mapping[Any, Any]) -> tuple[str, dict[str, Any]]:
    """The first settings that give a size of the model, by our names, and the key under which they lie."""
    for place in SETTINGS_KEYS:
        value = found.get(place)
        raw = vars(value) if isinstance(value, _Settings) else value
        if not isinstance(raw, Mapping):
            continue
        known = {ours: raw[name] for ours, names in _NAMES.items() for name in names if name in raw}
        if not known.keys() & {"n_layer", "n_head", "n_embd"}:
            continue
        taken = {name for names in _NAMES.values() for name in names}
        other = [f"{key}={value}" for key, value in raw.items() if key not in taken and _switched_on(str(key), value)]
        if other:
            raise UsageError(
                f"{file}: {place} says {', '.join(other[:5])}, which GPT-2 does not have; such a model cannot be "
                "converted into one"
            )
        return place, known
    return "", {}


def _switched_on(name: str, value: Any) -> bool:
    off = value is None or value is False or value == 0 or str(value).lower() in ("none", "false", "")
    return bool(_OTHER_MODEL.search(name.lower())) and not off
