"""The run folder: refused when it is used, and made; and any folder that is whole or not there.

Such a folder is written as `NAME.partial-…`, and given its name in one step. What a killed process leaves, the next one
that writes to the same place removes.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instructft.checkpoints.manifest import NOT_FINITE, SPIKE, folders, kind
from instructft.errors import ModelError, UsageError

PARTIAL = "final.partial"  # the final model while it is written
# What a run that was stopped before its first checkpoint leaves.
_LOGS = {"metrics.jsonl", "samples.jsonl", "warnings.jsonl", "tensorboard", "recipe.yaml", ".upload", ".fetch", PARTIAL}


def refuse_used_folder(run: Path) -> None:
    """A run never writes over another; what a run left that came to nothing is no run."""
    for path in (run, *run.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"output_dir: {path} is a file, expected a folder; choose another output_dir")
    begun = {folder.name for folder in folders(run) if kind(folder) == "cut short"}
    begun |= {path.name for path in _rows_of_steps(run)}
    if run.is_dir() and {path.name for path in run.iterdir()} - _LOGS - begun:
        raise UsageError(
            f"output_dir: {run} already holds a run. Choose another folder (output_dir=…), or remove it: rm -r {run}"
        )


def make_folder(run: Path, fresh: bool) -> None:
    """Make the folder, without what an unfinished attempt left; one that is resumed keeps its logs."""
    run.mkdir(parents=True, exist_ok=True)
    old = [*(run / name for name in _LOGS), *_rows_of_steps(run)] if fresh else [run / PARTIAL]
    for path in old:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _rows_of_steps(run: Path) -> list[Path]:
    """The files with rows of steps that stood out: not a number, or far above the usual loss."""
    return [path for name in (NOT_FINITE, SPIKE) for path in run.glob(f"{name}*.jsonl")]


try:
    import fcntl
except ImportError:  # Windows: a folder in which another process has a file open cannot be removed there anyway
    fcntl = None  # type: ignore[assignment]


def refuse_used(output: Path) -> None:
    """Refuse a folder that is not empty, before anything is written.

    Raises:
        UsageError: something is there, or a file stands in the way.
    """
    for path in (output, *output.absolute().parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file, expected a folder; choose another OUTPUT")
    if output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty; choose another OUTPUT, or remove it: rm -r {output}")


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all went well, with every file on disk; else it is removed.

    Example::

        with partial_folder(Path("merged")) as folder:
            (folder / "config.json").write_text("{}")

    Raises:
        ModelError: it could not be written, or `output` is no longer free.
    """
    parent = output.absolute().parent
    folder = parent / f"{output.name}.partial-{uuid.uuid4().hex[:8]}"
    handle = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clean(parent, output.name)
        folder.mkdir()
        handle = _lock(folder)
        yield folder
        sync(folder)
        os.rename(folder, output)  # onto an empty folder too; on one that has filled up it fails and changes nothing
        sync_one(parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ModelError(f"{output} could not be written: {error.strerror or error}; nothing was kept") from error
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _clean(parent: Path, name: str) -> None:
    """Remove what killed processes left; one that is still at work holds its lock."""
    for folder in parent.iterdir():
        if re.fullmatch(re.escape(name) + r"\.partial-[0-9a-f]{8}", folder.name) and folder.is_dir():
            handle = _lock(folder)
            if handle is not None or fcntl is None:
                shutil.rmtree(folder, ignore_errors=True)
            if handle is not None:
                os.close(handle)


def _lock(folder: Path) -> int | None:
    """Hold a folder until the handle is closed or this process ends; None where another holds it."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def sync(folder: Path) -> None:
    """Wait until all that lies in a folder is on disk, the names of its files last."""
    for path in (*folder.rglob("*"), folder):
        sync_one(path)


def sync_one(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    if os.name == "nt":  # it takes a handle that may write
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
