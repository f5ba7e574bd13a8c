"""What `--rehearse` of `check` finds: the run's rehearsal on this machine, with its model and one short batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, cast

from instructft.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from instructft.data.prepare import Prepared
    from instructft.models.starting_point import StartingPoint
    from instructft.recipe.schema import Recipe


def rehearsal(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    start: StartingPoint,
    data: Prepared,
    say: Callable[[str], Any],
) -> dict[str, Any]:
    """Load the recipe's model and do before step 1 what `train` does there; no step is taken, and nothing is kept.

    Args:
        say: told in one line of each finding.

    Returns:
        what `run.json` says of a rehearsal, with `loading_seconds`.

    Raises:
        ModelError: the model cannot be trained, or its packs are not clean.
    """
    import time

    from accelerate import PartialState
    from rich.console import Console

    from instructft.checkpoints.resume import RunStart
    from instructft.models.attention import choose_attention, switch_attention
    from instructft.models.load import load_model
    from instructft.training.arguments import training_arguments
    from instructft.training.build import build_trainer
    from instructft.training.rehearsal.rehearse import rehearse
    from instructft.training.run import packs_apart

    if recipe.train["fp8"]:
        raise UsageError("--rehearse: a run with train.fp8 is rehearsed by train alone; leave one of them out")
    with tempfile.TemporaryDirectory(prefix="instructft-") as folder:
        # what only watches a run, or would write into its folder, is left out
        train = {**recipe.train, "report_to": []}
        tried = recipe.model_copy(update={"output_dir": folder, "train": train, "samples": ()})
        args, _ = training_arguments(tried, data, PartialState(cpu=bool(recipe.train.get("use_cpu"))))
        attention = choose_attention(tried, start.config, args)
        began = time.perf_counter()
        model = load_model(tried, tokenizer, start=start)
        loading = time.perf_counter() - began
        attention = switch_attention(model, attention)
        console = Console(file=cast("IO[str]", _Lines(say)), soft_wrap=True)
        trainer = build_trainer(tried, tokenizer, data, model, args, start, RunStart({}), console)
        if recipe.data.packing:
            packs_apart(trainer, attention, recipe.data.max_length, console)
        found = rehearse(trainer, data.example, say)
    return {**found.facts, "loading_seconds": round(loading, 3)}


class _Lines:
    """A file that hands on each line."""

    def __init__(self, say: Callable[[str], Any]):
        self.say = say

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self.say(line)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""
