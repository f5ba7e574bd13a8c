"""Reads weight files by their headers: which tensors a model has, a fingerprint, and whether a saved model is whole.

Nothing is loaded: a base of many gigabytes takes well under a second. Where processes share the weights of a model
among them, each holds a part only, and what one of them writes can be a folder that loads and answers nonsense; so a
model that was just saved is looked at before it gets its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instructft.errors import ModelError, ModelFileError
from instructft.formatting import first_line

BLOCKS, BLOCK = 16, 4096  # of a tensor's bytes the fingerprint reads this many blocks of this size

# types as a safetensors header spells them -> torch's name, bytes of an element
DTYPES = {
    **{"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)},
    **{"F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1)},
    **{"F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1)},
    **{f"I{8 * size}": (f"int{8 * size}", size) for size in (8, 4, 2, 1)},
    **{f"U{8 * size}": (f"uint{8 * size}", size) for size in (8, 4, 2, 1)},
    **{"BOOL": ("bool", 1), "C64": ("complex64", 8)},
}


class Entry(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str  # as the format spells it: F32, BF16, …
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name, without their values. The file must be whole.

    Format: https://huggingface.co/docs/safetensors/index#format

    Example::

        read_header(Path("model.safetensors"))["lm_head.weight"]
        # Entry(dtype='BF16', shape=(32000, 4096), start=2048, end=262146048)

    Raises:
        ModelFileError: it is no such file, or its end is missing.
    """
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_size < 8 or not 2 <= length <= file_size - 8:
                raise ModelFileError(f"{path} is cut short or no safetensors file; copy or download it again")
            header = json.loads(file.read(length))
        entries = {
            name: Entry(t["dtype"], tuple(t["shape"]), *(8 + length + offset for offset in t["data_offsets"]))
            for name, t in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise ModelFileError(f"{path} could not be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path} is no safetensors file: its header cannot be read; download it again") from error
    if bad := next((name for name, entry in entries.items() if not _sound(entry)), None):
        raise ModelFileError(f"{path} is no safetensors file: its header does not say what {bad} is")
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        size = DTYPES[entry.dtype][1] if entry.dtype in DTYPES else None
        known = size is None or entry.end - entry.start == math.prod(entry.shape) * size
        if entry.start != place or entry.end < entry.start or not known:
            raise ModelFileError(f"{path} is damaged: its header gives {name} a place that does not fit its shape")
        place = entry.end
    if place != file_size:
        found = "cut short" if file_size < place else "longer than its header says"
        raise ModelFileError(f"{path} is {found}: found {file_size} bytes, expected {place}; copy or download it again")
    return entries


def _sound(entry: Entry) -> bool:
    """Whether a type is a name, and sizes and places are whole numbers."""
    numbers = (*entry.shape, entry.start, entry.end)
    return isinstance(entry.dtype, str) and all(type(number) is int and number >= 0 for number in numbers)


ADAPTER_WEIGHTS = "adapter_model.safetensors"
# the weight file and the index of its shards, in the order in which `from_pretrained` looks for them
NAMES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the model in `folder`, as `from_pretrained` would choose them.

    Raises:
        ModelError: there are none, or the index of shards cannot be read or names one that is not there.
    """
    for single, index in NAMES:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                names = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelFileError(f"{folder / index} is no index of shards: it cannot be read") from error
            if bad := sorted(str(n) for n in names if not isinstance(n, str) or Path(n).name != n or len(n) > 255):
                raise ModelFileError(f"{folder / index} names {bad[0]}, which is no file in its folder")
            files = [folder / name for name in sorted(names)]
            if missing := [file.name for file in files if not file.is_file()]:
                raise ModelFileError(f"{folder} is not whole: {', '.join(missing[:3])} missing ({len(missing)} in all)")
            return files
    raise ModelError(f"{folder} holds no weights: found neither model.safetensors nor pytorch_model.bin, nor shards")


def fingerprint(folder: Path) -> str:
    """A SHA-256 over the tensors of the model in `folder`; how they are spread over files does not change it.

    It covers name, type and shape of each tensor, and sixteen evenly spaced blocks of 4 KiB of its bytes (all of them
    in a smaller one), so that a base of many gigabytes takes well under a second. A change that misses every block,
    of a few numbers in a large tensor, is not seen; another training run, however short, changes them all.

    Example::

        fingerprint(Path("models/gpt2"))
        # 'sha256:7f1c…'

    Raises:
        ModelError: there are no weights, or they cannot be read.
    """
    digest = hashlib.sha256()
    files = weight_files(folder)
    tensors = _torch_tensors(files) if files[0].suffix == ".bin" else _safetensors(files)
    for name, dtype, shape, parts in tensors:
        digest.update(json.dumps([name, dtype, list(shape)]).encode())
        for part in parts:
            digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _spans(size: int) -> list[tuple[int, int]]:
    """Begin and end of the blocks of a tensor of `size` bytes that are read."""
    if size <= BLOCKS * BLOCK:
        return [(0, size)]
    starts = [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
    return [(start, start + BLOCK) for start in starts]


def _safetensors(files: list[Path]) -> Iterator[tuple[str, str, tuple[int, ...], Iterator[bytes]]]:
    """Name, type, shape and the blocks of each tensor, sorted by name over all files."""
    where = {name: (file, entry) for file in files for name, entry in read_header(file).items()}
    handles = {file: file.open("rb") for file in files}
    try:
        for name, (file, entry) in sorted(where.items()):

            def parts(handle: Any = handles[file], entry: Entry = entry) -> Iterator[bytes]:
                for start, end in _spans(entry.end - entry.start):
                    handle.seek(entry.start + start)
                    yield handle.read(end - start)

            yield name, entry.dtype, entry.shape, parts()
    finally:
        for handle in handles.values():
            handle.close()


def _torch_tensors(files: list[Path]) -> Iterator[tuple[str, str, tuple[int, ...], Iterator[bytes]]]:
    """The same for pickled weights, mapped into memory and not read."""
    import pickle

    import torch

    codes = {name: code for code, (name, _) in DTYPES.items() if code in ("F64", "F32", "F16", "BF16")}
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            try:
                tensors |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # a file from before torch 1.6, which cannot be mapped
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ModelError(f"{file} could not be read as weights: {first_line(error)}") from error
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        parts = (raw[start:end].numpy().tobytes() for start, end in _spans(len(raw)))
        yield name, codes.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype)), tuple(tensor.shape), parts


Shape = tuple[int, ...]
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


def require_whole(model: Any, folder: Path) -> int:
    """Compare a folder that `save_pretrained` filled with the model in memory; the number of its tensors.

    Args:
        model: the model or `PeftModel` itself, sharded over processes or not. Nothing is gathered.

    Example::

        require_whole(model, Path("runs/quickstart"))
        # 28

    Raises:
        ModelError: a tensor is not there, or has another shape.
    """
    adapter = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    found: dict[str, Shape] = {}
    try:
        for file in [folder / ADAPTER_WEIGHTS] if adapter else weight_files(folder):
            found |= {name: entry.shape for name, entry in read_header(file).items()}
    except ModelFileError as error:  # of a run that has just written it, so no fault of what was typed
        raise ModelError(str(error)) from error
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

    Example::

        tensors(gpt2, {"transformer.wte.weight": …})["transformer.wte.weight"]
        # (50257, 768)
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
        if joined := getattr(model, "as_one_on_disk", None):  # of `instructft.adapters.frozen_pairs`
            shapes = joined(shapes)
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
