"""Several processes give what one gives, in its order, with its errors, and hold little at a time."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.data.arrow.workers import METHOD, cores, in_order, leaving_signals
from instructft.errors import DataError, InstructftError


def squared(number: int) -> bytes:
    time.sleep(0.002 * (number % 3))  # pieces are not done in the order in which they are asked for
    return str(number * number).encode() * 50_000


@pytest.mark.parametrize("number", [2, 3])  # of this process, of the other one
def test_an_error_is_raised_where_its_turn_comes(number: int) -> None:
    def work(piece: int) -> bytes:
        if piece == number:
            raise DataError("row 7 is broken")
        return bytes([piece])

    found = in_order(work, 6, 2)
    assert [next(found) for _ in range(number)] == [bytes([piece]) for piece in range(number)]
    with pytest.raises(DataError, match="row 7 is broken"):
        next(found)


@pytest.mark.parametrize("processes", [1, 2, 3, 20])
def test_results_come_in_order(processes: int) -> None:
    assert list(in_order(squared, 10, processes)) == [squared(number) for number in range(10)]


def test_no_pieces_give_nothing() -> None:
    assert list(in_order(squared, 0, 4)) == []


def test_work_is_done_in_this_process_and_in_others() -> None:
    found = list(in_order(lambda _: str(os.getpid()).encode(), 6, 3))
    assert found[0] == str(os.getpid()).encode()
    assert found[:3] == found[3:]
    assert len(set(found)) == 3


def test_an_error_that_cannot_travel_is_told_by_its_words() -> None:
    class Local(Exception):
        pass

    def work(number: int) -> bytes:
        if number:
            raise Local("of no module")
        return b""

    with pytest.raises(RuntimeError, match="Local: of no module"):
        list(in_order(work, 2, 2))


def test_a_process_that_is_killed_is_no_end_of_the_rows() -> None:
    def work(number: int) -> bytes:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes([number])

    with pytest.raises(InstructftError, match="ended with signal 9 before its work was done"):
        list(in_order(work, 6, 2))


def test_a_process_that_is_far_ahead_waits(tmp_path: Path) -> None:
    def work(number: int) -> bytes:
        (tmp_path / str(number)).touch()
        return bytes(1 << 20)

    found = in_order(work, 200, 2)
    next(found)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) < 20
    assert sum(map(len, found)) == 199 << 20
    assert len(list(tmp_path.iterdir())) == 200


def test_processes_end_with_the_one_that_asks_no_more() -> None:
    found = in_order(lambda _: str(os.getpid()).encode(), 100, 2)
    here, other = int(next(found)), int(next(found))
    found.close()
    assert here == os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_this_process_may_use_some_core() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


SCRIPT = """
import instructft.data.arrow.workers as workers

workers.METHOD = "spawn"  # as on macOS and Windows


def work(number):
    return bytes([number])


{guard}print(b"".join(workers.in_order(work, 4, 2)), flush=True)
"""


@pytest.mark.parametrize(("guard", "said"), [("", True), ('if __name__ == "__main__":\n    ', False)])
def test_a_script_without_a_guard_is_not_run_anew(guard: str, said: bool, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard))
    there = {**os.environ, "PYTHONPATH": str(Path(instructft.__file__).parent.parent)}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "b'\\x00\\x01\\x02\\x03'\n"), done.stderr
    assert ("script.py has no `if __name__" in done.stderr) == said
    assert "Traceback" not in done.stderr


def test_a_process_that_loads_rows_leaves_the_first_signal_to_the_one_that_trains() -> None:
    from torch.utils.data import DataLoader

    collate = functools.partial(leaving_signals, list)
    loader = DataLoader(list(range(8)), 1, num_workers=1, collate_fn=collate, multiprocessing_context="fork")  # type: ignore[arg-type]
    batches: Any = iter(loader)
    found = [next(batches)]
    worker = batches._workers[0]
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    found += list(batches)
    assert found == [[number] for number in range(8)]
    worker.join(20)
    assert worker.exitcode == 0


def test_a_second_signal_ends_a_process_that_loads_rows() -> None:
    from torch.utils.data import DataLoader

    collate = functools.partial(leaving_signals, list)
    loader = DataLoader(list(range(8)), 1, num_workers=1, collate_fn=collate, multiprocessing_context="fork")  # type: ignore[arg-type]
    batches: Any = iter(loader)
    next(batches)
    worker = batches._workers[0]
    for _ in range(400):
        with contextlib.suppress(RuntimeError, ProcessLookupError):  # torch's handler of SIGCHLD raises at any place
            os.kill(worker.pid, signal.SIGTERM)
            worker.join(0.05)
        if not worker.is_alive():
            break
    assert worker.exitcode == -signal.SIGTERM


@pytest.mark.skipif(METHOD != "fork", reason="others begin with nothing")
def test_what_this_process_learned_by_the_first_piece_the_others_know() -> None:
    known: list[int] = []

    def work(number: int) -> bytes:
        known.append(number)
        return bytes([len(known)])

    assert list(in_order(work, 4, 2)) == [b"\x01", b"\x02", b"\x02", b"\x03"]
    assert known == [0, 2]
