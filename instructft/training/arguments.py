"""The `train` section as `trl.SFTConfig`, with what depends on the machine decided or refused."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.data.arrow.workers import script_without_guard
from instructft.errors import UsageError
from instructft.formatting import memory_size
from instructft.models.load import weights_dtype
from instructft.models.starting_point import positions_of
from instructft.recipe.conflicts import accelerator_problem
from instructft.recipe.schema import freeze
from instructft.training.launch.context import batches_at_once, refuse_what_cannot_be_divided

if TYPE_CHECKING:
    from accelerate import PartialState
    from trl import SFTConfig

    from instructft.data.prepare import Prepared
    from instructft.data.streaming import Streamed
    from instructft.models.starting_point import StartingPoint
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
    if args.dataloader_num_workers and _run_anew(args):
        args.dataloader_num_workers, args.dataloader_persistent_workers = 0, False
        args.dataloader_prefetch_factor = args.dataloader_multiprocessing_context = None
    if tokens_per_step:
        per_micro_batch = data.tokens_per_row * args.per_device_train_batch_size * batches_at_once(state.num_processes)
        args.gradient_accumulation_steps = max(1, round(tokens_per_step / per_micro_batch))
    return args, precision


def _run_anew(args: SFTConfig) -> str:
    """The script that each process which loads rows would run once more, the training included; else ""."""
    method = args.dataloader_multiprocessing_context or multiprocessing.get_start_method(allow_none=True)
    method = method or multiprocessing.get_all_start_methods()[0]
    return "" if method == "fork" else script_without_guard()


# The learning rate of a recipe that names none. For an adapter about ten times that for all weights (Schulman et al.,
# "LoRA Without Regret", 2025). With Adam the best one falls with the width (Yang et al., 2022, arXiv:2203.03466), for
# both: what is usual for models of 1 to 8 billion parameters, and more for those that are narrower. Ten times less and
# ten times more are worse on SmolLM2-135M (benchmarks/REAL.md); without the width, ten times more was better for LoRA.
LORA_RATE, FULL_RATE, WIDE, MOST_RATE = 2e-4, 2e-5, 2048, 1e-3
TOO_HIGH, TOO_LOW = 20, 10  # times the usual rate, from where on a rate that somebody wrote is remarked upon


def usual_rate(recipe: Recipe, config: Any) -> tuple[float, str]:
    """The learning rate that a run takes unless its recipe names one, and why.

    Example::

        usual_rate(load_recipe("gpt2-dolly"), config)
        # (5.3e-05, 'the default for all weights of a model 768 wide: 2e-05 from a width of 2,048 on, more below')
    """
    return rate_for(recipe.adapter.type == "lora", getattr(config.get_text_config(), "hidden_size", None) or WIDE)


def rate_for(lora: bool, width: int) -> tuple[float, str]:
    """The same, for an adapter or for all weights of a model that is so wide.

    >>> rate_for(True, 4096)[0], rate_for(True, 576)[0], rate_for(False, 4096)[0], rate_for(False, 576)[0]
    (0.0002, 0.00071, 2e-05, 7.1e-05)
    """
    usual, what = (LORA_RATE, "LoRA on") if lora else (FULL_RATE, "all weights of")
    rate = min(MOST_RATE, usual * max(1.0, WIDE / width))
    return float(f"{rate:.1e}"), (
        f"the default for {what} a model {width:,} wide: {usual:.0e} from a width of {WIDE:,} on, more below"
    )


def follow_model(
    recipe: Recipe, config: Any, before: Mapping[str, Any] | None = None
) -> tuple[Recipe, list[tuple[str, str]]]:
    """A recipe with what it leaves to the model: tokens of a row, learning rate; and each with its reason, to be said.

    Args:
        config: of the model.
        before: what the checkpoint that the run resumes from was made of (`checkpoints.resume.identity`).
    """
    said: list[tuple[str, str]] = []
    update: dict[str, Any] = {}
    positions, length = positions_of(config), recipe.data.max_length
    if before and "max_length" not in recipe.data.model_fields_set:
        length = before.get("data.max_length", length)
    elif "max_length" not in recipe.data.model_fields_set and 0 < positions < length:
        said.append(("max_length", f"{positions:,} tokens a row: the model has no more positions (data.max_length)"))
        length = positions
    if length != recipe.data.max_length:
        update["data"] = recipe.data.model_copy(update={"max_length": length})
    if "learning_rate" not in recipe.train:
        rate, why = usual_rate(recipe, config)
        if before and "train.learning_rate" in before:
            rate, why = before["train.learning_rate"], "as it was when the run began"
        update["train"] = freeze({**recipe.train, "learning_rate": rate})
        said.append(("rate", f"{rate:g}, {why} (train.learning_rate)"))
    return recipe.model_copy(update=update), said


def remarks(recipe: Recipe, args: SFTConfig, config: Any, steps: int, processes: int = 0) -> list[str]:
    """What is odd about settings that can be carried out, in a line each.

    Args:
        steps: of the whole run.
        processes: that train together, where these are not the ones that are here.
    """
    found = []
    usual, _ = usual_rate(recipe, config)
    rate = args.learning_rate
    name = f"{'LoRA on' if recipe.adapter.type == 'lora' else 'all weights of'} a model this wide"
    if "adamw" in str(args.optim).lower() and "learning_rate" in recipe.train_written:
        if rate > TOO_HIGH * usual * 1.001:
            found.append(
                f"train.learning_rate: {rate:g} is {rate / usual:,.0f} times what is usual for {name} ({usual:g}); a "
                "run rarely survives that"
            )
        elif rate * TOO_LOW <= usual * 1.001:
            below = f"{usual / rate:,.0f} times below what is" if rate else "far from what is"
            found.append(f"train.learning_rate: {rate:g} is {below} usual for {name} ({usual:g}); little is learned")
    if recipe.model.dtype == "float16" and recipe.adapter.type == "none":
        found.append(
            "model.dtype: all weights are trained in float16 itself, in which small updates are lost and gradients "
            "overflow; write float32 (or auto) and train.fp16=true where the GPU has no bfloat16"
        )
    by_chance = "bf16_stochastic_round" in str(recipe.train.get("optim_args") or "")
    kept = by_chance or recipe.train["float32_copies"]
    if recipe.model.dtype == "bfloat16" and recipe.adapter.type == "none" and not kept:
        found.append(
            "model.dtype: all weights are trained in bfloat16 itself, which rounds most updates of a usual learning "
            "rate away; leave it out (train.bf16=true computes in bfloat16 and keeps weights in float32), keep copies "
            "in float32 (train.float32_copies=true), or have them rounded by chance: train.optim=adamw_torch_8bit "
            "train.optim_args=bf16_stochastic_round=true"
        )
    if recipe.train["float32_copies"] and (why := bfloat16_gradients(processes or args.world_size)):
        found.append(f"train.float32_copies: gradients are summed in bfloat16, as wide as the weights: {why}")
    asked = recipe.train.get("dataloader_num_workers", 0)
    if asked > args.dataloader_num_workers:
        found.append(
            f'train.dataloader_num_workers: {asked}, but {script_without_guard()} has no `if __name__ == "__main__":`, '
            "and each process that loads rows would run it anew; they are loaded in the training process. Put what "
            "the script does below such a line"
        )
    warmup = args.warmup_steps
    if warmup >= 1 and steps and warmup >= steps:
        found.append(
            f"train.warmup_steps: {warmup:g} steps of warm-up in a run of {steps:,}, whose learning rate never gets to "
            f"{rate:g}; a number below 1 is a share: train.warmup_steps=0.03"
        )
    return found


def bfloat16_gradients(processes: int) -> str:
    """Why gradients beside float32 copies are summed in bfloat16; "" where they are in float32.

    >>> bfloat16_gradients(2)
    'DDP averages them so over the processes'
    """
    from instructft.weights.float32_copies import CAN_SUM

    if processes > 1:
        return "DDP averages them so over the processes"
    return "" if CAN_SUM else "it takes torch 2.10 or later to have them wider"


def steps_of(args: SFTConfig, data: Prepared | Streamed) -> int:
    """Optimizer steps of the whole run."""
    from instructft.data.streaming import Streamed
    from instructft.models.memory import steps

    if isinstance(data, Streamed):
        return args.max_steps
    return int(steps(data, args, batches_at_once(args.world_size))["steps"])


ROUGH = 4  # times: a bound from the configuration alone is this far on the safe side


def decide_checkpointing(
    recipe: Recipe, start: StartingPoint, data: Prepared | Streamed, args: SFTConfig, before: Mapping[str, Any] | None
) -> tuple[Recipe, str]:
    """A recipe that leaves `train.gradient_checkpointing` open, with it where memory would not hold a step; and why.

    It costs about a third of the speed, so it is left out where there is room.
    """
    if recipe.train_written & {"gradient_checkpointing", "activation_checkpointing"} or recipe.train["fp8"]:
        return recipe, ""
    if before is not None:  # fixed for a run's life
        return with_checkpointing(recipe, bool(before.get("train.gradient_checkpointing"))), ""
    if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")):
        return recipe, ""  # weights are divided, which the estimate of one process does not know
    from instructft.data.streaming import Streamed

    there = memory_here(args)
    if not there or isinstance(data, Streamed) or _roughly(start.config, args, recipe) * ROUGH < there:
        return recipe, ""
    from instructft.models.memory import largest_batch, memory, resident

    batch = largest_batch(data, args.per_device_train_batch_size, args.pad_to_multiple_of or 1)
    accumulates, base = args.gradient_accumulation_steps > 1, resident()

    def needed(checkpointing: bool) -> int:
        asked = copy.copy(args)
        asked.gradient_checkpointing = checkpointing
        found = memory(recipe, start, batch, asked, args.device.type, accumulates, args.world_size, base)
        return int(found["memory"]["total"]) - (base if args.device.type == "cpu" else 0)

    whole = needed(False)
    if whole < SPARE * there or (less := needed(True)) >= whole:
        return recipe, ""
    return with_checkpointing(recipe, True), (
        f"on: without it a step is estimated at {memory_size(whole)} of the {memory_size(there)} that are free here, "
        f"with it at {memory_size(less)} (train.gradient_checkpointing)"
    )


SPARE = 0.9  # of the free memory that a step may be estimated at


def with_checkpointing(recipe: Recipe, checkpointing: bool) -> Recipe:
    """A recipe with `train.gradient_checkpointing` as it was decided."""
    return recipe.model_copy(update={"train": freeze({**recipe.train, "gradient_checkpointing": checkpointing})})


def memory_here(args: SFTConfig) -> int:
    """Bytes that are free for this process on the device where it trains; 0 where that is not known."""
    import psutil
    import torch

    if args.device.type == "cuda":
        return int(torch.cuda.mem_get_info(args.device)[0])
    return int(psutil.virtual_memory().available) // args.world_size if args.device.type == "cpu" else 0


def _roughly(config: Any, args: SFTConfig, recipe: Recipe) -> int:
    """Bytes of a step, from the configuration alone (Korthikanti et al., 2022, arXiv:2205.05198, in float32)."""
    text = config.get_text_config()

    def size(name: str) -> int:
        found = getattr(text, name, 0) or 0
        return max(found) if isinstance(found, list | tuple) else found  # one a layer, as Gemma 3n has

    width, layers, heads = size("hidden_size"), size("num_hidden_layers"), size("num_attention_heads")
    inner = max(size("intermediate_size"), 4 * width)
    tokens = args.per_device_train_batch_size * recipe.data.max_length
    activations = layers * tokens * 4 * (8 * width + 4 * inner + heads * recipe.data.max_length * 3)
    weights = layers * (4 * width * width + 3 * width * inner) + 2 * size("vocab_size") * width
    return int(activations + 16 * weights)


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
        copies = " with float32 copies" if recipe.train["float32_copies"] else ""
        return False, False, f"{recipe.model.dtype} weights{copies} without autocast, as the recipe says"
    if torch.cuda.is_available() and not recipe.train.get("use_cpu"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            weights = str(weights_dtype(recipe)).removeprefix("torch.")
            base = f"a frozen base in {weights}, adapter in float32" if frozen else "float32 weights"
            return True, False, f"bfloat16 autocast over {base}"
        return False, False, "float32 (this GPU has no bfloat16; train.fp16=true is faster, with a loss scale)"
    return False, False, recipe.model.dtype if recipe.model.dtype != "auto" else "float32"


COPIES_ARE_WHOLE = (
    "train.float32_copies: the processes share the weights among them (FSDP or DeepSpeed), which keep float32 weights "
    "of their own beside those that compute; take it out, and model.dtype: bfloat16 too, or launch with --strategy ddp"
)


def refuse_what_cannot_run(recipe: Recipe, state: PartialState) -> None:
    """What cannot be carried out in these processes is refused, never ignored."""
    refuse_what_cannot_be_divided(recipe, state.num_processes)
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
    file = recipe.train.get("accelerator_config")
    if isinstance(file, str) and Path(file).exists() and not Path(file).is_file():
        raise UsageError(f"train.accelerator_config: {file} is a folder, a device or a pipe, expected a JSON file")
    if isinstance(file, str) and Path(file).is_file():
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
    if recipe.train["float32_copies"] and (sharded or deepspeed):
        raise UsageError(COPIES_ARE_WHOLE)
    if recipe.train["save_in_background"] is True and (sharded or deepspeed or state.num_processes > 1):
        what = "DeepSpeed" if deepspeed else "FSDP" if sharded else f"{state.num_processes} processes"
        raise UsageError(
            f"train.save_in_background: true is for one process that holds all that is saved; found {what}. Write "
            "auto, which means false here"
        )
    if sharded and state.num_processes > 1 and state.distributed_type.value == "MULTI_CPU":
        raise UsageError(
            "the launcher asks for FSDP, and accelerate leaves it out on CPUs: every process would hold the whole "
            "model. Launch with distributed_type: MULTI_GPU in place of FSDP to train on CPUs"
        )
