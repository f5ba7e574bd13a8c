"""The run folder: refused when it is used, and made."""

from __future__ import annotations

import shutil
from pathlib import Path

from instructft.checkpoints.manifest import NOT_FINITE, SPIKE, folders, kind
from instructft.errors import UsageError

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
