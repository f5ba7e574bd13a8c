"""Output heads against each other on this card, by `benchmarks/heads.py` where it is there."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterator

from gpu.jobs import Job, Result, Settings, left_out


def run(settings: Settings, seconds: float) -> Result:
    """Every head on every shape, while there is time."""
    heads = importlib.import_module("heads")
    until = time.monotonic() + seconds
    shapes = ["tiny"] if settings.tiny else [name for name in heads.SHAPES if name != "tiny"]
    lines = [line for shape in shapes for line in heads.measure_heads(shape, until=until)]
    return {"heads": lines, "rows": [heads.in_words(line) for line in lines]}


def missing() -> Result:
    """What stands where the script is not there."""
    return left_out("benchmarks/heads.py is not there")


def jobs(settings: Settings) -> Iterator[Job]:
    """One job."""
    there = importlib.util.find_spec("heads") is not None
    yield Job("heads", run, {"settings": settings, "seconds": 60}, limit=80) if there else Job("heads", missing)


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown, held against TRL's head."""
    rows = ["| shape | head | ms | GiB | loss apart | gradients apart |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    return rows + [line for one in found for line in one["rows"]]
