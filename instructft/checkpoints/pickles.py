"""Refuses a checkpoint whose pickles could run code, before torch reads them.

A manifest proves that files are those that were written, and says nothing about who wrote them. Of what torch reads
on a resume, `optimizer.pt`, `scheduler.pt` and `rng_state*.pth` are read with `weights_only`. A checkpoint in shards
(FSDP2) is not: `torch.distributed.checkpoint` unpickles its table of contents and every value that is no tensor
(`FileSystemReader.read_metadata`, `DefaultLoadPlanner.load_bytes`, torch 2.13). Here both are read first by a reader
that knows nothing but the parts of such a table:

    pytorch_model_fsdp_0/.metadata   what there is, and where: classes of the list below, or refused
    pytorch_model_fsdp_0/__0_0.distcp
        └─ values that are no tensors (a learning rate): by `weights_only`, or refused

DeepSpeed's states hold objects of any kind, so that no such list can be made for them.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from instructft.errors import CheckpointError
from instructft.weights.base_record import stays_inside

FLAG = "--trust-checkpoint"
_TABLE = ".metadata"
_DEEPSPEED = re.compile(r"(.+/)?global_step\d+/.+")
_DTYPES = (
    *("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"),
)
_PARTS = (
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
    *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
)
_KNOWN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _PARTS),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", name) for name in ("Size", *_DTYPES)),
    ("torch.serialization", "_get_layout"),  # of a name, from a table of torch's own
    ("collections", "OrderedDict"),
}
_PATHS = ("PosixPath", "PurePosixPath")
_state = {"trusted": False}


def trust(yes: bool = True) -> None:
    """Read what no list can vouch for, from now on, in this process: the command line said so."""
    _state["trusted"] = yes


def trusted() -> bool:
    """Whether the command line said so."""
    return _state["trusted"]


def refuse_code(folder: Path, files: Iterable[str], foreign: bool = False) -> None:
    """See that reading a checkpoint runs none of its code.

    Args:
        folder: `checkpoint-N`.
        files: paths inside it, as its manifest has them.
        foreign: it comes from elsewhere, such as the Hub; so does one whose folder belongs to another user.

    Raises:
        CheckpointError: with the file, and what it names.
    """
    files = list(files)
    for name in files:
        if Path(name).name.endswith(_TABLE):
            _refuse_in_shards(folder, name)
    states = next((name for name in files if _DEEPSPEED.fullmatch(name)), None)
    if states and not trusted() and (foreign or _of_another(folder)):
        raise CheckpointError(
            f"{folder}: {states} is a state of DeepSpeed, a pickle that can run any code as it is read, and this "
            f"checkpoint was not written by you on this machine. If you trust who wrote it, add {FLAG} to the command"
        )


def _of_another(folder: Path) -> bool:
    return hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()


def _refuse_in_shards(folder: Path, name: str) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    table = _read(folder / name)
    if not isinstance(table, Metadata):
        raise CheckpointError(f"{folder}: {name} is no table of contents of a checkpoint in shards")
    values = {key for key, kind in table.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)}
    for index, stored in (table.storage_data or {}).items():
        place = (Path(name).parent / str(stored.relative_path)).as_posix()
        if not stays_inside(place) or not (folder / place).is_file():
            raise CheckpointError(f"{folder}: {name} names {stored.relative_path}, which is no file of this checkpoint")
        if stored.transform_descriptors:
            raise CheckpointError(f"{folder}: {name} asks for transformations of what is stored, which no run writes")
        if index.fqn in values:
            with (folder / place).open("rb") as file:
                file.seek(stored.offset)
                _refuse_value(file.read(stored.length), f"{folder}: {place}", index.fqn)


def _read(path: Path) -> Any:
    """A table of contents, by a reader that knows nothing else."""
    try:
        with path.open("rb") as file:
            return _Table(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path} could not be read: {type(error).__name__}: {error}") from error


def _refuse_value(content: bytes, place: str, key: str) -> None:
    import torch

    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"{place}: the value {key} is not plain (numbers, texts, tensors), so reading it could run code"
        ) from error


class _Table(pickle.Unpickler):
    """Reads names of the list, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name in _PATHS:  # where the checkpoint was written
            return getattr(pathlib, name)
        if (module, name) not in _KNOWN:
            raise CheckpointError(f"it names {module}.{name}, which no such file does; nothing of it was run")
        return super().find_class(module, name)
