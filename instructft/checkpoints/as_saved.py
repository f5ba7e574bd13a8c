"""Whether a model in a folder is the one that was saved there: by the sums in `run.json`, or a checkpoint's manifest.

Weights that were damaged on a disk or in a copy load and answer nonsense. Configurations may be edited and have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructft.checkpoints.manifest import NAME, are_sums, folders, kind, read_manifest, sha256
from instructft.errors import CheckpointError, ModelFileError
from instructft.weights.readable import read_object

_KEPT = ("*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer.model")


def sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of a model's weights and tokenizer, by file name; `run.json` has them under `files`.

    Example::

        sums(Path("runs/quickstart"))["model.safetensors"]
        # {'size': 13529688, 'sha256': '7f1c…'}
    """
    files = sorted({path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file()})
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def require_as_saved(name: str | Path, *, whole: bool) -> None:
    """Refuse a run's model, or a checkpoint, whose weights are not those that were saved.

    Args:
        name: as the user said it; what is no folder of a run is left to its reader.
        whole: compare every byte; otherwise the sizes, at a glance.

    Raises:
        ModelFileError: with the file, and what was found.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    if NAME.fullmatch(folder.name) and kind(folder) == "sealed":
        try:
            known, again = read_manifest(folder)["files"], "take another checkpoint"
        except CheckpointError as error:
            raise ModelFileError(str(error)) from error
    elif (folder / "run.json").is_file():
        known, again = read_object(folder / "run.json").get("files", {}), _checkpoints(folder)  # older runs have none
        if not are_sums(known):
            raise ModelFileError(f"{folder / 'run.json'}: files is not what a run writes there; {again}")
    else:
        return
    for file, saved in known.items():
        _compare(folder / file, saved, whole, again)


def _checkpoints(run: Path) -> str:
    whole = [path for path in folders(run) if kind(path) == "sealed"]
    again = "copy or download the model again"
    return f"{whole[0]} lies beside it, with a manifest: take that, or {again}" if whole else again


def _compare(path: Path, saved: Mapping[str, Any], whole: bool, again: str) -> None:
    if not path.is_file():
        raise ModelFileError(f"{path} is missing, which was saved with its model; {again}")
    if path.stat().st_size != saved["size"]:
        raise ModelFileError(f"{path} has {path.stat().st_size:,} bytes, and {saved['size']:,} were saved; {again}")
    if whole and _sha256(path) != saved["sha256"]:
        raise ModelFileError(f"{path} is not what was saved (its SHA-256 differs); {again}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha256(file)
