"""Real steps of a recipe on its longest rows, in a process of its own: what they take in seconds and in memory.

`python -m instructft.check.real_step RECIPE.yaml [KEY=VALUE …]` prints one JSON object as its last line. A process
whose memory ran out holds more than it needs afterwards, if the system has not killed it: hence one for each try.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from instructft.recipe.schema import Recipe

STEPS = 3  # the first one warms up, the others are measured


def take(recipe: Recipe) -> dict[str, Any]:
    """Load the recipe's model and train some steps on the batch of its longest rows; nothing of it is kept.

    Example::

        take(load_recipe("quickstart", ["output_dir=/tmp/try", "train.max_steps=3"]))
        # {'fits': True, 'memory': 612368384, 'seconds': 0.041, 'tokens': 1390}
    """
    from accelerate import PartialState
    from rich.console import Console

    from instructft.checkpoints.resume import RunStart
    from instructft.data.prepare import prepare
    from instructft.models.branches import why_not
    from instructft.models.load import load_model
    from instructft.models.starting_point import starting_point
    from instructft.models.tokenizer import load_tokenizer
    from instructft.training.arguments import training_arguments
    from instructft.training.build import build_trainer
    from instructft.training.out_of_memory import ran_out

    state = PartialState(cpu=bool(recipe.train.get("use_cpu")))
    tokenizer = load_tokenizer(recipe)
    origin = starting_point(recipe, tokenizer)
    data, tokens = _longest(recipe, prepare(recipe, tokenizer, lambda: why_not(recipe, origin.config)))
    args, _ = training_arguments(recipe, data, state)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    try:
        model = load_model(recipe, tokenizer, start=origin)
        console = Console(quiet=True)
        trainer = build_trainer(recipe, tokenizer, data, model, args, origin, RunStart({}), console)
        began = _times_of_steps(trainer, args.device)
        trainer.train()
    except (RuntimeError, MemoryError, OSError) as error:
        if not ran_out(error):
            raise
        return {"fits": False}
    seconds = (began[-1] - began[1]) / (len(began) - 2)
    return {"fits": True, "memory": peak(args.device), "seconds": seconds, "tokens": tokens}


def _longest(recipe: Recipe, data: Any) -> tuple[Any, int]:
    """The data with the batch of its longest rows for each step, and the tokens of one step."""
    import numpy as np
    from datasets import DatasetDict

    from instructft.data.arrow.token_rows import tokens_of

    train = recipe.train_resolved()
    rows, batches = train["per_device_train_batch_size"], train["gradient_accumulation_steps"]
    lengths = tokens_of(data.splits["train"]).lengths
    longest = np.resize(np.argsort(-lengths, kind="stable")[:rows], rows)  # again and again where there are fewer
    chosen = data.splits["train"].select(np.tile(longest, batches * STEPS))
    splits = DatasetDict({"train": chosen})
    return dataclasses.replace(data, splits=splits, groups={}), int(lengths[longest].sum()) * batches


def _times_of_steps(trainer: Any, device: torch.device) -> list[float]:
    """When each step began, and when the last one ended, filled in while the trainer trains."""
    import torch
    from transformers import TrainerCallback

    found: list[float] = []

    class Times(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                self.on_step_begin(args, state, control)

    trainer.add_callback(Times())
    return found


def peak(device: torch.device) -> int:
    """Bytes that this process has held at most: of the device, or of the machine where it trains on a CPU."""
    import torch

    from instructft.training.out_of_memory import peak_of_process

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
    return peak_of_process()


if __name__ == "__main__":
    from instructft.recipe.load import load_recipe
    from instructft.weights import remote_code

    words = [word for word in sys.argv[1:] if word != remote_code.FLAG]
    remote_code.allow(len(words) < len(sys.argv) - 1)
    print(json.dumps(take(load_recipe(words[0], words[1:]))))
