"""Jobs of `make gpu-check`: each a process with a limit of its own, started from one that has imported everything.

Importing torch, transformers and TRL takes ten to twenty seconds, and a whole check has fifty jobs. So the check
imports them once, touches no GPU, and forks. A job that needs what may not be imported so is started anew (`fresh`).
"""

from __future__ import annotations

import contextlib
import importlib
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
from types import SimpleNamespace
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
        fresh: started anew, importing everything for itself.
    """

    name: str
    work: Callable[..., Result | None]
    given: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 60
    killed: bool = False
    fresh: bool = False


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
    context: Any = multiprocessing.get_context("spawn" if job.fresh else method)
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
    known = torch.cuda.get_device_properties(0)
    values = {name: getattr(known, name) for name in dir(known) if not name.startswith("_")}
    return {
        "device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
        "devices": torch.cuda.device_count(),
        "properties": {name: value for name, value in values.items() if isinstance(value, int | str)},
    }  # fmt: skip


# What jobs need, in the order in which one imports the other
IMPORTS = ("transformers", "datasets", "accelerate", "peft", "trl", "instructft.training.run")
LAZY = {  # what is imported when it is asked for
    "transformers": ("AutoModelForCausalLM", "AutoTokenizer", "Trainer"),
    "trl": ("SFTConfig", "SFTTrainer"),
}
CAREFUL = "INSTRUCTFT_GPU_CHECK_CAREFUL"  # set for a second start: its scratch folder


def warm(settings: Settings) -> str:
    """Import what jobs need, once, and leave the driver asleep: a fork of a process that woke it has no CUDA.

    Returns what was not imported, in words, or "".

    Raises:
        SystemExit: there is no GPU.
    """
    import torch  # noqa: F401

    log = settings.folder("logs") / "wake.log"
    if settings.tiny:
        for name in IMPORTS:
            _import(name)
        curves = importlib.import_module("instructft.report.curves")
        curves.plot_loss = lambda *_: None  # half of the time of a run that trains nothing
        return ""
    found = run(Job("wake", wake), 60, log, "fork")
    if "failed" in found:
        raise SystemExit(f"CUDA cannot be used here ({found['failed']}); --tiny tries the check on a CPU")
    if not os.environ.pop(CAREFUL, ""):
        with asleep(found) as woken_by:
            for name in IMPORTS:
                _import(name)
        again = run(Job("wake", wake), 60, log, "fork")
        if "failed" not in again:
            return ""
        print(f"CUDA was woken by {woken_by or 'native code'} ({again['failed']}): again, import by import")
        os.environ[CAREFUL] = str(settings.scratch)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    left = []
    with asleep(found):
        for name in IMPORTS:  # one after the other, each first in a child
            if "failed" in run(Job("trial", _trial, {"name": name}), 60, log, "fork"):
                left.append(name)
            else:
                _import(name)
    return f"importing {', '.join(left)} wakes the driver, so each job does that anew" if left else ""


def _trial(name: str) -> None:
    _import(name)
    log = Path(os.devnull)
    found = run(Job("wake", wake), 60, log, "fork")
    if "failed" in found:
        raise RuntimeError(found["failed"])


def _import(name: str) -> None:
    module = importlib.import_module(name)
    for lazy in LAZY.get(name, ()):
        getattr(module, lazy)
    if name == "datasets":
        module.disable_progress_bars()
    elif name == "transformers":
        module.logging.disable_progress_bar()


@contextlib.contextmanager
def asleep(found: Result) -> Iterator[list[str]]:
    """What imports ask of CUDA is answered with what a child found, and bitsandbytes, which PEFT imports, is hidden.

    Without the driver's management library even `is_available` would wake it. Jobs that need bitsandbytes start anew.
    Yields a list that gets what wakes CUDA all the same.
    """
    import torch

    count, really = found["devices"], torch.cuda._lazy_init
    woken_by: list[str] = []

    def note() -> None:
        woken_by.extend(f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[-5:-1])
        really()

    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: count),
        (torch.cuda, "get_device_capability", lambda *_: tuple(found["capability"])),
        (torch.cuda, "get_device_name", lambda *_: found["device"]),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(**found["properties"])),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "_lazy_init", note),
        (torch._C, "_cuda_getDeviceCount", lambda: count),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in answers if hasattr(owner, name)]
    for owner, name, answer in answers:
        setattr(owner, name, answer)
    hidden = sys.modules.get("bitsandbytes")
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield woken_by
    finally:
        del sys.modules["bitsandbytes"]
        if hidden is not None:  # else what is left of it would be a module without its parts
            sys.modules["bitsandbytes"] = hidden
        for owner, name, _ in answers:  # a build for the CPU lacks some of them
            delattr(owner, name)
        for owner, name, function in kept:
            setattr(owner, name, function)
