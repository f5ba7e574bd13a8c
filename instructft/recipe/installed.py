"""What a recipe asks of the libraries and the machine that are here, tried on one weight before anything is loaded.

Optimizers, schedules and trackers have conditions of their own: a package, an argument, a kind of GPU. Each is made
here as the trainer will make it, so that what it says after minutes of loading is said at once.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import RecipeError, UsageError
from instructft.formatting import first_line, nearest
from instructft.recipe.fields import show

if TYPE_CHECKING:
    from trl import SFTConfig

    from instructft.recipe.schema import Recipe

# How libraries fail that were asked for something they cannot do. An error of another kind is a bug of theirs or ours.
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError, RuntimeError, OSError)


def check_against_installed(recipe: Recipe, device: str | None = None) -> None:
    """Refuse what the installed libraries, or with `device` this machine, cannot do. Imports torch.

    Args:
        device: where training will take place on this machine; None where it takes place on another one, of which
            only the recipe's own mistakes can be told.

    Raises:
        RecipeError: for each field that the installed version of trl does not know.
        UsageError: all settings that cannot be carried out, a line each.
    """
    import dataclasses

    import trl

    known = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    unknown = sorted(set(recipe.sft_kwargs()) - known)
    if unknown:
        say = f"trl {trl.__version__}, which is installed, has no such field; take it out, or install another trl"
        raise RecipeError(recipe.source or recipe.name, [f"train.{name}: {say}" for name in unknown])
    problems = [*_schedule(recipe), *_optimizer_arguments(recipe)]
    if device is not None:
        problems += dict.fromkeys((*missing_packages(recipe), *_trackers(recipe)))
        problems += precision_and_kernels(recipe, device)
        problems += _settings(recipe, device, problems)
    if problems:
        raise UsageError("\n".join(problems))


def _schedule(recipe: Recipe) -> Iterator[str]:
    """What the learning-rate schedule lacks, does not know, or refuses."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    name = recipe.train.get("lr_scheduler_type", "linear")
    given = recipe.sft_kwargs().get("lr_scheduler_kwargs") or {}
    if isinstance(given, str):  # transformers takes JSON too
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if not isinstance(given, dict):
        yield f"train.lr_scheduler_kwargs: found {show(given)}, expected a mapping such as {{min_lr_rate: 0.1}}"
        return
    function = TYPE_TO_SCHEDULER_FUNCTION.get(SchedulerType(name))
    if function is None:
        return
    set_by_run = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")
    takes = {key: p for key, p in inspect.signature(function).parameters.items() if key not in set_by_run}
    listed = f"it takes {', '.join(takes)}" if takes else "it takes none"
    for key in given:
        if key not in takes:
            yield f"train.lr_scheduler_kwargs: {name} has no argument {key}; {listed}"
            return
    lacks = [key for key, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for key in lacks:
        if key not in given:
            example = f"train.lr_scheduler_kwargs={{{key}: {100 if key.endswith('steps') else 0.1}}}"
            yield f"train.lr_scheduler_type: {name} needs {key}, such as {example}; {listed}"
            return
    try:
        schedule = _make_schedule(recipe, given)
        for _ in range(12):  # past its warmup: some look at their arguments only then
            schedule.optimizer.step()
            schedule.step(*([1.0] if "metrics" in inspect.signature(schedule.step).parameters else []))
    except _REFUSALS as error:
        way_out = f"; {listed}" if takes else ""
        yield f"train.lr_scheduler_type: {name} cannot be made: {first_line(error)}{way_out}"


def _make_schedule(recipe: Recipe, given: dict[str, Any]) -> Any:
    import torch
    from transformers import get_scheduler

    rate = float(recipe.train.get("learning_rate", 2e-5))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    return get_scheduler(
        recipe.train.get("lr_scheduler_type", "linear"), optimizer, 2, 1000, scheduler_specific_kwargs=given
    )


def _optimizer_arguments(recipe: Recipe) -> Iterator[str]:
    text = recipe.train.get("optim_args")
    if text and any(part.count("=") != 1 for part in text.replace(" ", "").split(",")):
        yield (
            f"train.optim_args: found {show(text)}, expected NAME=NUMBER and commas between, such as eps=1e-8,rho=0.1 "
            "(betas are train.adam_beta1 and train.adam_beta2)"
        )


def surely_on_the_cpu(recipe: Recipe) -> bool:
    """Whether a run here is on the CPU, as far as that can be told without torch; False where it cannot."""
    if recipe.train.get("use_cpu"):
        return True
    devices = Path("/dev")
    return sys.platform == "linux" and not any(any(devices.glob(name)) for name in _GPUS)


def precision_and_kernels(recipe: Recipe, device: str) -> Iterator[str]:
    """What this GPU, or a CPU, does not have."""
    if recipe.train["fp8"]:
        yield from _fp8(device)
    if device != "cpu":
        return
    here = "this run is on the CPU" + (" (train.use_cpu)" if recipe.train.get("use_cpu") else "")
    if recipe.train.get("fp16"):
        yield (
            f"train.fp16: {here}, where float16 would be left out without a word; take it out, or write train.bf16=true"
        )
    if recipe.train.get("tf32"):
        yield f"train.tf32: {here}, and tf32 is a way of NVIDIA's GPUs to multiply; take it out"
    if recipe.train.get("activation_offloading"):
        yield f"train.activation_offloading: {here}, and there is no GPU to offload from; take it out"
    if recipe.train.get("use_liger_kernel") and _is_installed("liger_kernel"):
        yield f"train.use_liger_kernel: {here}, and these kernels are for GPUs; take it out"


def _fp8(device: str) -> Iterator[str]:
    """Why no products can be made in 8-bit floats here; a CPU emulates them."""
    if device == "cuda":
        import torch

        if (found := torch.cuda.get_device_capability()) < (8, 9):
            card = f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}"
            yield f"train.fp8: {card}, and 8-bit floats need 8.9 or more (H100, H200, B200, L40S, RTX 40); take it out"
    elif device != "cpu":
        yield f"train.fp8: {device} has no products of 8-bit floats; take it out"


