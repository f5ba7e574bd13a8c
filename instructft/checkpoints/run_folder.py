"""The run folder: marked as a run's own, refused when it is anything else; and any folder that is whole or not there.

A run writes `instructft.json` into its folder before anything else. Nothing is removed or replaced in a folder that has
content and no such mark; those of versions before it are known by what no other program writes, the `run.json` and the
manifests of checkpoints.

A folder that is whole or not there is written as `NAME.partial-…`, and given its name in one step. What a killed
process leaves, the next one that writes to the same place removes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from instructft.checkpoints.lock import only_one
from instructft.checkpoints.manifest import NOT_FINITE, SPIKE, folders, kind
from instructft.errors import ModelError, UsageError
from instructft.version import __version__
from instructft.whole_file import write_whole

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe

MARK = "instructft.json"  # says that a run made the folder; named so that `rm *` takes it along with the rest
LOCK = ".lock"
PARTIAL = "final.partial"  # the final model while it is written
# What a run that was stopped before its first checkpoint leaves.
_LOGS = {"metrics.jsonl", "samples.jsonl", "warnings.jsonl", "train.log", "tensorboard", "recipe.yaml"}
_LOGS |= {".upload", ".fetch", PARTIAL}


@contextmanager
def own(recipe: Recipe, resume: str = "auto") -> Iterator[None]:
    """Make a recipe's folder this run's own, for as long as the block lasts: no other process trains into it meanwhile.

    One that was made for it and holds nothing at the end is gone again.

    Args:
        resume: what the run resumes from; `never` wants an empty folder.

    Raises:
        UsageError: it holds something else than a run, or links, or cannot be written, or another process is at it.
    """
    run = Path(recipe.output_dir)
    refuse_what_is_no_run(run)
    _refuse_data_inside(recipe, run)
    if run.is_dir() and (resume == "never" or all(kind(folder) == "cut short" for folder in folders(run))):
        refuse_used_folder(run)
    made = [path for path in (run, *run.parents) if not path.exists()]
    with contextlib.ExitStack() as undo:
        undo.callback(_remove_empty, made)
        undo.callback(_remove_unmarked_lock, run)
        try:
            run.mkdir(parents=True, exist_ok=True)
            _part_from_other_names(run.glob(LOCK))
            undo.enter_context(only_one(run / LOCK, f"output_dir: {run}: a run", "choose another output_dir"))
            refuse_what_is_no_run(run)
            _part_from_other_names(run.iterdir())
            if not (run / MARK).exists():
                begun = {"instructft": __version__, "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                write_whole(run / MARK, json.dumps(begun) + "\n")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # told with the checkpoints that stand
                raise
            why = error.strerror or error
            raise UsageError(
                f"output_dir: {run} cannot be written ({why}); choose another folder (output_dir=…)"
            ) from error
        undo.callback(_unmark, run)
        yield


def _unmark(run: Path) -> None:
    if run.is_dir() and {path.name for path in run.iterdir()} <= {MARK, LOCK}:
        (run / MARK).unlink(missing_ok=True)


def _remove_unmarked_lock(run: Path) -> None:
    """Of a folder that could not be marked nothing stays that the next try would take for somebody else's."""
    if not (run / MARK).exists():
        with contextlib.suppress(OSError):
            (run / LOCK).unlink(missing_ok=True)


def _remove_empty(made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # what is not empty stays
        for path in made:
            path.rmdir()


def refuse_what_is_no_run(run: Path) -> None:
    """Refuse what a run must not write into, at a glance: a file, links, a folder that no run has made.

    Raises:
        UsageError: says what is there.
    """
    for path in (run, *run.absolute().parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"output_dir: {path} is a file, expected a folder; choose another output_dir")
    if not run.is_dir():
        return
    if links := sorted(_links(run)):
        raise UsageError(
            f"output_dir: {links[0]} is a symbolic link, and a run writes through none: it leads out of the folder. "
            "Put the file itself there, or choose another folder (output_dir=…)"
        )
    names = sorted(path.name for path in run.iterdir() if path.name != LOCK)
    if names and not is_run(run):
        raise UsageError(
            f"output_dir: {run} is not empty, and no run has made it: it holds {_content(names)}. "
            "Choose another folder (output_dir=…)"
        )


def _refuse_data_inside(recipe: Recipe, run: Path) -> None:
    """Rows that a run would replace by its own files are named, wherever they came from."""
    entries = [("data.datasets", recipe.data.datasets)]
    entries += [(f"data.{name}", getattr(recipe.data, name, None) or ()) for name in ("validation", "test")]
    for key, found in entries:
        for i, entry in enumerate(found):
            path = Path(entry.path or "").expanduser().resolve()
            if any(path.is_relative_to(run.resolve() / name) for name in _LOGS):
                raise UsageError(
                    f"{key}[{i}].path: {entry.path} lies in output_dir, where a run writes a file of this name; "
                    "move it elsewhere, or choose another output_dir"
                )


def refuse_used_folder(run: Path) -> None:
    """A run never writes over another; what a run left that came to nothing is no run."""
    refuse_what_is_no_run(run)
    if not run.is_dir():
        return
    begun = {folder.name for folder in folders(run) if kind(folder) == "cut short"}
    begun |= {path.name for path in _rows_of_steps(run)}
    if {path.name for path in run.iterdir()} - _LOGS - begun - {MARK, LOCK}:
        copied = (run / "config.json").is_file() and not (run / "run.json").exists() and not folders(run)
        what = "a model" if copied else "a run"  # the mark of a run goes along where its model is copied
        raise UsageError(f"output_dir: {run} already holds {what}; choose another folder (output_dir=…)")


def is_run(folder: Path) -> bool:
    """Whether a run of ours has made a folder: by its mark, or by what versions without one have left.

    >>> is_run(Path.home())
    False
    """
    if (folder / MARK).is_file() or any(kind(path) == "sealed" for path in folders(folder)):
        return True
    try:
        return "instructft" in json.loads((folder / "run.json").read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _content(names: list[str]) -> str:
    """What a folder holds, in words."""
    if "adapter_config.json" in names:
        return "an adapter"
    if "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names):
        return "a model"
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    return ", ".join(names)


def _links(folder: Path) -> Iterator[Path]:
    for parent, inner, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*inner, *files) if os.path.islink(os.path.join(parent, name)))


def _part_from_other_names(paths: Iterable[Path]) -> None:
    """Give a run files of its own where they have another name elsewhere too (hard links), which it would write to."""
    for path in list(paths):
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1 and path.suffix != ".safetensors":  # those are replaced
            copy = path.with_name(f".{path.name}.part")
            copy.unlink(missing_ok=True)
            shutil.copy2(path, copy)
            copy.replace(path)


def make_folder(run: Path, fresh: bool) -> None:
    """Clear a folder that is this run's own of what an unfinished attempt left; one that is resumed keeps its logs."""
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
        names = sorted(path.name for path in output.iterdir())
        raise UsageError(f"{output} is not empty: it holds {_content(names)}; choose another OUTPUT")


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
