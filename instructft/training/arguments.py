"""The `train` section as `trl.SFTConfig`, with what depends on the machine decided or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError
from instructft.models.load import weights_dtype
from instructft.recipe.conflicts import accelerator_problem
from instructft.recipe.schema import freeze

if TYPE_CHECKING:
    from accelerate import PartialState
    from trl import SFTConfig

    from instructft.data.prepare import Prepared
    from instructft.data.streaming import Streamed
    from instructft.recipe.schema import Recipe


def training_arguments(recipe: Recipe, data: Prepared | Streamed, state: PartialState) -> tuple[SFTConfig, str]:
    """The recipe's `train` section as `trl.SFTConfig`, with device and precision decided, and the latter in words."""
    from trl import SFTConfig

    fields = recipe.sft_kwargs()
    tokens_per_step = recipe.train.get("tokens_per_step")
    fields.pop("auto_find_batch_size", None)  # done in `batch_size`; upstream changes the rows of a step
    if state.num_processes == 1:
        fields.pop("ddp_backend", None)  # there is nobody to talk to, and torch would wait for a group of processes
    fields["bf16"], fields["fp16"], precision = decide_precision(recipe)
    # TensorBoard is attached in `run`, so that its files lie in the run folder under a plain name
    fields["report_to"] = [name for name in reporters(recipe) if name != "tensorboard"]
    if "validation" not in data.splits:
        fields["eval_strategy"] = "no"
    args = SFTConfig(
        output_dir=recipe.output_dir,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenized and masked already
        max_length=None,
        **fields,
    )
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter takes part in every step; looking costs time
    if args.n_gpu > 1:  # others are visible to one process: upstream would spread batches over them by `DataParallel`
        args._n_gpu = 1
    args.disable_tqdm = True  # `callbacks.ProgressLine` shows progress
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # there is no device to copy to, and torch would warn
    else:
        config = fields.get("accelerator_config") or {}
        if args.dataloader_pin_memory and not isinstance(config, str) and "non_blocking" not in config:
            args.accelerator_config.non_blocking = True  # a batch is copied while the step before it computes
    if tokens_per_step:
        per_micro_batch = data.tokens_per_row * args.per_device_train_batch_size * state.num_processes
        args.gradient_accumulation_steps = max(1, round(tokens_per_step / per_micro_batch))
    return args, precision


def as_decided(recipe: Recipe, packed: bool, per_pack: float) -> Recipe:
    """A recipe whose `data.packing` is auto as it was decided; a step holds as many tokens either way.

    `train.per_device_train_batch_size` is a number of packs where they are, and else of rows. These are shorter, and
    `train.gradient_accumulation_steps` makes up for it, unless `train.tokens_per_step` does.

    Args:
        per_pack: rows in a pack.
    """
    if recipe.data.packing != "auto":
        return recipe
    update: dict[str, Any] = {"data": recipe.data.model_copy(update={"packing": packed})}
    if not packed and not recipe.train.get("tokens_per_step"):
        steps = (recipe.train.get("gradient_accumulation_steps") or 1) * max(1, round(per_pack))
        update["train"] = freeze({**recipe.train, "gradient_accumulation_steps": steps})
    return recipe.model_copy(update=update)


def reporters(recipe: Recipe) -> list[str]:
    """The trackers that the recipe names.

    >>> reporters(load_recipe("quickstart"))
    ['tensorboard']
    """
    named = recipe.train.get("report_to") or []
    return [named] if isinstance(named, str) else list(named)


def decide_precision(recipe: Recipe) -> tuple[bool, bool, str]:
    """(bf16, fp16, why): bfloat16 autocast only where the hardware has it, unless the recipe says otherwise."""
    import torch

    if recipe.train.get("bf16") is not None or recipe.train.get("fp16"):
        bf16, fp16 = bool(recipe.train.get("bf16")), bool(recipe.train.get("fp16"))
        name = "bfloat16" if bf16 else "float16" if fp16 else "float32"
        return bf16, fp16, f"{name}, as the recipe says"
    frozen = recipe.adapter.type != "none"  # an adapter is float32 itself, and needs autocast to compute as its base
    if recipe.model.dtype in ("bfloat16", "float16") and not frozen:
        return False, False, f"{recipe.model.dtype} weights without autocast, as the recipe says"
    if torch.cuda.is_available() and not recipe.train.get("use_cpu"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            weights = str(weights_dtype(recipe)).removeprefix("torch.")
            base = f"a frozen base in {weights}, adapter in float32" if frozen else "float32 weights"
            return True, False, f"bfloat16 autocast over {base}"
        return False, False, "float32 (this GPU has no bfloat16; train.fp16=true is faster, with a loss scale)"
    return False, False, recipe.model.dtype if recipe.model.dtype != "auto" else "float32"


def refuse_what_cannot_run(recipe: Recipe, state: PartialState) -> None:
    """What cannot be carried out in these processes is refused, never ignored."""
    if recipe.train.get("auto_find_batch_size") and state.num_processes > 1:
        raise UsageError(
            f"train.auto_find_batch_size: found {state.num_processes} processes, and memory that runs out in one of "
            "them leaves the others waiting; set train.per_device_train_batch_size, or use one process"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and state.num_processes == 1:
        raise UsageError(
            f"a launcher started {os.environ['WORLD_SIZE']} processes, and accelerate counts one in each: all would "
            "write into one run folder. Without a GPU write train.use_cpu=true, and launch with instructft launch"
        )
    if isinstance(file := recipe.train.get("accelerator_config"), str) and Path(file).is_file():
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        if found := accelerator_problem(config):
            raise UsageError(f"train.accelerator_config: {file}: {found[0]}: {found[1]}")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed and recipe.train["on_loss_spike"] == "skip":
        raise UsageError(
            "train.on_loss_spike: skip has no effect under DeepSpeed, which takes each step by itself; write warn, or "
            "divide the model with --strategy fsdp2"
        )
    if (compiler := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise UsageError(
            f"accelerate's configuration says dynamo_backend: {compiler.upper()}, which compiles the whole model anew "
            "for every number of supervised tokens; take it out, and write train.torch_compile=true, which compiles "
            "each block once"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise UsageError(
            "accelerate's configuration says mixed_precision: fp8, which converts no layer of a GPT-2 and does not say "
            "so; write mixed_precision: 'no' there, and train.fp8=true in the recipe"
        )
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if recipe.train["fp8"] and (sharded or deepspeed):
        raise UsageError(
            "train.fp8: the processes share the weights among them (FSDP or DeepSpeed), with which it has not been "
            "tried; launch with --strategy ddp, or take it out"
        )
    if sharded and state.num_processes > 1 and state.distributed_type.value == "MULTI_CPU":
        raise UsageError(
            "the launcher asks for FSDP, and accelerate leaves it out on CPUs: every process would hold the whole "
            "model. Launch with distributed_type: MULTI_GPU in place of FSDP to train on CPUs"
        )
