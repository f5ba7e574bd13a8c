"""What this card can do at most: the rate of a large product, of a copy, and of attention over documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu.jobs import Job, Result, Settings


def measure(settings: Settings) -> Result:
    """Operations and bytes a second, by events on the card; the best of some tries."""
    import torch

    tiny, device = settings.tiny, settings.device
    side, copied = (64, 1 << 12) if tiny else (8192, 1 << 29)
    found: Result = {"device": "cpu" if tiny else torch.cuda.get_device_name()}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        square = torch.randn(side, side, device=device, dtype=dtype)
        took = timed(lambda square=square: square @ square, tiny)
        found[f"product {name}, TFLOP/s"] = round(2 * side**3 / took / 1e12, 1)
    source = torch.randn(copied, device=device)
    target = torch.empty_like(source)
    took = timed(lambda: target.copy_(source), tiny)
    found["copy, TB/s"] = round(2 * source.numel() * source.element_size() / took / 1e12, 2)
    host = torch.empty(1 << 20 if tiny else 1 << 28, dtype=torch.uint8, pin_memory=not tiny)
    there = torch.empty_like(host, device=device)
    found["from the host, GB/s"] = round(host.numel() / timed(lambda: there.copy_(host), tiny) / 1e9, 1)
    small = torch.zeros(1, device=device)
    found["launch, µs"] = round(timed(lambda: [small.add_(1) for _ in range(1000)], tiny) * 1e3, 2)
    if not tiny:
        free, total = torch.cuda.mem_get_info()
        found |= {"GiB": round(total / 2**30, 1), "GiB free": round(free / 2**30, 1)}
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def timed(work: Callable[[], Any], tiny: bool) -> float:
    """Seconds of a call on the device."""
    import torch

    for _ in range(3):
        work()
    if tiny:
        began = time.perf_counter()
        work()
        return max(time.perf_counter() - began, 1e-9)
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            work()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 5e3)
    return best


def jobs(settings: Settings) -> Iterator[Job]:
    """One job."""
    yield Job("card", measure, {"settings": settings}, limit=40)


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown."""
    rows = ["| | |", "| --- | ---: |"]
    return rows + [f"| {name} | {value} |" for one in found for name, value in one.items()
                   if name not in ("part", "job", "seconds")]  # fmt: skip
