"""What `--measure` of `check` finds by real steps: which batch fits on this device, and which one is the fastest.

A step stays what it is: its rows are only divided otherwise, into batches that go through the model at once::

    8 rows × 4 batches   5.1 GiB    9,800 tokens/s      as the recipe says
    32 × 1               does not fit
    16 × 2               9.4 GiB   12,100 tokens/s      the fastest

Each try is a process of its own (`real_step`) and trains three steps on the longest rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from instructft.errors import InstructftError, UsageError
from instructft.recipe.schema import Recipe
from instructft.training.launch.workers import safe_path
from instructft.weights import remote_code

# What is left out of a try: it only watches a run, or keeps what it leaves.
LEFT_OUT = (
    *("train.max_steps=3", "train.eval_strategy=no", "train.save_strategy=no", "train.logging_strategy=no"),
    *("train.load_best_model_at_end=false", "train.early_stopping_patience=null", "train.report_to=[]", "samples=[]"),
    *("train.tokens_per_step=null", "train.auto_find_batch_size=false", "hub.push=never", "train.on_divergence=warn"),
    *("evaluation.rows=0", "evaluation.metrics=[]", "train.metric_for_best_model=null"),
)
SPARE = 0.9  # share of the machine's free memory that a larger batch may be expected to take; a CPU has no limit else

Try = dict[str, Any]  # rows, gradient_accumulation_steps, gradient_checkpointing, fits, memory, tokens_per_second


def measure(recipe: Recipe, accumulation: int, device: str, say: Callable[[str], Any]) -> dict[str, Any]:
    """What was tried, in order, and the fastest that fits.

    Args:
        accumulation: batches in a step of one process.
        device: "cpu" or "cuda", where it trains.
        say: told in one line of each try.

    Raises:
        UsageError: the rows are a stream.
        InstructftError: a step failed, for another reason than memory.
    """
    if any(entry.streaming for entry in recipe.data.datasets):
        raise UsageError(
            "--measure takes the longest rows, which a stream does not tell; set data.datasets streaming off"
        )
    train = recipe.train_resolved()
    found = Tries(recipe, accumulation * train["per_device_train_batch_size"], device, say)
    rows, checkpointing = train["per_device_train_batch_size"], bool(train["gradient_checkpointing"])
    own = found.take(rows, checkpointing)
    if own["fits"]:
        found.search([n for n in found.sizes if n > rows], checkpointing)
        if checkpointing:
            found.search([n for n in found.sizes if n >= rows], False)
    elif not found.search([n for n in found.sizes if n < rows], checkpointing) and not checkpointing:
        found.search([n for n in found.sizes if n <= rows], True)
    fitting = [one for one in found.done if one["fits"]]
    best = max(fitting, key=lambda one: one["tokens_per_second"], default=None)
    return {"device": device, "tries": found.done, "best": best}


class Tries:
    """The tries of one recipe.

    Args:
        step: rows of a step of one process; each try divides them into equal batches.
    """

    def __init__(self, recipe: Recipe, step: int, device: str, say: Callable[[str], Any]):
        self.recipe, self.step, self.device, self.say = recipe, step, device, say
        self.sizes = [n for n in range(1, step + 1) if step % n == 0]  # rows of a batch
        self.done: list[Try] = []

    def search(self, sizes: list[int], checkpointing: bool) -> bool:
        """Bisect for the largest batch that fits, of those in rising order; whether any does."""
        low, high = 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            if self._hopeless(sizes[middle]) or not self.take(sizes[middle], checkpointing)["fits"]:
                high = middle
            else:
                low = middle + 1
        return low > 0

    def _hopeless(self, rows: int) -> bool:
        """On a CPU, whether a batch would push other programs out of memory, judged by what a smaller one took."""
        smaller = [one for one in self.done if one["fits"] and one["rows"] < rows]
        if self.device != "cpu" or not smaller:
            return False
        last = max(smaller, key=lambda one: one["rows"])
        return bool(last["memory"] * rows / last["rows"] > SPARE * psutil.virtual_memory().available)

    def take(self, rows: int, checkpointing: bool) -> Try:
        """Try one batch."""
        batches = self.step // rows
        one: Try = {"rows": rows, "gradient_accumulation_steps": batches, "gradient_checkpointing": checkpointing}
        with tempfile.TemporaryDirectory(prefix="instructft-") as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(self.recipe.to_yaml(), encoding="utf-8")
            overrides = [
                *LEFT_OUT,
                f"train.per_device_train_batch_size={rows}",
                f"train.gradient_accumulation_steps={batches}",
                f"train.gradient_checkpointing={str(checkpointing).lower()}",
                f"output_dir={Path(folder) / 'run'}",
            ]
            one |= _in_a_process(str(path), overrides)
        if one["fits"]:
            one["tokens_per_second"] = one.pop("tokens") / one["seconds"]
        self.done.append(one)
        self.say(in_words(one))
        return one


def _in_a_process(path: str, overrides: list[str]) -> dict[str, Any]:
    line = [sys.executable, "-m", "instructft.check.real_step", path, *overrides]
    line += [remote_code.FLAG] if remote_code.allowed() else []
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, **safe_path()})
    if done.returncode == -9:  # the system kills what takes the last memory
        return {"fits": False}
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise InstructftError(f"check --measure: a step of this recipe failed: {why}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def in_words(one: Try) -> str:
    """A try on one line.

    >>> in_words({"rows": 8, "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "fits": False})
    '8 rows × 4, checkpointing: does not fit'
    """
    from instructft.formatting import memory_size

    name = f"{one['rows']} rows × {one['gradient_accumulation_steps']}"
    name += ", checkpointing" if one["gradient_checkpointing"] else ""
    if not one["fits"]:
        return f"{name}: does not fit"
    return f"{name}: {memory_size(one['memory'])}, {one['tokens_per_second']:,.0f} tokens/s"


def keys(one: Try) -> str:
    """The keys by which a run does as this try did.

    >>> keys({"rows": 16, "gradient_accumulation_steps": 2, "gradient_checkpointing": False})
    'train.per_device_train_batch_size=16 train.gradient_accumulation_steps=2 train.gradient_checkpointing=false'
    """
    checkpointing = str(one["gradient_checkpointing"]).lower()
    return (
        f"train.per_device_train_batch_size={one['rows']} "
        f"train.gradient_accumulation_steps={one['gradient_accumulation_steps']} "
        f"train.gradient_checkpointing={checkpointing}"
    )