# How GPUs show themselves under /dev: NVIDIA's, also in a Jetson and under WSL, AMD's, and whatever draws.
_GPUS = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd", "dri")

# Tracker in `train.report_to` -> the module by which transformers knows that it is there, and what pip is to install.
_TRACKERS = {
    "azure_ml": ("azureml", "azureml-mlflow"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "'instructft[trackio]'"),
    "wandb": ("wandb", "'instructft[wandb]'"),
}
# transformers takes the kernel from the Hub where `kernels` is installed
_FLASH = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}


def missing_packages(recipe: Recipe) -> Iterator[str]:
    """What the recipe's keys need and is not installed; no package is imported for it."""
    for name in _named(recipe):  # TensorBoard is attached by the run itself
        if name in _TRACKERS and not _is_installed(_TRACKERS[name][0]):
            yield _no_tracker(name)
    attention, quantization = recipe.model.attn_implementation, recipe.model.quantization
    if quantization != "none" and not _is_installed("bitsandbytes"):
        yield (
            f"model.quantization: {quantization} needs bitsandbytes, which is not installed. Install it with "
            "pip install 'instructft[quant]', or train without: model.quantization=none"
        )
    if (flash := _FLASH.get(attention)) and not _is_installed(flash) and not _is_installed("kernels"):
        yield (
            f"model.attn_implementation: {attention} cannot be used here: {flash} is not installed; or write "
            "model.attn_implementation=auto, which takes what is here"
        )
    if recipe.train["fp8"] and not _is_installed("torchao"):
        yield "train.fp8: torchao is not installed; pip install 'instructft[fp8]', or take it out"
    if recipe.train.get("use_liger_kernel") and not _is_installed("liger_kernel"):
        yield "train.use_liger_kernel: liger_kernel is not installed; pip install 'instructft[liger]', or take it out"


def _named(recipe: Recipe) -> list[str]:
    named = recipe.train.get("report_to") or []
    return [named] if isinstance(named, str) else list(named)


def _no_tracker(name: str) -> str:
    return f"train.report_to: {name} is not installed; pip install {_TRACKERS[name][1]}, or take it out"


def _trackers(recipe: Recipe) -> Iterator[str]:
    """Trackers that transformers would not use: broken, switched off, or out of their place."""
    from transformers import integrations

    parts = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}  # named otherwise there
    for name in _named(recipe):
        available = getattr(integrations, f"is_{parts.get(name, name)}_available", None)
        if name == "kubeflow" and available is not None and not available():
            yield (
                "train.report_to: kubeflow works in a Kubeflow TrainJob alone, and KUBEFLOW_TRAINER_SERVER_URL is not "
                "set; take it out"
            )
        elif name in _TRACKERS and available is not None and not available():
            yield _no_tracker(name)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # half of it, or a stand-in without a specification
        return False


