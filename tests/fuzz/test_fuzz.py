"""Files of strangers, by a seed: each is read or refused with a message that names it, in bounded time, exit code 2.

200 inputs in `make test`; `INSTRUCTFT_FUZZ=5000`, as in `make battery`, makes it as many. `INSTRUCTFT_FUZZ_SEED` begins
elsewhere; a failure names the boundary and the number of each input, which is all that is needed to see it again.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import os
import random
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instructft.errors import EXIT_USAGE, InstructftError, is_panic
from instructft.prompt import render
from tests.fuzz import boundaries
from tests.fuzz.boundaries import Boundary
from tests.fuzz.mutations import mutated

INPUTS = int(os.environ.get("INSTRUCTFT_FUZZ", "200"))
SEED = int(os.environ.get("INSTRUCTFT_FUZZ_SEED", "0"))
MAKERS = (*boundaries.PLAIN, *boundaries.HEAVY)
SECONDS = 10
BARE = re.compile(r"^\w*(Error|Exception)\b")


class Hang(BaseException):
    """No `Exception`, so that nothing on the way takes it for an error of the file."""


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """End what takes longer; in a library that does not come back, with the place where it stands."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(boundary: Boundary, folder: Path, name: str, content: bytes, sound: object) -> str:
    """What is wrong with how one input was taken; "" where nothing is."""
    path = folder / name
    path.write_bytes(content)
    if boundary.again:
        boundary.again(folder)
    began = time.monotonic()
    try:
        with bounded(SECONDS):
            found = boundary.read(folder, name)
    except Hang:
        return f"no end in {SECONDS} s"
    except InstructftError as error:
        said = str(error)
        if error.exit_code != EXIT_USAGE:
            return f"exit code {error.exit_code}: {said[:300]}"
        if BARE.match(said):
            return f"a bare name: {said[:300]}"
        if str(folder) not in said and path.name not in said and "template" not in said and "hub" not in said:
            return f"no file named: {said[:300]}"
        return ""
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return f"{type(error).__name__}: {str(error)[:300]} at {_place(error)}"
    if boundary.sealed and content != boundary.files[name] and found != sound:
        return f"damage that nobody saw: {found!r}"[:300]
    return f"{time.monotonic() - began:.1f} s" if time.monotonic() - began > SECONDS else ""


def _place(error: BaseException) -> str:
    """The last line of ours that an error came through."""
    place, trace = "", error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        if "instructft/" in code.co_filename and "tests" not in code.co_filename:
            place = f"{code.co_filename.rpartition('instructft/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def faults(boundary: Boundary, folder: Path, inputs: int, which: str) -> list[str]:
    """Those of so many inputs, each with its number."""
    for name, content in boundary.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    sound = copy.deepcopy(boundary.read(folder, next(iter(boundary.files))))
    wrong = []
    for number in range(SEED, SEED + inputs):
        chance = random.Random(f"{which} {number}")
        name = chance.choice(sorted(boundary.files))
        content = mutated(name, boundary.files[name], chance)
        if why := fault(boundary, folder, name, content, sound):
            wrong.append(f"{which} {number}, {name}: {why}")
        for other in (name, *(boundary.files if boundary.again else ())):
            (folder / other).write_bytes(boundary.files[other])
    return wrong


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGALRM")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_what_strangers_give_is_read_or_refused(
    make: Callable[[], Boundary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(render, "SECONDS", 1)
    folder = tmp_path / "given"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = faults(make(), folder, -(-INPUTS // len(MAKERS)), make.__name__)
    assert not wrong, f"{len(wrong)} of {INPUTS // len(MAKERS)}:\n" + "\n".join(wrong)
    assert not (tmp_path / "ran").exists()
