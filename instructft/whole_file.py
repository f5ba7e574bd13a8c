"""Reads and writes files whole: nothing without an end is read, and what is written is there whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST = 1 << 26  # bytes: of text, JSON above all, dozens of times as much are in memory


def read_whole(path: Path, encoding: str = "utf-8", most: int = MOST) -> str:
    """The text of a file that somebody else may have named, or made: a device and a pipe are not opened.

    Raises:
        OSError: it cannot be read, is no file, or has more than `most` bytes.
        UnicodeDecodeError: it is no text.
    """
    require_file(path, most)
    return path.read_text(encoding=encoding)


def require_file(path: Path, most: int = MOST) -> None:
    """As `read_whole`, for a file that another one reads."""
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a folder has an error of its own
        raise OSError(errno.EINVAL, "found a device or a pipe, expected a file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, expected at most {most:,}", str(path))


def write_whole(path: Path, text: str, *, sync: bool = False) -> None:
    """Replace a file's text in one step; a killed process leaves the old one, and a link is replaced, not followed.

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
