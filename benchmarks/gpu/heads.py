"""Output heads against each other on this card, where `benchmarks/heads.py` is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

from gpu.jobs import BENCHMARKS, Job, Result, Settings, left_out


def run(settings: Settings) -> Result:
    """What the script prints."""
    command = [sys.executable, str(BENCHMARKS / "heads.py"), *(["--tiny"] if settings.tiny else [])]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:])
    return {"lines": done.stdout.splitlines()}


def missing() -> Result:
    """What stands where the script is not there."""
    return left_out("benchmarks/heads.py is not there")


def jobs(settings: Settings) -> Iterator[Job]:
    """One job."""
    there = importlib.util.find_spec("heads") is not None
    yield Job("heads", run, {"settings": settings}, limit=90) if there else Job("heads", missing)


def table(found: list[Result]) -> list[str]:
    """What it printed."""
    return [line for one in found for line in one["lines"]]