def _settings(recipe: Recipe, device: str, known: list[str]) -> Iterator[str]:
    """What `trl.SFTConfig` refuses of the values of a recipe, and its optimizer of one weight."""
    about_known = {problem.partition(":")[0].removeprefix("train.") for problem in known}
    on_cpu = ("fp16", "tf32", "activation_offloading", "use_liger_kernel") if device == "cpu" else ()
    fields = {key: value for key, value in recipe.sft_kwargs().items() if key not in {*about_known, *on_cpu}}
    for key in ("report_to", "ddp_backend", "auto_find_batch_size"):
        fields.pop(key, None)
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if isinstance(fields.get(key), str) and not fields[key].startswith("{"):
            yield f"train.{key}: found {show(fields.pop(key))}, expected a mapping such as {{use_reentrant: false}}"
        yield from _of_checkpointing(key, fields.get(key))
    try:
        args = _make_settings(fields)
    except _REFUSALS as error:
        yield _of_which(fields, recipe, error)
        return
    yield from _compiler(recipe)
    if "optim_args" not in about_known:
        try:
            _make_optimizer(args, device)
        except _REFUSALS as error:
            say = first_line(error).rstrip(".")
            yield f"train.optim: {args.optim.value} cannot be used here: {say}; or write train.optim=adamw_torch"
        else:
            for name in _passed_over(args):
                say = f"{name} changes nothing in {args.optim.value}, which takes no such argument; take it out"
                yield f"train.optim_args: {say}"


def _of_checkpointing(key: str, given: Any) -> Iterator[str]:
    """Names that PyTorch's checkpointing does not know, which the first step would fail on."""
    from torch.utils.checkpoint import checkpoint

    if isinstance(given, str):  # transformers takes JSON too
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    known = sorted(
        set(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"} | {"preserve_rng_state"}
    )
    for name in given if isinstance(given, dict) else ():
        if name not in known:
            yield f"train.{key}: {name} is no argument of it{nearest(name, known)}; it takes {', '.join(known)}"


def _make_settings(fields: dict[str, Any]) -> SFTConfig:
    from transformers.utils import logging
    from trl import SFTConfig

    before, verbosity = dict(os.environ), logging.get_verbosity()
    logging.set_verbosity_error()  # the settings of the run will say the same
    try:
        with tempfile.TemporaryDirectory() as folder:
            return SFTConfig(**{"bf16": False, **fields, "output_dir": folder, "report_to": [], "max_length": None})
    finally:  # settings for accelerate, which those of the run will make anew
        os.environ.clear()
        os.environ.update(before)
        logging.set_verbosity(verbosity)


def _compiler(recipe: Recipe) -> Iterator[str]:
    """A backend or a mode that torch.compile does not know."""
    import torch
    from accelerate.utils import DynamoBackend

    backend, mode = recipe.train["torch_compile_backend"], recipe.train["torch_compile_mode"]
    known = [one.value.lower() for one in DynamoBackend if one.value != "NO"]
    if backend is not None and backend not in known:
        yield (
            f"train.torch_compile_backend: found {show(backend)}, expected one of {', '.join(known)}"
            f"{nearest(backend, known)}"
        )
        return
    if (backend, mode) == (None, None):
        return
    try:
        torch.compile(torch.nn.Identity(), backend=backend or "inductor", mode=mode)
    except _REFUSALS as error:
        key = "torch_compile_mode" if mode else "torch_compile_backend"
        yield f"train.{key}: found {show(recipe.train[key])}, which cannot be used here: {first_line(error)}"


def _of_which(fields: dict[str, Any], recipe: Recipe, error: Exception) -> str:
    """The key without which the settings can be made; an error rarely names it."""
    for key in sorted(fields, key=lambda key: (key not in recipe.train_written, key)):
        try:
            _make_settings({name: value for name, value in fields.items() if name != key})
        except _REFUSALS:
            continue
        return f"train.{key}: found {show(fields[key])}, which cannot be used here: {first_line(error)}"
    return f"train: {first_line(error)}"


def _passed_over(args: SFTConfig) -> list[str]:
    """Names in `optim_args` that transformers passes over in silence: with any value, the optimizer is the same."""
    import torch
    from transformers import Trainer

    asked, layer = copy.copy(args), torch.nn.Sequential(torch.nn.Linear(4, 4))

    def made(text: str | None) -> str:
        asked.optim_args = text
        try:
            return repr(Trainer.get_optimizer_cls_and_kwargs(asked, layer))
        except _REFUSALS as error:  # it was read
            return repr(error)

    names = [part.partition("=")[0] for part in str(args.optim_args or "").replace(" ", "").split(",") if part]
    return [name for name in names if made(None) == made(f"{name}=?") == made(f"{name}=true")]


def _make_optimizer(args: SFTConfig, device: str) -> None:
    """Make the optimizer for one small layer, and on a CPU take a step with it."""
    import torch
    from transformers import Trainer
    from transformers.trainer_optimizer import is_optimizer_factory

    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, layer)
    if is_optimizer_factory(kind):
        kind()(layer, **options)
        return
    parameters = options.pop("params", options.pop("model", layer.parameters()))
    optimizer = kind(parameters, **options)
    if device == "cpu" and hasattr(optimizer, "param_groups"):
        layer(torch.zeros(1, 4)).sum().backward()
        optimizer.step()
