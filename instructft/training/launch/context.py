"""Rows divided among processes (context parallelism): how many share a row, and what a recipe has against it.

A row of 128 thousand tokens leaves activations that no GPU holds. With `launch --strategy fsdp2 --context-parallel 4`
four processes share each row, and each computes a quarter of its tokens::

    row          t0 t1 | t2 t3 | t4 t5 | … | t14 t15 | .      2 × 4 pieces of one length, padded on the right
    process 0    t0 t1                 and     t14 t15        the first and the last: under a causal mask a late token
    process 1          t2 t3   and   t12 t13                  sees more than an early one, and so all have equal work

Attention alone looks at other tokens. There torch's ring hands keys and values round (`context_parallel`, a prototype
of torch 2.13; https://arxiv.org/abs/2310.01889), and it knows one mask: causal. accelerate's `ParallelismConfig` says
who shares a row with whom, and divides the weights among all processes (FSDP2).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from instructft.recipe.schema import Recipe

OPTION = "--context-parallel"


def context_size(environment: Mapping[str, str] | None = None) -> int:
    """How many processes share a row, as the launcher says it to each of them; 1 where none do.

    >>> context_size({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "4"})
    4
    """
    there = os.environ if environment is None else environment
    if there.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return 1
    return int(there.get("PARALLELISM_CONFIG_CP_SIZE", "1"))


def batches_at_once(processes: int) -> int:
    """How many micro-batches so many processes train at once: those that share its rows train one together."""
    return max(1, processes // context_size())


def options(size: int, processes: int) -> list[str]:
    """The options of `accelerate launch` beside a config file of FSDP2.

    >>> options(4, 8)
    ['--parallelism_config_cp_size', '4', '--parallelism_config_dp_shard_size', '2']
    """
    return ["--parallelism_config_cp_size", str(size), "--parallelism_config_dp_shard_size", str(processes // size)]


def asked_problems(size: int, processes: int, strategy: str) -> Iterator[str]:
    """What is wrong with what was asked for on the command line."""
    if size < 1:
        yield f"{OPTION}: found {size}, expected a whole number from 1: the processes that share a row"
        return
    if size > 1 and strategy != "fsdp2":
        yield f"{OPTION} {size}: found --strategy {strategy}, expected fsdp2: accelerate divides rows with it alone"
    if size > 1 and processes % size:
        yield (
            f"{OPTION} {size}: found {processes} process{'' if processes == 1 else 'es'} in all, expected a multiple "
            f"of {size}: every row is shared by {size}"
        )


def recipe_problems(recipe: Recipe) -> Iterator[str]:
    """What a recipe asks for that rows cannot have which processes share; each with its key and the way out."""
    train, attention = recipe.train, recipe.model.attn_implementation
    if recipe.data.packing:
        found = str(recipe.data.packing).lower()
        yield (
            f"data.packing: found {found}, expected false: torch's ring knows no mask but the causal one, and the "
            "documents of a pack would see each other"
        )
    if recipe.data.fold_turns is True:
        yield "data.fold_turns: found true, expected auto or false: turns that are folded take a mask of their own"
    if attention not in ("auto", "sdpa"):
        yield f"model.attn_implementation: found {attention}, expected auto or sdpa: torch's ring is made for it alone"
    if any(entry.streaming for entry in recipe.data.datasets):
        yield (
            "data.datasets: found a set with streaming: true, whose batches accelerate deals out process by process; "
            "take it out: then processes that share a row get the same"
        )
    if (kind := train.get("loss_type") or "nll") != "nll":
        yield f"train.loss_type: found {kind}, expected nll: other losses are upstream's, of each process alone"
    if train.get("label_smoothing_factor"):
        yield "train.label_smoothing_factor: such a loss is upstream's, of each process alone; take it out"
    if train.get("torch_compile") is True:
        yield "train.torch_compile: found true, expected auto or false: the ring is handed in while the model computes"
    if train.get("auto_find_batch_size"):
        yield "train.auto_find_batch_size: works in one process alone; set train.per_device_train_batch_size"
    config = train.get("accelerator_config")
    if isinstance(config, str) and Path(config).is_file():
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    if isinstance(config, Mapping):
        for name in ("dispatch_batches", "split_batches"):
            if config.get(name):
                yield (
                    f"train.accelerator_config.{name}: true deals a batch out to all processes, and those that share a "
                    "row would get others; take it out"
                )


def model_problems(config: PretrainedConfig, recipe: Recipe) -> Iterator[str]:
    """What an architecture has that the ring has not, told from its configuration before any weight is loaded."""
    text = config.get_text_config()
    if why := _no_sdpa(config):
        yield f"model.name_or_path: torch's ring is made for attention sdpa, and {config.model_type} has none ({why})"
    types = getattr(text, "layer_types", None)
    windows = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    others = set(types) - {"full_attention"} if types else {"sliding_attention"} if windows else set()
    if others:
        yield (
            f"model.name_or_path: {config.model_type} has layers of type {', '.join(sorted(others))}, and torch's ring "
            "knows full causal attention alone"
        )
    if text is not config:
        yield f"model.name_or_path: {config.model_type} has more than a text model, with which this has not been tried"
    if hasattr(text, "output_router_logits") and recipe.train.get("router_aux_loss_coef") != 0.0:
        yield (
            f"train.router_aux_loss_coef: the router of {config.model_type} is trained by a loss over whole rows, and "
            "each process has a part of them; write 0.0, or leave rows whole"
        )


def _no_sdpa(config: PretrainedConfig) -> str:
    """Why a model of this configuration has no attention by sdpa, asked of shapes alone; "" where it has."""
    import copy

    import torch

    from instructft.formatting import first_line
    from instructft.weights import remote_code
    from instructft.weights.model_class import auto_class

    try:
        with torch.device("meta"):
            auto_class(config).from_config(copy.deepcopy(config), attn_implementation="sdpa", **remote_code.flag())
    except (ImportError, ValueError) as error:
        return first_line(error)
    return ""


def refuse(problems: Iterator[str] | list[str]) -> None:
    """Say all of them at once.

    Raises:
        UsageError: there are some.
    """
    found = list(problems)
    if len(found) == 1:
        raise UsageError(f"{OPTION}: rows cannot be divided among processes. {found[0]}")
    if found:
        lines = "\n".join(f"  {problem}" for problem in found)
        raise UsageError(f"{OPTION}: rows cannot be divided among processes, {len(found)} problems:\n{lines}")


def refuse_what_cannot_be_divided(recipe: Recipe, processes: int) -> None:
    """What the launcher and a recipe ask for together, looked at in each process before data and weights.

    Raises:
        UsageError: every problem, each with its key and the way out.
    """
    size = context_size()
    if size == 1:
        return
    strategy = "ddp"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        strategy = f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    problems: list[Any] = [*asked_problems(size, processes, strategy), *recipe_problems(recipe)]
    refuse(problems)
