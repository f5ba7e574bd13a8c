"""The logs of a run: read past a damaged line, and written so that no trouble with them ends what they only watch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from instructft.errors import InstructftError
from instructft.formatting import first_line
from instructft.report.train_log import NAME, Stream, TrainLog
from instructft.whole_file import write_whole

DAMAGED = ".damaged"  # behind the name of a log: the file as it was before lines of it were left out
_TAIL = 1 << 16  # bytes
_printed: TrainLog | None = None  # while output is kept
_troubles: dict[str, str] = {}  # kind -> what happened, until somebody takes it


def attempt(kind: str, what: str, do: Callable[[], object]) -> bool:
    """Do what only watches a run; an error is kept to be told, once, and is no reason to end the run.

    >>> attempt("board", "tensorboard", lambda: 1 / 0), take_troubles()
    (False, {'board': 'tensorboard: division by zero; the run goes on'})
    """
    try:
        do()
    except Exception as error:  # of disks, pipes and other libraries
        _troubles[kind] = f"{what}: {first_line(error) or type(error).__name__}; the run goes on"
        return False
    return True


def take_troubles() -> dict[str, str]:
    """What went wrong with the logs since this was last asked: kind -> text."""
    taken = dict(_troubles)
    _troubles.clear()
    return taken


# --------------------------------------------------------------------------------------------------------------------
# Files of JSON lines
# --------------------------------------------------------------------------------------------------------------------


def read_log(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The records of a log; lines that are none are passed over, and those that lack one of the keys.

    Example::

        read_log(Path("runs/quickstart/metrics.jsonl"))
        # [{'step': 10, 'loss': 4.31, …}, …]
    """
    found = (record for _, record in _lines(path) if record is not None)
    return [record for record in found if all(key in record for key in keys)]


def last_records(path: Path) -> list[dict[str, Any]]:
    """The first record of a log and those of its last 64 KiB: of a long run, what is known without reading it all."""
    try:
        with path.open("rb") as file:
            first = file.readline(_TAIL)
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - _TAIL, len(first)))
            rest = file.read().splitlines(keepends=True)
    except OSError:
        return []
    found = (_record(line) for line in (first, *rest))
    return [record for record in found if record is not None]


def keep_until(
    step: int, path: Path, write: bool = True, logged: Mapping[int, Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Cut a log back to the step that a run continues from: the records that stay, and in words what was left out.

    A last line that a kill cut short is nobody's loss. A file with damaged lines is kept beside, as `NAME.damaged`.

    Args:
        logged: step -> what was logged there, as the checkpoint has it: the log is made to say so, in one line a step.
    """
    lines = [(line, record) for line, record in _lines(path) if line.endswith(b"\n")]
    damaged = [number for number, (_, record) in enumerate(lines, 1) if record is None]
    kept = [(line, record) for line, record in lines if record is not None and record["step"] <= step]
    made = 0
    if logged:
        there = {record["step"]: (line, record) for line, record in kept}  # the last of several
        damaged += [
            number for number, (_, record) in enumerate(lines, 1) if record is not None and record["step"] <= step
            and (there[record["step"]][1] is not record or not _says(record, logged, step))
        ]  # fmt: skip
        at_its_end = {step} & set(there)  # a checkpoint is saved before all of its step is logged
        steps = sorted(at_its_end.union(at for at in logged if at <= step))
        kept = [
            there[at] if at in there and _says(there[at][1], logged, step) else _line({**logged[at]}) for at in steps
        ]
        made = sum(at not in there or kept[i] is not there[at] for i, at in enumerate(steps))
    said = []
    if damaged:
        told = [str(number) for number in sorted(damaged)]
        which = ", ".join(told[:10]) + (f" and {len(told) - 10} more" if len(told) > 10 else "")
        aside = path.with_name(path.name + DAMAGED)
        said.append(f"line {which}: damaged, and left out; the file as it was is kept in {aside.name}")
        if write:
            path.replace(aside)
    if made:
        which, them = ("line is", "it") if made == 1 else ("lines are", "them")
        said.append(f"{made:,} {which} written again, as the checkpoint has {them}")
    if write and (said or path.exists()):
        write_whole(path, b"".join(line for line, _ in kept).decode("utf-8"))
    return [record for _, record in kept if record is not None], f"{path}: {'; '.join(said)}" if said else ""


def _says(record: Mapping[str, Any], logged: Mapping[int, Mapping[str, Any]], last: int) -> bool:
    """Whether a record says what was logged at its step, whatever else."""
    known = logged.get(record["step"], {"step": last})
    return all(key in record and record[key] == value for key, value in known.items())


def _line(record: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    return json.dumps(record).encode() + b"\n", record


def append_log(path: Path, records: Sequence[Mapping[str, Any]]) -> bool:
    """Add records to a log; where it cannot be written, that is told and False comes back."""

    def write() -> None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    return attempt(path.name, path.name, write)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a log, each with its record where it is one."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        yield line, _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
        return record if isinstance(record["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


# --------------------------------------------------------------------------------------------------------------------
# Standard output
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, what is printed may get lost without ending the run: a pipe that was closed, a disk that is full.

    It is also kept for `train.log`, which `keep_printed` begins; within such a block another one changes nothing.
    """
    global _printed
    if _printed is not None:
        yield
        return
    before = sys.stdout, sys.stderr
    log = _printed = TrainLog()
    sys.stdout = _Lasting(before[0], "standard output", log.stream())
    sys.stderr = _Lasting(before[1], "standard error", log.stream())
    try:
        yield
    except BaseException as error:
        words = list(_last_words(error))
        attempt(NAME, NAME, lambda: log.lines(words))
        raise
    finally:
        sys.stdout, sys.stderr, _printed = *before, None
        attempt(NAME, NAME, log.finish)
        for stream in before:
            _empty(stream)


def keep_printed(run: Path) -> None:
    """Begin `train.log` in a run folder with what was printed until now; where it cannot be written, that is told."""
    log = _printed
    if log is not None:
        attempt(NAME, NAME, lambda: log.begin(run / NAME))


def _last_words(error: BaseException) -> Iterator[str]:
    """Why a run ended, as the command line will say it; of what is not foreseen, where it happened."""
    if isinstance(error, InstructftError):
        yield from f"instructft: {error}".splitlines()
    elif isinstance(error, Exception):
        yield from "".join(traceback.format_exception(error)).splitlines()
    elif not (isinstance(error, SystemExit) and not error.code):
        yield f"ended by {type(error).__name__} {error}".rstrip()


class _Lasting:
    """A stream whose failures to write are told on the other one, once, and in the run's warnings."""

    def __init__(self, stream: IO[str], name: str, kept: Stream):
        self._stream, self._name, self._told, self._kept = stream, name, False, kept

    def write(self, text: str) -> int:
        """Write, or lose the text."""
        attempt(NAME, NAME, lambda: self._kept.feed(text))
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or lose what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def close(self) -> None:
        """Stay open: absl, which rouge_score brings, closes at exit what stood for stderr when it was imported."""
        self.flush()

    def _failed(self, error: Exception) -> None:
        if self._told:
            return
        self._told = True
        attempt("output", self._name, lambda: _raise(error))
        other = sys.__stdout__ if self._name == "standard error" else sys.__stderr__
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"instructft: {_troubles['output']}", file=other, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


def _raise(error: Exception) -> None:
    raise error


def _empty(stream: IO[str]) -> None:
    """What cannot be written goes nowhere, or the interpreter complains of it at its end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
            stream.flush()
