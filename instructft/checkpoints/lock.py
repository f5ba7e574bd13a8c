"""One process at a time: a lock that ends with the process that holds it, whose number the next one is told."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from instructft.errors import UsageError

_ENDING = 5.0  # seconds in which what a killed process left, its data loaders, ends too
# A file system that has no locks is no reason to run nothing on it.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_held: set[Path] = set()  # by this process, which may ask again


@contextlib.contextmanager
def only_one(lock: Path, what: str, way_out: str) -> Iterator[None]:
    """Hold a lock file as long as the block lasts; it is gone afterwards.

    Args:
        what: is being done, as the other process is told: `runs/a: a run`.
        way_out: what the other one can do.

    Example::

        with only_one(Path("runs/a/.lock"), "runs/a: a run", "choose another output_dir"):
            ...

    Raises:
        UsageError: another process holds it.
        OSError: the file cannot be made.
    """
    path = lock.absolute()
    if path in _held:
        yield
        return
    last = _holder(path)
    held = FileLock(path)
    try:
        with warnings.catch_warnings():  # of file systems without locks
            warnings.simplefilter("ignore")
            held.acquire(timeout=0 if _lives(last) else _ENDING)
    except Timeout:
        who = " ".join(_holder(path) or last) or "of another machine or user"
        raise UsageError(f"{what} is under way there (process {who}). Wait until it ends, or {way_out}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield
        return
    _held.add(path)
    try:
        with contextlib.suppress(OSError):
            path.write_text(f"{os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        _held.discard(path)
        with contextlib.suppress(OSError):  # ahead of the release: after it, it may be another's
            path.unlink()
        held.release()


def holder(lock: Path) -> str:
    """The process that holds a lock file, as `123 on host`; "" where nobody does, or it has ended.

    Example::

        holder(Path("runs/a/.lock"))
        # '4711 on node-3'
    """
    found = _holder(lock)
    return " ".join(found) if _lives(found) else ""


def _holder(path: Path) -> list[str]:
    """What the lock's file says: process number, `on`, host."""
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []


def _lives(holder: list[str]) -> bool:
    """Whether the process that wrote the file is still there; of another machine that is not known."""
    if not holder or not holder[0].isdigit():
        return False
    return holder[-1] != socket.gethostname() or psutil.pid_exists(int(holder[0]))
