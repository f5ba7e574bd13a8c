"""Jobs of `make gpu-check`: each a process with a limit of its own, started from one that has imported everything.

Importing torch, transformers and TRL takes ten seconds, a hundred times in a whole check. So the check imports them
once, touches no GPU, and forks. Where a fork cannot use CUDA, because something that was imported has woken the driver,
jobs are started anew (`spawn`), which is slower and says so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent
REPO = BENCHMARKS.parent

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all jobs know: where models and rows lie, and whether the figures are to mean something."""

    scratch: Path
    tiny: bool = False

    @property
    def device(self) -> str:
        """The device that is measured."""
        return "cpu" if self.tiny else "cuda"

    def folder(self, name: str) -> Path:
        """A folder for models, rows and runs, made once."""
        path = self.scratch / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True)
class Job:
    """Work for a process of its own.

    Args:
        work: called there with `given`; what it returns is written into the results.
        given: `seconds`, where that is among them, becomes the time that the work has to end by itself.
        limit: seconds after which the process is ended.
        killed: it is right that it ends itself by SIGKILL.
    """

    name: str
    work: Callable[..., Result | None]
    given: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 60
    killed: bool = False


# A part: yields jobs, and is sent what each returned, or {"failed": …} or {"left out": …}
Part = Callable[[Settings], Iterator[Job]]


def left_out(why: str) -> Result:
    """The result of a job whose library or device is not there."""
    return {"left out": why}


def run(job: Job, seconds: float, log: Path, method: str, patient: bool = False) -> Result:
    """Do a job in a process of its own; what went wrong comes back in words.

    Args:
        seconds: at most, if that is less than the job's own limit.
        log: gets what the process prints.
        method: fork | spawn.
        patient: limits are ten times as long.
    """
    began = time.perf_counter()
    limit = min(job.limit * (10 if patient else 1), seconds)
    given = {**job.given, **({"seconds": limit - 15} if "seconds" in job.given else {})}
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(job.work, given, theirs, str(log)))
    process.start()
    theirs.close()
    found: Result | None = None
    try:
        if ours.poll(limit):
            with contextlib.suppress(EOFError):
                found = ours.recv()
            process.join(5)
        else:
            found = {"failed": f"not done after {limit:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.join(5)
        ours.close()
    if found is None:
        wanted = job.killed and process.exitcode == -signal.SIGKILL
        found = {} if wanted else {"failed": f"ended with exit code {process.exitcode}: {last_line(log)}"}
    return _timed(found, began)


def _timed(found: Result, began: float) -> Result:
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def _child(work: Callable[..., Result | None], given: dict[str, Any], answer: Connection, log: str) -> None:
    os.setsid()
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # a test's own may stand there
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        found = work(**given) or {}
    except BaseException as error:
        traceback.print_exc()
        found = {"failed": in_words(error)}
    sys.stdout.flush()
    answer.send(found)


def in_words(error: BaseException) -> str:
    """An error in one line of at most 500 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 500 else text[:250] + ' … ' + text[-250:]}"


def last_line(log: Path) -> str:
    """The end of what a process printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line[-300:] for line in reversed(lines) if line.strip()), "it printed nothing")


def wake() -> Result:
    """Use CUDA, or raise."""
    import torch

    torch.zeros(1, device="cuda")
    return {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}


def warm(settings: Settings) -> str:
    """Import what jobs need, once, and leave the driver asleep; returns how jobs are to be started.

    bitsandbytes, which PEFT imports, asks for the card's capability, and that would wake the driver. It is told what a
    child found.
    """
    # asked of the driver's library instead of the driver, which after a fork could not be asked again
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    log = settings.folder("logs") / "wake.log"
    method = "fork"
    asked = torch.cuda.get_device_capability
    if not settings.tiny:
        found = run(Job("wake", wake), 60, log, method)
        if "failed" in found:
            raise SystemExit(f"CUDA cannot be used here ({found['failed']}); --tiny tries the check on a CPU")
        torch.cuda.get_device_capability = lambda *_: tuple(found["capability"])
    try:
        _import_all()
    finally:
        torch.cuda.get_device_capability = asked
    if not settings.tiny and "failed" in run(Job("wake", wake), 60, log, method):
        method = "spawn"
    return method


def _import_all() -> None:
    import datasets
    import peft  # noqa: F401
    import transformers
    import trl  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    import instructft.training.run
    import instructft.training.trainer  # noqa: F401

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
