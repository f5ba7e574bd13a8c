"""Checkpoints that can be trusted: a manifest written last, and verification by size and SHA-256.

    checkpoint-40/
      model.safetensors, optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json, …   as the Trainer writes them
      manifest.json    every file's size and SHA-256, and what the run was made of; written when all else is on the disk

A folder without a manifest is not a checkpoint: its writing was cut short. One whose files differ from the manifest is
damaged. Neither is ever resumed from; both are named when an older one is taken instead.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from instructft.checkpoints.pickles import refuse_code
from instructft.checkpoints.required import missing
from instructft.errors import CheckpointError
from instructft.weights.base_record import stays_inside

MANIFEST = "manifest.json"
_PARTIAL = f"{MANIFEST}.partial"
# How files beside the checkpoints begin that hold the rows of a step: one that was not taken, one whose loss leapt.
NOT_FINITE, SPIKE = "not-finite-", "loss-spike-"
_NOTHING = 1 << 16  # bytes: a disk with less is full
_MOST_PROCESSES = 1 << 20
FORMAT = 1  # of the manifest; a newer one is not read
NAME = re.compile(r"checkpoint-(\d+)")  # of its folder


@dataclass(frozen=True)
class Checkpoint:
    """A folder that verified.

    Args:
        folder: `checkpoint-N`.
        step: optimizer steps done, N.
        identity: what the run was made of when it was written: dotted recipe key or fact -> value (`resume.identity`).
        versions: library -> version that wrote it.
    """

    folder: Path
    step: int
    identity: Mapping[str, Any]
    versions: Mapping[str, str]


def folders(run: Path) -> list[Path]:
    """The folders of a run that are named like checkpoints, the newest first.

    Example::

        [path.name for path in folders(Path("runs/quickstart"))]
        # ['checkpoint-1200', 'checkpoint-900', 'checkpoint-600', 'checkpoint-300']
    """
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not named like a checkpoint (checkpoint-N)")
    return int(match[1])


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def seal(folder: Path, identity: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Make a folder a checkpoint: bring its files to the disk, hash them, and write the manifest last.

    Every process must have written its files before. A power cut at any moment leaves the folder with a manifest and
    whole, or without.

    Raises:
        CheckpointError: something is not there without which no run could resume from it.
    """
    files = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(file)}
    _require(folder, files, identity)
    for inner in {path.parent for path in _files(folder)}:
        _sync(inner)
    manifest = {
        "format": FORMAT,
        "step": step_of(folder),
        "identity": dict(identity),
        "versions": dict(versions),
        "files": files,
    }
    partial = folder / _PARTIAL
    with partial.open("w", encoding="utf-8") as file:
        file.write(manifest_text(manifest))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)
    _sync(folder)
    _sync(folder.parent)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The content of `manifest.json`: the manifest, and the hash by which a change in it is seen."""
    return json.dumps({"manifest": manifest, "sha256": _digest(manifest)}, indent=1)


def begin(folder: Path) -> None:
    """Make an empty folder for a checkpoint; what a save that was cut short left under its name goes.

    Raises:
        CheckpointError: another tool made a folder of this name; it is not touched.
    """
    if folder.is_dir():
        if kind(folder) == "foreign":
            raise CheckpointError(f"{folder} stands in the way, and instructft did not make it; move it elsewhere")
        (folder / MANIFEST).unlink(missing_ok=True)  # first: half of a checkpoint must not look like one
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _PARTIAL).write_text("{}", encoding="utf-8")  # ours, and not whole


def kind(folder: Path) -> str:
    """`sealed` (it has a manifest), `cut short` (ours, without one), or `foreign` (another tool made it)."""
    if (folder / MANIFEST).is_file():
        return "sealed"
    return "cut short" if (folder / _PARTIAL).is_file() or not any(folder.iterdir()) else "foreign"


def require_space(run: Path, needed: int) -> None:
    """Refuse to begin a checkpoint that the disk has no room for.

    Raises:
        CheckpointError: with what is needed, what is free, and the newest checkpoint that stands.
    """
    free = shutil.disk_usage(run).free
    if free >= needed:
        return
    raise CheckpointError(
        f"{run}: a checkpoint needs about {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free. "
        f"{standing(run)}; make room and run the same command again. train.save_total_limit keeps fewer of them"
    )


def standing(run: Path) -> str:
    """The newest checkpoint that a failure leaves, in words."""
    kept = [path.name for path in folders(run) if kind(path) == "sealed"]
    return f"{kept[0]} stands" if kept else "there is no checkpoint before it"


def out_of_space(error: BaseException, run: Path) -> bool:
    """Whether an error comes from a full disk; torch's own writer does not say so."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return shutil.disk_usage(run).free < _NOTHING


