"""Work that is done in several processes, with the results in the order that one process would give them."""

from __future__ import annotations

import ast
import gc
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

from instructft.errors import InstructftError

_AHEAD = 4  # results that a process keeps until it is their turn
_HEARD: set[int] = set()  # signals that a process which loads rows leaves alone once
# A process that is forked has the tokenizer, studied and proved, from the start; elsewhere forking is not safe.
METHOD = "fork" if sys.platform == "linux" else "spawn"


def cores() -> int:
    """The processors that this process may use; one where it may not start others."""
    if multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[int], bytes], pieces: int, processes: int) -> Iterator[bytes]:
    """`work(0)`, `work(1)`, …, each made in one of several processes; what it raises there is raised here.

    Process k makes every n-th piece from the k-th on, and waits where it is far ahead: of any number of pieces few are
    in memory at a time. This process is the first of them: to start another one costs as much as hundreds of rows.

    >>> list(in_order(lambda number: bytes([number]), pieces=3, processes=1))
    [b'\\x00', b'\\x01', b'\\x02']
    """
    processes = min(processes, pieces)
    if processes > 1 and METHOD == "spawn" and (script := script_without_guard()):
        print(
            f'{script} has no `if __name__ == "__main__":`, and each process that is started here would run it anew: '
            f"one process does the work of {processes}. Put what the script does below such a line",
            file=sys.stderr,
        )
        processes = 1
    if processes <= 1:
        yield from map(work, range(pieces))
        return
    context: Any = multiprocessing.get_context(METHOD)
    children, answers = [], []
    result = work(0)  # before the others are there: those that are forked know what this one has learned by it
    try:
        for first in range(1, processes):
            answer, mine = context.Pipe(duplex=False)
            child = context.Process(target=_serve, args=(work, range(first, pieces, processes), mine), daemon=True)
            child.start()
            mine.close()
            children.append(child)
            answers.append(answer)
        yield result
        for number in range(1, pieces):
            other = number % processes - 1
            yield work(number) if other < 0 else _received(answers[other], children[other])
    finally:
        for child in children:
            child.terminate()
        for child, answer in zip(children, answers, strict=False):
            child.join()
            answer.close()


def script_without_guard() -> str:
    """The script that runs here, if a process that is spawned would do again all that it does; else ""."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None:  # a notebook, a prompt: nothing is run anew
        return ""
    try:
        body = ast.parse(Path(path).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return ""
    names = (name.id for node in body if isinstance(node, ast.If) for name in ast.walk(node.test)
             if isinstance(name, ast.Name))  # fmt: skip
    return "" if "__name__" in names else Path(path).name


def leaving_signals(collate: Callable[[Any], Any], rows: Any) -> Any:
    """A batch, made where a process of torch's loader makes it: a signal is left to the process that trains.

    A scheduler and a terminal send theirs to both. The one that trains finishes its step, for which it may ask for rows
    still; torch lets those that load them die of SIGTERM (2.13). One that comes twice ends them, for those that hang.
    """
    import torch.utils.data

    if torch.utils.data.get_worker_info() is not None:
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None and number not in _HEARD:
                _HEARD.add(number)
                signal.signal(number, _next_time)
    return collate(rows)


def _next_time(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)


def _received(answer: Any, child: Any) -> bytes:
    """The next result of a process."""
    try:
        done, result = answer.recv_bytes(), answer.recv_bytes()
    except EOFError:
        child.join()
        how = f"signal {-child.exitcode}" if child.exitcode < 0 else f"exit status {child.exitcode}"
        raise InstructftError(
            f"a process that prepares data ended with {how} before its work was done; where memory ran out, "
            "more of it or fewer processors (taskset) help"
        ) from None
    if not done:
        raise pickle.loads(result)
    return bytes(result)


def _serve(work: Callable[[int], bytes], numbers: range, out: Any) -> None:
    """Do some of the pieces in this process, which was started for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one answers it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and ends this one so
    gc.freeze()  # what was imported is looked through no more
    results: Queue[tuple[bytes, bytes] | None] = Queue(_AHEAD)

    def send() -> None:
        try:
            while (pair := results.get()) is not None:
                for part in pair:
                    out.send_bytes(part)
        except OSError:  # nobody waits for it any more
            os._exit(1)

    sender = Thread(target=send, daemon=True)
    sender.start()
    try:
        for number in numbers:
            results.put((b"done", work(number)))
    except Exception as error:
        results.put((b"", _pickled(error)))
    results.put(None)
    sender.join()


def _pickled(error: Exception) -> bytes:
    try:
        pickle.loads(pickled := pickle.dumps(error))
        return pickled
    except Exception:  # an error that cannot travel is told by its words
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
