"""Which checkpoints belong to the run as it stands: retention, and what a resume from an older one sets aside.

    runs/a/                              instructft train a.yaml --resume checkpoint-4
      checkpoint-4    ◄─ resumed from      checkpoint-4, checkpoint-8, …   one line, from which `auto` takes the newest
      checkpoint-8    ─┐
      checkpoint-12   ─┴─► set aside ──►   set-aside-1/checkpoint-8, set-aside-1/checkpoint-12

So the folder of a run holds one line of checkpoints at any time, and the highest number is the run's newest.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from instructft.checkpoints.manifest import MANIFEST, folders, kind, step_of

ASIDE = "set-aside"


def set_aside(run: Path, step: int) -> tuple[Path | None, list[str]]:
    """Move the checkpoints above the one that a run resumes from out of its line, and a `run.json` that tells of them.

    They are kept, each whole under its own name; the run that goes on neither counts nor deletes them.

    Args:
        step: of the checkpoint that is resumed from.

    Returns:
        The folder that they lie in now (None where there were none), and their names.

    Example::

        set_aside(Path("runs/a"), 4)
        # (PosixPath('runs/a/set-aside-1'), ['checkpoint-8', 'checkpoint-12'])
    """
    left = [path for path in reversed(folders(run)) if step_of(path) > step and kind(path) == "sealed"]
    finished = run / "run.json"
    beyond = finished.is_file() and _steps(finished) > step
    if not left and not beyond:
        return None, []
    number = 1 + max(
        (int(n) for path in run.glob(f"{ASIDE}-*") if (n := path.name.rpartition("-")[2]).isdigit()), default=0
    )
    place = run / f"{ASIDE}-{number}"
    place.mkdir()
    if beyond:  # else the run would pass for finished once it comes to the step at which the other ended
        finished.replace(place / finished.name)
    for path in reversed(left):  # the newest first: what `auto` would take must not be one of them
        path.replace(place / path.name)
    return place, [path.name for path in left]


def _steps(finished: Path) -> int:
    try:
        return int(json.loads(finished.read_text(encoding="utf-8"))["train"]["steps"])
    except (ValueError, KeyError, TypeError):
        return 0


def retain(run: Path, keep: int | None, best: str | None = None, newest: int | None = None) -> list[str]:
    """Delete all but the newest `keep` checkpoints and the best one; folders without our manifest stay.

    Args:
        newest: the step that was saved last. What has a higher number is of another line: not counted, not deleted.

    Returns the names of what was deleted.
    """
    if not keep:
        return []
    ours = [path for path in folders(run) if kind(path) == "sealed" and (newest is None or step_of(path) <= newest)]
    gone = [path for path in ours[keep:] if best is None or path.name != Path(best).name]
    for path in gone:
        (path / MANIFEST).unlink()  # first: half of a checkpoint must not look like one
        shutil.rmtree(path)
    return [path.name for path in gone]
