"""Tests of `instructft.checkpoints.lock`: one process at a time, by its number, and no trace of one that has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from instructft.checkpoints.lock import only_one
from instructft.errors import UsageError

HOLD = """
import sys, time
from pathlib import Path
from instructft.checkpoints.lock import only_one
with only_one(Path(sys.argv[1]), "runs/a: a run", "choose another"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path):
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_told_the_number_of_the_first(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    for _ in range(2):  # asking takes nothing away from the first
        said = f"runs/a: a run is under way there \\(process {other.pid} on "
        with pytest.raises(UsageError, match=said), only_one(tmp_path / "lock", "runs/a: a run", "choose another"):
            pytest.fail("both hold it")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_lock_ends_with_its_process(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "lock").exists()
    with only_one(tmp_path / "lock", "runs/a: a run", "choose another"):
        pass
    assert not (tmp_path / "lock").exists()


def test_a_process_may_ask_for_its_own_again(tmp_path: Path) -> None:
    with only_one(tmp_path / "lock", "a", "b"), only_one(tmp_path / "lock", "a", "b"):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert not list(tmp_path.iterdir())
