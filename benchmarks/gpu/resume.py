"""A run that is killed and resumed, beside the same run that never was: their weights, bit for bit or how far apart.

Kernels that add up in any order make two runs differ in last bits even where none was killed, so a second unbroken run
says how much of the difference is theirs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.jobs import Job, Result, Settings
from gpu.runs import apart, content, losses, recipe, shape, train

STEPS, SAVED, KILLED = 12, 6, 8
# what is tried -> keys of `train:`
WAYS: dict[str, dict[str, Any]] = {"as it is": {}, "deterministic": {"deterministic": True}}


def run(settings: Settings, name: str, options: dict[str, Any], kill: bool = False) -> Result:
    """One run, or the part of it before the kill."""
    import instructft.training.run as road

    folder = settings.folder("resume")
    given = content(
        settings, folder, model={"config": shape(settings, "gpt2")},
        train={"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, **options},
    )  # fmt: skip
    if kill:
        from transformers import TrainerCallback

        class Kill(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == KILLED:
                    os.kill(os.getpid(), signal.SIGKILL)

        build = road.build_trainer

        def build_and_kill(*args: Any) -> Any:
            trainer = build(*args)
            trainer.add_callback(Kill())
            return trainer

        road.build_trainer = build_and_kill
    done = train(recipe(folder, name, given))
    return {"losses": losses(Path(done.output_dir))}


def compare(settings: Settings, first: str, second: str) -> Result:
    """The weights of two runs."""
    folder = settings.folder("resume")
    return apart(folder / f"run-{first}", folder / f"run-{second}")


def jobs(settings: Settings) -> Iterator[Job]:
    """Unbroken twice, killed and resumed; for each way."""
    for way, options in list(WAYS.items())[: 1 if settings.tiny else None]:
        word = way.replace(" ", "-")
        given = {"settings": settings, "options": options}
        first = yield Job(f"{way}, unbroken", run, {**given, "name": f"{word}-unbroken"})
        if "failed" in first:
            continue
        yield Job(f"{way}, killed", run, {**given, "name": f"{word}-killed", "kill": True}, killed=True)
        yield Job(f"{way}, resumed", run, {**given, "name": f"{word}-killed"})
        two = {"settings": settings, "first": f"{word}-unbroken"}
        yield Job(f"{way}: resumed beside unbroken", compare, {**two, "second": f"{word}-killed"})
        if not settings.tiny:
            yield Job(f"{way}, unbroken again", run, {**given, "name": f"{word}-again"})
            yield Job(f"{way}: unbroken twice", compare, {**two, "second": f"{word}-again"})


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown."""
    rows = ["| | same bits | weights that differ | largest difference |", "| --- | --- | ---: | ---: |"]
    return rows + [
        f"| {one['job']} | {'yes' if one['same bits'] else 'no'} | {one['different']:,} of {one['weights']:,} | "
        f"{one['largest difference']:.1e} |" for one in found if "same bits" in one
    ]  # fmt: skip
