"""Writes a file whole or not at all: beside its place, then renamed; a link there is replaced, not followed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str, *, sync: bool = False) -> None:
    """Replace a file's text in one step; a killed process leaves the old one.

    Args:
        sync: wait until it is on the disk.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "recipe.yaml"
    >>> write_whole(path, "data: {}"); path.read_text()
    'data: {}'
    """
    draft = path.with_name(f".{path.name}.part")
    draft.unlink(missing_ok=True)  # a link there would be followed
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)  # of a full disk nothing is left that the next try would stumble on
        raise
