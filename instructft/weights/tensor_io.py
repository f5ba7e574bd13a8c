"""Reads and writes checkpoint tensors by the piece: of a model of any size only a few megabytes are in memory.

Files are read with plain reads, not mapped: the pages of a mapped file count as this process's memory. A piece is a
run of whole rows, where a row is what one index of the first dimension selects.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from instructft.errors import ModelError
from instructft.formatting import first_line
from instructft.weights.weight_files import DTYPES, read_header, weight_files

if TYPE_CHECKING:
    import torch

PIECE = 1 << 20  # elements in a piece, about; 4 MiB once in float32

_CODES = {name: code for code, (name, _) in DTYPES.items()}


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None  # bytes from the file's beginning; None in a file of torch.save

    @property
    def rows(self) -> int:
        """How many there are; a number without dimensions is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements in a row."""
        return math.prod(self.shape[1:])

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` as a tensor of its own, (stop - start, …); all of them by default.

        Raises:
            ModelError: the file ends before they do.
        """
        import torch

        stop = self.rows if stop is None else stop
        shape = (stop - start, *self.shape[1:])
        if self.offset is None:
            return _load_pickled(self.file)[self.name].reshape(self.rows, *self.shape[1:])[start:stop].clone()
        row = self.width * self.dtype.itemsize
        if not (stop - start) * row:
            return torch.empty(shape, dtype=self.dtype)
        buffer = bytearray((stop - start) * row)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row)
            view, got = memoryview(buffer), 0
            while got < len(buffer):
                more = file.readinto(view[got:])
                if not more:
                    raise ModelError(f"{self.file} ends inside {self.name}: it is not whole")
                got += more
        return torch.frombuffer(buffer, dtype=self.dtype).reshape(shape)


def pieces(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Bounds of the runs of rows that make up a tensor.

    >>> list(pieces(5, PIECE // 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, PIECE // max(1, width))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def read_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of one file, by name, in the order of their bytes. Weights of a safetensors file are not read.

    Raises:
        ModelError: it is not whole.
    """
    import torch

    if path.suffix != ".safetensors":
        loaded = _load_pickled(path)
        return {name: Stored(path, name, tensor.dtype, tuple(tensor.shape), None) for name, tensor in loaded.items()}
    entries = sorted(read_header(path).items(), key=lambda item: item[1].start)
    if unknown := sorted({entry.dtype for _, entry in entries} - DTYPES.keys()):
        raise ModelError(f"{path} holds tensors of type {', '.join(unknown)}, expected {', '.join(DTYPES)}")
    return {
        name: Stored(path, name, getattr(torch, DTYPES[entry.dtype][0]), entry.shape, entry.start)
        for name, entry in entries
    }


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder, by name, of whichever file `from_pretrained` would take.

    Raises:
        ModelError: there are none, or a file is missing or not whole.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        found |= read_tensors(path)
    return found


@functools.lru_cache(maxsize=64)  # shards; a mapped file is opened once
def _load_pickled(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path} could not be read as weights: {first_line(error)}") from error


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards(tensors: Iterable[Planned], most: int) -> dict[str, list[Planned]]:
    """File name -> its tensors: in order, as many in a file as `most` bytes take, at least one."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def index_of(plan: Mapping[str, list[Planned]]) -> str | None:
    """The text of `model.safetensors.index.json`, as transformers writes it; None for a single file."""
    if len(plan) == 1:
        return None
    where = {tensor.name: file for file, tensors in plan.items() for tensor in tensors}
    total = sum(tensor.bytes for tensors in plan.values() for tensor in tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True) + "\n"


def write_shard(path: Path, tensors: list[Planned], produce: Callable[[str], Iterator[torch.Tensor]]) -> None:
    """Write one safetensors file: its header, then each tensor as its pieces come from `produce(name)`.

    Raises:
        ModelError: a tensor came out with other bytes than planned.
        OSError: it could not be written.
    """
    # as the library orders them, so that every tensor begins at a multiple of the size of its elements
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": _CODES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for piece in produce(tensor.name):
                if piece.dtype != tensor.dtype:
                    raise ModelError(f"{tensor.name}: found {piece.dtype}, expected {tensor.dtype}")
                written += _write(file, _raw(piece))
            if written != tensor.bytes:
                raise ModelError(f"{tensor.name}: found {written:,} bytes, expected {tensor.bytes:,}")
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file that is on disk when this returns."""
    with path.open("wb") as file:
        _write(file, text.encode())
        file.flush()
        os.fsync(file.fileno())


def _write(file: IO[bytes], data: Any) -> int:
    return file.write(data)


def _raw(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
