"""Where the time of a training step goes on a CPU: operators by their own time, and the parts of a step.

    python benchmarks/profile_step.py [--steps 4] [--packed] [--top 15]

Ours, by `instructft.train` with the model and the rows of train_cpu.py, under torch's profiler after two steps of
warm-up. The first table adds up operators; the second says what part of a step they serve: body and head forward,
backward, clipping, AdamW, data, and the rest, which is Python and the trainer.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import contestants
from contestants import Task, make, run, source_and_tokenizer
from train_cpu import NO_DROPOUT, SHAPE, TINY

# method of the trainer -> the part of a step that it is
PARTS = {
    "get_batch_samples": "data: rows to batches",
    "compute_loss": "forward: body, head and the head's gradient",
    "_clip_grad_norm": "clipping",
    "log": "logging",
}


def watched(task: Task, steps: int) -> tuple[Any, float]:
    """Train `steps` steps after two, under the profiler; returns it and the seconds that they took."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from instructft.training.trainer import Trainer

    profiler = profile(activities=[ProfilerActivity.CPU])

    def named(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part: {name}"):
                return function(*args, **kwargs)

        return call

    build_stopwatch = contestants.stopwatch

    def stopwatch(task: Task) -> Any:
        watch = build_stopwatch(task)
        tick = watch.tick

        def and_profile(step: int) -> None:
            tick(step)
            if step == 2:
                profiler.start()
            elif step == task.steps:
                profiler.stop()

        watch.tick = and_profile
        return watch

    own = {method: Trainer.__dict__.get(method) for method in PARTS}
    backward = torch.Tensor.backward
    for method, name in PARTS.items():
        setattr(Trainer, method, named(name, getattr(Trainer, method)))
    torch.Tensor.backward = named("backward: body", backward)
    contestants.stopwatch = stopwatch
    try:
        found = contestants.ours(dataclasses.replace(task, steps=steps + 2, warmup=2))
    finally:
        torch.Tensor.backward = backward
        contestants.stopwatch = build_stopwatch
        for method, function in own.items():
            if function is None:
                delattr(Trainer, method)
            else:
                setattr(Trainer, method, function)
    return profiler, found["step_seconds"] * steps


def report(profiler: Any, seconds: float, steps: int, top: int) -> str:
    """The two tables, in Markdown."""
    averages = profiler.key_averages()
    operators = sorted((e for e in averages if not e.key.startswith(("part: ", "Optimizer."))),
                       key=lambda e: -e.self_cpu_time_total)  # fmt: skip
    lines = [f"{seconds / steps:.3f} s a step, under the profiler", "", "| operator | calls/step | ms/step | share |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for event in operators[:top]:
        took = event.self_cpu_time_total / 1e6
        lines.append(f"| {event.key} | {event.count / steps:.0f} | {1e3 * took / steps:.1f} | {took / seconds:.1%} |")
    parts = {e.key.removeprefix("part: "): e.cpu_time_total / 1e6 for e in averages if e.key.startswith("part: ")}
    parts["AdamW"] = sum(e.cpu_time_total for e in averages if e.key.startswith("Optimizer.step")) / 1e6
    parts["the rest: the trainer, callbacks"] = seconds - sum(parts.values())
    lines += ["", "| part of a step | ms/step | share |", "| --- | ---: | ---: |"]
    for name, took in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {1e3 * took / steps:.1f} | {took / seconds:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Train under the profiler, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--top", type=int, default=15, help="operators in the table")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to try the script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer = source_and_tokenizer(Path(folder), bundled=args.tiny)
        task = Task(
            folder, here=args.tiny, tokenizer=tokenizer, packing=args.packed, max_length=64 if args.tiny else 512,
            batch=2 if args.tiny else 8, shape={**(TINY if args.tiny else SHAPE), **NO_DROPOUT},
        )  # fmt: skip
        make(task, source, 60 if args.tiny else 999)
        run(dataclasses.replace(task, which="prepare", sampling="sequential"))  # the cache of prepared rows
        profiler, seconds = watched(task, args.steps)
    print(report(profiler, seconds, args.steps, args.top))


if __name__ == "__main__":
    main()
