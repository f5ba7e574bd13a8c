"""The tests, with models on the GPU: `INSTRUCTFT_TEST_DEVICE=cuda` and the folders that touch a device."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

from gpu.jobs import REPO, Job, Result, Settings, left_out

FOLDERS = ("models", "training", "adapters", "merging", "evaluation", "inference", "data/test_packing.py",
           "data/test_collator.py", "integration/test_train.py", "integration/test_resume.py")  # fmt: skip
TINY = ("data/test_row_order.py",)


def run(settings: Settings, seconds: float) -> Result:
    """pytest in a process that it starts; failures by name, with the last line of each."""
    chosen = [f"tests/{name}" for name in (TINY if settings.tiny else FOLDERS)]
    command = [sys.executable, "-m", "pytest", *chosen, "-vv", "--tb=line", "-p", "no:cacheprovider", "-rfE"]
    if importlib.util.find_spec("xdist") and not settings.tiny:
        command += [f"--numprocesses={min(14, os.cpu_count() or 1)}", "--dist=worksteal"]
    environment = {**os.environ, "INSTRUCTFT_TEST_DEVICE": settings.device}
    process = subprocess.Popen(
        command, cwd=REPO, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        text, cut = process.communicate(timeout=seconds)[0], False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it sums up what it found so far
        text, cut = process.communicate()[0], True
    print(text)  # into the log of the job
    wrong = sorted(set(re.findall(r"(?:FAILED|ERROR) (tests/.*)", text)))
    wrong = [line for line in wrong if not any(other != line and other.startswith(f"{line} - ") for other in wrong)]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    if not counts and not cut:
        raise RuntimeError(text.strip()[-400:])
    return {**counts, "cut short": cut, "wrong": wrong}


def missing() -> Result:
    """What stands where pytest is not there."""
    return left_out("pytest is not installed")


def jobs(settings: Settings) -> Iterator[Job]:
    """One job."""
    if importlib.util.find_spec("pytest") is None:
        yield Job("all", missing)
        return
    yield Job("pytest", run, {"settings": settings, "seconds": 200.0}, limit=210)


def table(found: list[Result]) -> list[str]:
    """What failed."""
    return [f"- {line}" for one in found for line in one["wrong"]]
