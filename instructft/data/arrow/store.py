"""Arrow files in the cache: written as rows are made, whole or not at all, and mapped from there.

A mapped file costs no memory of its own: the system reads the pages that are asked for, and drops them when it wants.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset


def folder() -> Path:
    """Where the files lie; made if it is not there."""
    from datasets import config

    found = Path(config.HF_DATASETS_CACHE) / "instructft-files"
    found.mkdir(parents=True, exist_ok=True)
    return found


def cached(fingerprint: str, make: Callable[[Path], None]) -> Path:
    """The file of this fingerprint in the cache, made first if it is not there."""
    copy = folder() / f"{fingerprint}.arrow"
    if not copy.is_file():
        whole = folder() / f"{fingerprint}.{os.getpid()}"  # moved into place when it is: others may read the copy
        try:
            make(whole)
            whole.replace(copy)
        finally:
            whole.unlink(missing_ok=True)
    return copy


def write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches of rows as an Arrow stream, each as it comes."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def mapped(path: Path, fingerprint: str) -> Dataset:
    """The rows of an Arrow stream, none of which is in memory."""
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=fingerprint)


def scratch(count: int, dtype: Any, in_memory: int = 1 << 24) -> np.ndarray:
    """An array of zeros to write on, behind which stands a file without a name where it is larger than memory should
    hold: it goes when the array does."""
    import numpy as np

    if count <= in_memory:
        return np.zeros(count, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder()) as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=(count,))
