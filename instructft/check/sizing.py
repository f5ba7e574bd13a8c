"""How long the rows of a first recipe are, how large its steps, and what of a model's memory is computed anew.

Every number follows from something that is counted here: rows and tokens from the file, memory from the estimate that
`check` makes. What no count decides (learning rate, epochs) is a convention, and is called one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from instructft.formatting import memory_size, quantiles
from instructft.recipe.commented import Draft
from instructft.training.arguments import WIDE, rate_for

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from instructft.data.prepare import Prepared
    from instructft.models.starting_point import StartingPoint

Say = Callable[[str], Any]

SPARE = 0.85  # share of the free memory that the estimate may take: it is one
_MOST_ROWS = 32  # in a batch: beyond it the speed rarely rises
_NO_POSITIONS = 1 << 16  # tokens; a model without positions, such as Mamba, takes rows of any length
_UNASKED = 2048  # tokens; rows up to this length are taken whole, longer ones where they are no exception
_SAMPLES = 2  # prompts whose answers are shown as training goes on


def sized(draft: Draft, goal: str, name: str, say: Say = print) -> None:
    """Put into a recipe that names model and rows all numbers that follow from them and from this machine.

    Raises:
        UsageError: the model or all of the rows cannot be read, or this machine cannot do it.
    """
    from instructft.adapters import quantization
    from instructft.models.starting_point import starting_point
    from instructft.models.tokenizer import load_tokenizer
    from instructft.prompt.templates import is_built_in

    draft.put("data.max_length", 2)  # until it is known
    recipe = draft.recipe(name)
    quantization.check(recipe)
    tokenizer = load_tokenizer(recipe)
    start = starting_point(recipe, tokenizer)
    none = is_built_in(str(tokenizer.chat_template))
    why = "the model has no template of its own, so `instruction`: plain headings" if none else "the model's own"
    draft.reasons["data.template"] = why
    say(f"{'template':10} {why}")
    lengths = _lengths(draft, name, tokenizer, start, say)
    data = _rows(draft, name, tokenizer, len(lengths), say)
    _steps(draft, goal, name, data, start, say)


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def _lengths(draft: Draft, name: str, tokenizer: PreTrainedTokenizerBase, start: StartingPoint, say: Say) -> np.ndarray:
    """Tokens of every row, and the `max_length` that takes them in."""
    import numpy as np

    from instructft.data.arrow.token_rows import tokens_of
    from instructft.data.prepare import prepare

    positions = getattr(start.config.get_text_config(), "max_position_embeddings", None) or _NO_POSITIONS
    whole = prepare(draft.recipe(name, f"data.max_length={positions}", "data.splits.validation=0"), tokenizer)
    lengths = np.concatenate([tokens_of(split).lengths for split in whole.splits.values()])
    found = quantiles(lengths)
    most, common = found["max"], found["p99"]
    take = most if most <= max(_UNASKED, 2 * common) else common
    length = min(math.ceil(take / 64) * 64, positions)
    cut = whole.cut if length == positions else int((lengths > length).sum())  # those were cut already
    told = ", ".join(f"{what} {count:,}" for what, count in found.items())
    lost = f"{cut:,} rows ({cut / len(lengths):.1%}) are cut" if cut else "no row is cut"
    draft.put("data.max_length", length, f"tokens per row. {told} of {len(lengths):,} rows; {lost}")
    say(f"{'rows':10} {len(lengths):,}, {int(lengths.sum()):,} tokens; {told}")
    say(f"{'max_length':10} {length:,} of the model's {positions:,}: {lost}")
    return lengths


def _rows(draft: Draft, name: str, tokenizer: PreTrainedTokenizerBase, count: int, say: Say) -> Prepared:
    """What is held out, what is packed; and the rows so."""
    from instructft.data.prepare import prepare

    draft.put("data.packing", "auto")
    if "validation" not in draft.values["data"]:
        share = 0.05 if count >= 1000 else 0.1 if count >= 50 else 0.2
        why = f"about {round(count * share):,} of {count:,} rows: loss and answers are judged on them, never trained"
        draft.put("data.splits", {"validation": share, "test": 0.0})
        draft.reasons["data.splits"] = why
        say(f"{'held out':10} {share:.0%}, {why}")
    data = prepare(draft.recipe(name), tokenizer)
    for what, how_much in data.account(draft.values["data"]["max_length"]):
        if what not in ("cut", "packed"):  # told with their keys
            say(f"{what:10} {how_much}")
    if data.packed:
        why = f"{data.per_pack:.1f} rows in a pack save {data.saved or 0:.0%} of the slots; where they are proved apart"
    else:
        why = data.why_loose()
    draft.reasons["data.packing"] = why
    say(f"{'packing':10} {'yes, ' if data.packed else ''}{why}")
    return data


# --------------------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------------------


def _steps(draft: Draft, goal: str, name: str, data: Prepared, start: StartingPoint, say: Say) -> None:
    """Batch, accumulation and checkpointing by the memory there is; rate, epochs and the rest by convention."""
    rows = data.rows["train"]
    what, per_row = ("packs", data.per_pack) if data.packed else ("rows", 1.0)
    wanted = rows_per_step(rows)
    step = max(1, 2 ** round(math.log2(wanted / per_row)))  # rows or packs
    batch, checkpointing, needs, free = _fitting(draft, name, data, start, step)
    accumulation = max(1, step // batch)
    device = "GPU" if needs["device"] == "cuda" else "machine"
    share = f"{memory_size(needs['memory']['total'])} estimated, of {memory_size(free)} that this {device} has free"
    per_epoch = needs["schedule"]["steps_per_epoch"]
    epochs = epochs_of(rows, per_epoch)
    draft.put("train.num_train_epochs", epochs, f"{per_epoch * epochs:,} steps; a convention, by the number of rows")
    draft.put("train.per_device_train_batch_size", batch, f"{what}: {share}")
    in_all = f"{batch} x {accumulation} = {batch * accumulation} {what} a step, {per_epoch} steps an epoch"
    draft.put("train.gradient_accumulation_steps", accumulation, in_all)
    why = "layers are computed twice: without it, the estimate does not fit" if checkpointing else "it fits without"
    draft.put("train.gradient_checkpointing", checkpointing, why)
    rate, why = rate_for(goal != "full", getattr(start.config.get_text_config(), "hidden_size", None) or WIDE)
    draft.put("train.learning_rate", rate, why)
    draft.put("train.lr_scheduler_type", "cosine", "a convention")
    draft.put("train.warmup_steps", 0.05, "share of all steps, a convention")
    draft.put("train.logging_steps", max(1, min(10, per_epoch * epochs // 20)), "steps")
    if samples := _prompts(draft, name):
        draft.put("samples", samples, "rows of yours, answered as training goes on")
    say(f"{'step':10} {in_all}; {epochs} epochs")
    say(f"{'memory':10} {share}{', with checkpointing' if checkpointing else ''}")
    say(f"{'rate':10} {rate:g}: {why}")
    if needs["memory"]["total"] > SPARE * free:
        other = {"full": "--goal lora trains with less; ", "lora": "--goal qlora holds the base in 4 bits; "}
        say(f"{'careful':10} this does not fit here, by the estimate: {other.get(goal, '')}a smaller model, or a GPU")


def rows_per_step(rows: int) -> int:
    """Conversations in a step: so that an epoch has some thirty steps, and at most 64 of them.

    >>> [rows_per_step(n) for n in (20, 300, 1000, 100_000)]
    [4, 8, 32, 64]
    """
    return int(min(64, max(4, 2 ** round(math.log2(max(rows, 1) / 32)))))


def epochs_of(rows: int, steps: int) -> int:
    """Passes over the rows: few rows are seen more often, since a run needs steps.

    >>> epochs_of(300, 38), epochs_of(60, 8), epochs_of(20_000, 313), epochs_of(500_000, 7813)
    (3, 5, 2, 1)
    """
    if rows >= 50_000:
        return 1
    return 2 if rows >= 10_000 else 3 if steps >= 20 else 5


def _fitting(
    draft: Draft, name: str, data: Prepared, start: StartingPoint, step: int
) -> tuple[int, bool, dict[str, Any], float]:
    """The largest batch of at most a step that fits by the estimate, whether layers are computed twice, and the needs.

    Computing twice costs a third of the time, more than a small batch does: it is taken where no batch of a few fits.
    """
    from instructft.adapters import quantization
    from instructft.models.memory import estimate, resident
    from instructft.training.arguments import as_decided, training_arguments

    base = resident()
    free = free_memory()

    @functools.cache
    def needs(batch: int, checkpointing: bool) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": max(1, step // batch),
        }
        keys["gradient_checkpointing"] = str(checkpointing).lower()
        recipe = as_decided(
            draft.recipe(name, *(f"train.{k}={v}" for k, v in keys.items())), data.packed, data.per_pack
        )
        args, _ = training_arguments(recipe, data, SimpleNamespace(num_processes=1))
        device = quantization.device(recipe).partition(":")[0]
        return estimate(recipe, start, data, args, device="cuda" if device == "cuda" else "cpu", base=base)

    sizes = [2**k for k in range(int(math.log2(min(step, _MOST_ROWS))), -1, -1)]
    few = min(4, sizes[0])
    for checkpointing, least in ((False, few), (True, 1)):
        for batch in (size for size in sizes if size >= least):
            if needs(batch, checkpointing)["memory"]["total"] <= SPARE * free:
                return batch, checkpointing, needs(batch, checkpointing), free
    return 1, True, needs(1, True), free


def free_memory() -> float:
    """Bytes that are free where a run would train: on the GPU, else in the machine."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return float(psutil.virtual_memory().available)


def _prompts(draft: Draft, name: str) -> list[str]:
    """Short questions among the rows, to be read as training goes on."""
    from instructft.data.load import conversations

    found: list[str] = []
    for row in conversations(draft.recipe(name), "validation" if _holds_out(draft) else "train", limit=50):
        asked = [m for m in row["messages"] if m["role"] != "system"]
        text = str(asked[0]["content"]).strip() if len(asked) == 2 and asked[0]["role"] == "user" else ""
        if (
            10 <= len(text) <= 100
            and "\n" not in text
            and text not in found
            and not {"input", "context"} & set(asked[0])
        ):
            found.append(text)
    return found[:_SAMPLES]


def _holds_out(draft: Draft) -> bool:
    data = draft.values["data"]
    return bool(data.get("validation") or data.get("splits", {}).get("validation"))