@contextlib.contextmanager
def full_disk_explained(run: Path) -> Iterator[None]:
    """Turn a full disk, whatever was being written, into one message.

    Raises:
        CheckpointError: with the checkpoint that stands.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not out_of_space(error, run):
            raise
        raise CheckpointError(
            f"{run}: the disk is full; {standing(run)}. Make room and run the same command again"
        ) from error


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def verify(folder: Path, foreign: bool = False) -> Checkpoint:
    """Read a checkpoint's manifest, and every byte of its files; all that a resumed run needs must be among them.

    Args:
        folder: `checkpoint-N`.
        foreign: it comes from elsewhere, such as the Hub; see `pickles.refuse_code`.

    Raises:
        CheckpointError: what is missing or differs, or could run code as it is read.
    """
    manifest = read_manifest(folder)
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        size = path.stat().st_size
        if size != known["size"]:
            raise CheckpointError(f"{folder}: {name} has {size:,} bytes, {known['size']:,} were written")
        with path.open("rb") as file:
            if sha256(file) != known["sha256"]:
                raise CheckpointError(f"{folder}: {name} is not what was written (its SHA-256 differs)")
    _require(folder, manifest["files"], manifest["identity"])
    refuse_code(folder, manifest["files"], foreign)
    return Checkpoint(folder, manifest["step"], manifest["identity"], manifest["versions"])


def _require(folder: Path, files: Iterable[str], identity: Mapping[str, Any]) -> None:
    if lacks := missing(files, int(identity.get("processes", 1))):
        several = "; all machines of a run write to one shared output_dir" if " of process " in lacks[0] else ""
        raise CheckpointError(
            f"{folder}: it lacks {', '.join(lacks)}, so no run could resume from it as it was{several}"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone; raises `CheckpointError` where there is none that can be read."""
    path = folder / MANIFEST
    if not path.is_file():
        why = "writing it was cut short" if kind(folder) == "cut short" else "another tool made it"
        raise CheckpointError(f"{folder}: there is no {MANIFEST}; {why}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = dict(content["manifest"])
        whole = content["sha256"] == _digest(manifest) and _is_one(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is not what was written")
    if manifest["format"] > FORMAT:
        raise CheckpointError(f"{path}: a newer instructft wrote it (format {manifest['format']}, known is {FORMAT})")
    if manifest["step"] != step_of(folder):
        raise CheckpointError(f"{folder}: it is checkpoint-{manifest['step']} under another name")
    return manifest


def _is_one(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest says what all of them say; whoever wrote it may have hashed anything."""
    kinds = {"format": int, "step": int, "identity": dict, "versions": dict, "files": dict}
    if not all(type(manifest.get(key)) is kind for key, kind in kinds.items()):
        return False
    if not all(isinstance(value, str) for value in manifest["versions"].values()):
        return False
    processes = manifest["identity"].get("processes", 1)
    return type(processes) is int and 0 < processes < _MOST_PROCESSES and are_sums(manifest["files"])


def are_sums(files: Any) -> bool:
    """Whether it is what a manifest and `run.json` hold of files: path inside the folder -> size in bytes, SHA-256.

    >>> are_sums({"model.safetensors": {"size": 8, "sha256": "7f1c"}}), are_sums({"../model.safetensors": 8})
    (True, False)
    """
    return isinstance(files, dict) and all(
        stays_inside(name)
        and isinstance(known, dict)
        and type(known.get("size")) is int
        and isinstance(known.get("sha256"), str)
        for name, known in files.items()
    )


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies, and why each newer one was passed over.

    Example::

        newest(Path("runs/support"))
        # (Checkpoint(folder=PosixPath('runs/support/checkpoint-80'), …),
        #  ['runs/support/checkpoint-120: optimizer.pt is …'])
    """
    passed: list[str] = []
    for folder in folders(run):
        try:
            return verify(folder), passed
        except CheckpointError as error:
            passed.append(str(error))
    return None, passed


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, _PARTIAL))


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(file: Any) -> str:
    """Of a file that is open for bytes, to its end."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk; where folders cannot be opened (Windows) there is nothing to do."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
