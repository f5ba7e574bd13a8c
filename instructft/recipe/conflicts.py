"""Keys of a recipe that are right one by one, and cannot be meant together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from instructft.data.files.kinds import suffix_of
from instructft.data.sources import SOURCES
from instructft.recipe.schema import ANSWER_FIGURES, Recipe, metric_name
from instructft.recipe.yaml_reader import Document, KeyPath

# What an evaluation measures, and a best checkpoint can be chosen by; each data set's loss where there are several.
EVALUATED = ("loss", "perplexity", "entropy", "mean_token_accuracy")
Contradiction = tuple[tuple[KeyPath, ...], str]  # the keys it is about, the one to be named first; what is wrong


def find(document: Document, recipe: Recipe) -> None:
    """Note what cannot be meant together, defaults included; keys with a known problem are left alone."""
    found = [
        *_model(recipe),
        *_sections(recipe, document.values),
        *_streaming(recipe),
        *_judging(recipe, document.values),
        *_train(recipe),
        *_resumable(recipe),
    ]
    for paths, message in found:
        if not document.is_bad(*paths):
            document.add(paths[0], message)


def _sections(recipe: Recipe, values: Mapping[str, Any]) -> Iterator[Contradiction]:
    data = recipe.data
    entries = [("datasets", i, entry) for i, entry in enumerate(data.datasets)]
    for split in ("validation", "test"):
        entries += [(split, i, entry) for i, entry in enumerate(getattr(data, split) or ())]
        if getattr(data, split) and getattr(data.splits, split):
            say = f"has data sets of its own and a share of the rows (data.splits.{split}); keep one"
            yield (("data", split), ("data", "splits", split)), say
    for key, index, entry in entries:
        at: KeyPath = ("data", key, index)
        if key != "datasets" and entry.streaming:
            yield ((*at, "streaming"),), "held-out rows are read whole; take it out, with rows: N for a large set"
        if key != "datasets" and entry.repeat != 1:
            yield ((*at, "repeat"),), "held-out rows are judged once each; take it out"
        given = [name for name in ("name", "hub", "path", "url") if getattr(entry, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            yield (
                (at, *((*at, name) for name in given)),
                f"found {found}, expected exactly one of name, hub, path and url",
            )
        elif given[0] in ("path", "url"):
            for name in ("config", "revision"):
                if getattr(entry, name) is not None:
                    yield ((*at, name),), f"has no effect on a {given[0]}; it belongs to a data set on the Hub"
    splits = recipe.data.splits
    if splits.validation + splits.test >= 1:
        shares = f"{splits.validation:g} + {splits.test:g}"
        yield (
            (("data", "splits"),),
            f"validation + test are {shares} of the rows, which leaves none to train; expected below 1",
        )
    written = {**values.get("adapter", {}), **recipe.adapter.more}
    if "type" not in written and (first := next((key for key in written if key != "more"), None)):
        yield (("adapter", first), ("adapter", "type")), "has no effect without an adapter; write adapter.type: lora"
    if recipe.hub.push != "never" and not recipe.hub.repo_id:
        say = f"{recipe.hub.push} needs hub.repo_id, such as org/name"
        yield (("hub", "push"), ("hub", "repo_id")), say


def _judging(recipe: Recipe, values: Mapping[str, Any]) -> Iterator[Contradiction]:
    """What asks for answers to rows that are not held out, and figures of one name."""
    rows, metrics = ("evaluation", "rows"), ("evaluation", "metrics")
    given = values.get("evaluation") or {}
    for key in (rows, metrics):
        if not recipe.data.holds_out("validation") and given.get(key[1]) not in (None, "auto", 0, [], ()):
            yield (key,), "there is nothing to answer: data.splits.validation is 0; hold rows out, e.g. 0.05"
    if recipe.evaluation.rows == 0 and recipe.evaluation.metrics:
        yield (metrics, rows), "judges answers, and evaluation.rows is 0; set it to auto, or to a number"
    own = [name.rpartition(":")[2] for name in recipe.evaluation.metrics if name not in ANSWER_FIGURES]
    taken = {*ANSWER_FIGURES, *EVALUATED, "runtime", "samples_per_second", "steps_per_second", "answered"}
    for index, name in enumerate(recipe.evaluation.metrics):
        function = name.rpartition(":")[2]
        if name not in ANSWER_FIGURES and (function in taken or own.count(function) > 1):
            say = f"eval_{function} would stand for two figures; give the function another name"
            yield ((*metrics, index),), say


def _streaming(recipe: Recipe) -> Iterator[Contradiction]:
    """What rows that are read as they come cannot have."""
    entries = recipe.data.datasets
    streams = [index for index, entry in enumerate(entries) if entry.streaming]
    if not streams:
        return
    if len(streams) < len(entries):
        other = next(index for index in range(len(entries)) if index not in streams)
        at: KeyPath = ("data", "datasets", streams[0], "streaming")
        yield (at,), f"data.datasets[{other}] does not stream; either all data sets of a recipe do, or none"
    for index in streams:
        entry = entries[index]
        if entry.repeat != 1:
            say = "a stream that ends sooner than the others begins again; set its share with weight"
            yield (("data", "datasets", index, "repeat"),), say
        url = SOURCES[entry.name].url if entry.name in SOURCES else None
        key = "path" if entry.path else "url" if entry.url else "name"
        location = entry.path or entry.url or url
        if location and suffix_of(location) == ".json":
            say = f"{location} is one JSON array, which cannot be read row by row; save it as .jsonl to stream it"
            yield (("data", "datasets", index, key),), say
        if entry.split and "[" in entry.split:
            say = f"found {entry.split}, but a stream has no rows to slice; name a whole split, and use rows: N"
            yield (("data", "datasets", index, "split"),), say
    splits = recipe.data.splits
    if splits.validation or splits.test:
        say = (
            f"found validation {splits.validation:g} and test {splits.test:g}, but no share of a stream can be held "
            "out, since its length is not known; set data.splits={validation: 0, test: 0}, or name data sets of their "
            "own in data.validation and data.test"
        )
        yield (("data", "splits"),), say
    if recipe.train.get("max_steps", -1) <= 0:
        yield (("train", "max_steps"),), "missing; a stream has no length, so the run needs a number of steps above 0"
    if recipe.train.get("dataloader_num_workers"):
        say = "a stream is read in the training process itself, where its rows are counted; set it to 0"
        yield (("train", "dataloader_num_workers"),), say


def _model(recipe: Recipe) -> Iterator[Contradiction]:
    model = recipe.model
    if model.attn_implementation == "varlen" and recipe.data.packing is not True:
        found = "false" if recipe.data.packing is False else recipe.data.packing
        say = f"varlen attends to packs by their borders, and data.packing is {found}; set it to true, or write auto"
        yield (("model", "attn_implementation"), ("data", "packing")), say
    name, config = ("model", "name_or_path"), ("model", "config")
    if model.name_or_path is None and model.config is None:
        say = "missing; expected a Hub id or a folder, or model.config to start from random weights"
        yield (name, config), say
    if model.name_or_path is not None and model.config is not None:
        yield (
            (config, name),
            "found name_or_path and config; name_or_path loads weights, config starts from random ones: keep one",
        )
    elif model.config is not None:
        if model.tokenizer is None:
            yield (("model", "tokenizer"),), "missing; random weights (model.config) bring no tokenizer of their own"
        if not isinstance(model.config.get("model_type"), str):
            yield (config,), "has no model_type; expected for example {model_type: gpt2, n_layer: 4}"
        for key in ("revision", "subfolder"):
            if getattr(model, key) is not None:
                yield (("model", key),), "has no effect on random weights (model.config)"
        if model.overrides is not None:
            yield (("model", "overrides"),), "is for a published configuration; write these fields into model.config"
        if recipe.adapter.type != "none":
            say = (
                f"found {recipe.adapter.type} over random weights (model.config), a base that nobody could load again; "
                "name a model in model.name_or_path, or take the adapter out"
            )
            yield (("adapter", "type"), config), say
        if model.quantization != "none":
            yield (("model", "quantization"),), "random weights (model.config) cannot be quantized; take it out"
    for pattern in model.freeze or ():
        try:
            re.compile(pattern)
        except re.error as error:
            yield (("model", "freeze"),), f"{pattern} is no regular expression: {error}"
    if model.freeze and recipe.adapter.type != "none":
        say = "has no effect under an adapter, whose base is frozen whole; choose layers with adapter.target_modules"
        yield (("model", "freeze"), ("adapter", "type")), say
    if model.quantization != "none" and model.config is None and recipe.adapter.type == "none":
        say = f"{model.quantization} weights cannot be trained themselves; add adapter.type: lora, or take it out"
        yield (("model", "quantization"), ("adapter", "type")), say


def _train(recipe: Recipe) -> Iterator[Contradiction]:
    train = recipe.train
    written = recipe.train_written

    def at(*keys: str) -> tuple[KeyPath, ...]:
        """The keys it is about, one that somebody wrote first."""
        return tuple(("train", key) for key in sorted(keys, key=lambda key: key not in written))

    def on(key: str) -> bool:
        return bool(train.get(key))

    evaluates, saves = train["eval_strategy"], train["save_strategy"]
    if on("tokens_per_step") and train.get("gradient_accumulation_steps") is not None:
        say = "contradicts train.tokens_per_step, which sets it from the number of processes; keep one"
        yield at("gradient_accumulation_steps"), say
    attention = recipe.model.attn_implementation
    if on("auto_find_batch_size") and recipe.data.packing and ("flash" in attention or attention == "varlen"):
        name = "varlen" if attention == "varlen" else "flash-attention"
        say = f"{name} gets packs as one row, which cannot be halved; set train.per_device_train_batch_size"
        yield at("auto_find_batch_size"), say
    if on("label_smoothing_factor") and train.get("loss_type", "nll") != "nll":
        say = f"would be left out without a word with train.loss_type: {train['loss_type']}; keep one"
        yield (at("label_smoothing_factor") + at("loss_type")), say
    for one, two in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if on(one) and on(two):
            yield (at(one) + at(two)), f"contradicts train.{two}; keep one"
    if on("fp8"):
        if recipe.adapter.type != "none":
            say = f"trains all weights, and {recipe.adapter.type} leaves those of the products frozen; take it out"
            yield (*at("fp8"), ("adapter", "type")), say
        if on("fp16"):
            yield at("fp8", "fp16"), "fp8 is made for bfloat16 around it; take fp16 out"
    yield from _float32_copies(recipe)
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if old in written and train.get(new) is not None and train.get(old) != train[new]:
            yield at(old), f"contradicts train.{new}, the newer name of the same thing; keep that one"
    if not recipe.data.holds_out("validation"):
        hold_out = "there is nothing to evaluate on: data.splits.validation is 0; hold rows out, e.g. 0.05"
        if evaluates != "no":
            yield at("eval_strategy"), f"{evaluates}, but {hold_out}"
        if on("eval_on_start"):
            yield at("eval_on_start"), hold_out
    if evaluates == "no":
        if train.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
            yield (
                at("lr_scheduler_type"),
                f"{train['lr_scheduler_type']} follows the evaluations; set train.eval_strategy",
            )
        if saves == "best":
            yield at("save_strategy"), "best follows the evaluations; set train.eval_strategy"
    if saves == "best" and not on("metric_for_best_model") and not on("load_best_model_at_end"):
        yield at("save_strategy"), "best needs train.metric_for_best_model, such as eval_loss"
    if train.get("early_stopping_patience") is not None:
        if problem := _early_stopping(recipe):
            yield at("early_stopping_patience"), problem
    elif on("load_best_model_at_end") and saves != "best":
        if evaluates != saves or saves == "no":
            say = (
                f"needs checkpoints where there are evaluations; found save_strategy {saves}, eval_strategy {evaluates}"
            )
            yield at("load_best_model_at_end"), say
        elif saves == "steps" and not _multiple(train["save_steps"], train["eval_steps"] or train["logging_steps"]):
            found = f"{train['save_steps']} and {train['eval_steps']}"
            say = f"needs save_steps to be a multiple of eval_steps; found {found}"
            yield at("load_best_model_at_end"), say
    metric, several = metric_name(train), len(recipe.data.datasets) > 1
    answered = [*recipe.evaluation.figures(), *recipe.evaluation.functions()]
    if metric in (*answered, *ANSWER_FIGURES) and recipe.evaluation.rows == 0:
        say = f"{metric} is of answers to held-out rows, and evaluation.rows is 0; set it to auto, or to a number"
        yield (*at("metric_for_best_model"), ("evaluation", "rows")), say
    elif metric not in (*EVALUATED, *answered) and not (several and metric.endswith("_loss")):
        more = ", and eval_<data set>_loss of each data set" if several else ""
        known = ", ".join(f"eval_{name}" for name in (*EVALUATED, *answered))
        yield at("metric_for_best_model"), f"eval_{metric} is not measured; expected one of {known}{more}"
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if train.get(key) not in (None, False) and not on("dataloader_num_workers"):
            yield at(key), "needs train.dataloader_num_workers above 0"
    if recipe.hub.push == "checkpoints" and saves == "no":
        yield at("save_strategy"), "no, but hub.push: checkpoints uploads checkpoints"


# Optimizers that keep plain tensors beside their parameters and make them at the first step.
WITH_COPIES = ("adamw_torch", "adamw_torch_fused", "adafactor", "rmsprop", "sgd")


def _float32_copies(recipe: Recipe) -> Iterator[Contradiction]:
    """What float32 copies of the weights cannot be kept with."""
    train, key = recipe.train, ("train", "float32_copies")
    if not train["float32_copies"]:
        return
    if recipe.adapter.type != "none":
        say = f"is for training all weights, and those of {recipe.adapter.type} are float32 themselves; take it out"
        yield (key, ("adapter", "type")), say
        return
    if recipe.model.dtype != "bfloat16":
        say = (
            f"keeps copies of bfloat16 weights, and model.dtype is {recipe.model.dtype}; write model.dtype: bfloat16, "
            "or take it out"
        )
        yield (key, ("model", "dtype")), say
    if train["fp8"]:
        say = "fp8 rounds from float32 weights itself; keep one of train.fp8 and train.float32_copies"
        yield (key, ("train", "fp8")), say
    if train.get("fp16"):
        say = "bfloat16 weights need no loss scale, and float16 gradients do; take train.fp16 out"
        yield (key, ("train", "fp16")), say
    if (optim := train.get("optim")) is not None and optim not in WITH_COPIES:
        say = f"optim {optim} has no place for copies; write one of {', '.join(WITH_COPIES)}, or take one of both out"
        yield (key, ("train", "optim")), say


def _early_stopping(recipe: Recipe) -> str:
    """What keeps a run from stopping by its validation loss and going back to its best checkpoint; "" if nothing."""
    train = recipe.train
    evaluates, saves = train["eval_strategy"], train["save_strategy"]
    if not recipe.data.holds_out("validation"):
        return "there is no validation loss: data.splits.validation is 0; hold rows out, e.g. 0.05"
    if evaluates == "no":
        return "follows the evaluations; set train.eval_strategy"
    if not train.get("load_best_model_at_end"):
        return "goes back to the best checkpoint; take train.load_best_model_at_end: false out"
    metric = metric_name(train)
    answers = (*recipe.evaluation.figures(), *recipe.evaluation.functions())
    if metric not in answers and (metric != "loss" or train.get("greater_is_better")):
        found = f"metric_for_best_model {metric}" if metric != "loss" else "greater_is_better: true"
        return (
            f"stops by the validation loss, the lower the better, or by a figure of answers ({', '.join(answers)}); "
            f"found {found}: take it out"
        )
    if saves == "best":
        return ""
    every, save = train.get("eval_steps") or train["logging_steps"], train["save_steps"]
    if evaluates != saves or (saves == "steps" and not (_multiple(save, every) and _multiple(every, save))):
        found = f"eval_strategy {evaluates}, save_strategy {saves}"
        found += f", eval_steps {every:g}, save_steps {save:g}" if evaluates == saves else ""
        return f"needs a checkpoint at every evaluation, to go back to the best; found {found}"
    return ""


def _multiple(save: float, evaluate: float) -> bool:
    """Whether each checkpoint falls on an evaluation; shares of all steps and numbers of steps do not mix."""
    if (save < 1) != (evaluate < 1):
        return False
    return round(save * 1_000_000) % round(evaluate * 1_000_000) == 0


# Fields of `train:` with which a checkpoint could not go on to the same bits: name -> (that value, what it does).
_UNRESUMABLE: dict[str, tuple[bool, str]] = {
    "save_only_model": (
        True,
        "leaves optimizer, schedule and random states out of every checkpoint, and no run could resume from it; take "
        "it out (train.save_total_limit keeps fewer; the model alone lies in the run folder at the end)",
    ),
    "ignore_data_skip": (
        True,
        "begins the epoch anew after a resume, so that rows are trained twice and others never; take it out",
    ),
    "restore_callback_states_from_checkpoint": (
        True,
        "makes the trainer's callbacks anew at a resume, with the stop that ended the run; take it out: what a run "
        "needs to know is restored without it",
    ),
    "dataloader_in_order": (
        False,
        "takes batches as they are ready, in another order each time, so no run could be resumed; take it out",
    ),
}
_ACCELERATOR: dict[str, tuple[bool, str]] = {
    "use_seedable_sampler": (
        False,
        "draws the order of rows from a random state that has moved on when a run is resumed; take it out",
    ),
    "even_batches": (
        False,
        "leaves a process without a batch at the end of an epoch, for which the others wait; take it out",
    ),
    "use_stateful_dataloader": (
        True,
        "keeps the place in the data twice, and a resumed run would pass over rows; take it out",
    ),
}


def accelerator_problem(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which key of accelerate's configuration a run cannot be resumed with, or cannot run with, and why.

    >>> accelerator_problem({"dispatch_batches": True, "split_batches": True}) is None
    True
    """
    for key, (bad, why) in _ACCELERATOR.items():
        if config.get(key) is bad:
            return key, f"{str(bad).lower()} {why}"
    if config.get("dispatch_batches") and not config.get("split_batches"):
        return (
            "dispatch_batches",
            "true joins batches whose rows have unequal lengths, which fails; add split_batches: true",
        )
    return None


def _resumable(recipe: Recipe) -> Iterator[Contradiction]:
    """What makes a checkpoint that cannot go on to the same bits."""
    for key, (bad, why) in _UNRESUMABLE.items():
        if recipe.train.get(key) is bad:
            yield (("train", key),), f"{str(bad).lower()} {why}"
    config = recipe.train.get("accelerator_config")
    if isinstance(config, Mapping) and (found := accelerator_problem(config)):
        yield (("train", "accelerator_config", found[0]),), found[1]
