"""The processes of a launch: started by accelerate, reached by every signal, none left behind, one exit code for all.

    instructft launch            prints the line, passes signals on, gives the exit code
    └── accelerate launch        in a session of its own: `python -m instructft.training.launch.workers ARGUMENTS`
        ├── instructft train     rank 0
        └── instructft train     rank 1, …

Two things are done here that accelerate's own command does otherwise (accelerate 1.15, torch 2.13):

- It ends with exit code 1 and a traceback whatever the workers said. So its function is called, not its program, and
  the exit codes are read from the exception in which torch lists every worker that failed.
- On SIGTERM torch gives workers 30 seconds and then kills them, which a large checkpoint does not survive. So signals
  go to the workers, and torch learns of it when they have ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from instructft.errors import EXIT_FAILED, EXIT_SIGTERM, EXIT_USAGE, InstructftError
from instructft.training.launch.signals import AGAIN, SIGNALS, TWICE, listen

if TYPE_CHECKING:
    from accelerate import PartialState

_MARK = "INSTRUCTFT_LAUNCH"  # in the environment of every process of a launch: "<pid of the launcher>-<random>"
_GRACE = 3.0  # seconds that a process has to end by itself once it should
_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that comes when the parent ends


def run(arguments: Sequence[str]) -> int:
    """Run `accelerate launch ARGUMENTS` to its end; returns 0, 1, 2 or 128 + a signal as the workers ended.

    Signals that end a run are passed on to every worker. 5 seconds after the second one, or after the workers have
    ended, nothing of the launch is left.
    """
    watched = _Launch(arguments)
    before = listen(watched.pass_on)
    try:
        return watched.wait()
    finally:
        watched.end()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Launch:
    """The process that runs accelerate, and all below it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._mark = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._signal = 0  # the first that came
        self._asked = False  # whether one came that ends the launch if it comes again
        self._since = 0.0  # when the last one did, by the monotonic clock
        self._deadline = float("inf")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "instructft.training.launch.workers", *arguments],
            env={**os.environ, **safe_path(), _MARK: self._mark},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal comes to this process alone, and is passed on once
        )

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Send a signal to the workers; before there are any, to the process that would start them."""
        now = time.monotonic()
        if self._signal and (now - self._since < AGAIN or number not in TWICE):
            return
        if self._asked:
            self._deadline = min(self._deadline, now + _GRACE)
        self._signal, self._since, self._asked = self._signal or number, now, self._asked or number in TWICE
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended meanwhile
            agent = psutil.Process(self._process.pid)
            for process in agent.children() or [agent]:
                _send(process, number)

    def wait(self) -> int:
        """Wait for the end, or for the deadline that a second signal sets."""
        while time.monotonic() < self._deadline:
            try:
                code = self._process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            found = exit_code([code])
            return 128 + self._signal if self._signal and found > EXIT_USAGE else found
        return 128 + self._signal

    def end(self) -> None:
        """Leave no process behind, whatever session it is in: each carries the mark."""
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        if self._deadline == float("inf"):
            _, left = psutil.wait_procs(left, _GRACE)
        for process in left:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(left, 1)
        self._process.poll()

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark
        except (psutil.Error, OSError):  # of another user, or gone
            return False


def safe_path() -> dict[str, str]:
    """What keeps children from modules that lie in the working directory, beside a recipe: from Python 3.11 on.

    >>> safe_path()["PYTHONSAFEPATH"]
    '1'
    """
    ours = str(Path(__file__).resolve().parents[3])  # of a checkout that is not installed
    if ours != str(Path.cwd()):
        return {"PYTHONSAFEPATH": "1"}
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))}


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def exit_code(codes: Iterable[int]) -> int:
    """One exit code for several workers, as `subprocess` counts them: -15 is a process that SIGTERM ended.

    One that failed ends the others with SIGTERM, and one that found a fault in the recipe leaves them without a peer:
    so 2 goes before 1, and 1 before 143.

    >>> exit_code([-15, 1]), exit_code([143, 143]), exit_code([1, 2]), exit_code([0, 0])
    (1, 143, 2, 0)
    """
    found = {128 - code if code < 0 else code for code in codes} - {0}
    stops = {128 + number for number in SIGNALS}
    if EXIT_USAGE in found:
        return EXIT_USAGE
    if found - stops:
        return EXIT_FAILED
    return max(found, default=0)


# --------------------------------------------------------------------------------------------------------------------
# In the process that runs accelerate
# --------------------------------------------------------------------------------------------------------------------


def run_accelerate(arguments: Sequence[str]) -> int:
    """Do what `accelerate launch ARGUMENTS` does; returns one exit code for its workers."""
    _end_with_the_launcher()
    for number in SIGNALS:
        signal.signal(number, _before_torch_listens)
    if os.environ.get("INSTRUCTFT_TRACEBACK") != "1":
        logging.disable(logging.ERROR)  # the workers have said what happened
        warnings.simplefilter("ignore")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(list(arguments)))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:
        codes = {0: error.returncode}
    except SignalException as error:
        return 128 + error.sigval
    except Exception as error:
        if os.environ.get("INSTRUCTFT_TRACEBACK") == "1":
            raise
        print(f"instructft: accelerate launch: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    else:
        return 0
    _say_who_was_killed(codes)
    return exit_code(codes.values())


def _end_with_the_launcher() -> None:
    """Should the launcher be killed, the kernel sends this process SIGTERM, and torch stops the workers."""
    launcher = os.environ.get(_MARK, "").partition("-")[0]
    if sys.platform != "linux" or not launcher:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it was killed before that was said
        os._exit(EXIT_SIGTERM)


def _before_torch_listens(number: int, frame: FrameType | None) -> None:
    children = psutil.Process().children()
    for child in children:
        _send(child, number)
    if not children:
        os._exit(128 + number)


def _say_who_was_killed(codes: Mapping[int, int]) -> None:
    """A worker that ended by itself has said why; one that was killed could not."""
    for rank, code in codes.items():
        if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
            name = signal.Signals(-code).name
            why = "; the system kills so when memory runs out" if name == "SIGKILL" else ""
            print(f"instructft: the process of rank {rank} was killed by {name}{why}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_accelerate(sys.argv[1:]))


Result = TypeVar("Result")


def first_process(state: PartialState, do: Callable[[], Result]) -> Result:
    """Call `do` on the first process only; every process gets what it returned, or raises what it raised.

    Example::

        first_process(PartialState(), lambda: 2 + 2)
        # 4
    """
    if state.num_processes == 1:
        return do()
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    if state.is_main_process:
        try:
            told[0] = do()
        except InstructftError as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    result: Result = told[0]
    return result
