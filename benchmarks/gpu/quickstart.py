"""Where the seconds of a whole run go: the quickstart, and a LoRA run of 30 steps that is evaluated and asked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.jobs import Job, Result, Settings
from gpu.runs import content, recipe, save_model, shape, train

# what is timed: functions of `instructft.training.run`, then methods by module and class; those inside come again
FUNCTIONS = {
    "load_tokenizer": "tokenizer", "starting_point": "starting point", "_prepared": "data", "load_model": "model",
    "build_trainer": "trainer", "prove_isolation": "proof of packs", "rehearse_run": "rehearsal",
    "watch_adapter": "adapter's fingerprint", "_run": "training, evaluations included",
    "final_metrics": "last metrics", "collect_facts": "facts", "prove_adapter": "adapter's proof", "save": "saving",
}  # fmt: skip
METHODS = {
    ("instructft.training.trainer", "Trainer", "evaluate"): "· evaluation, samples included",
    ("instructft.training.callbacks", "Samples", "on_evaluate"): "· · samples",
    ("instructft.training.callbacks", "Samples", "on_train_begin"): "· samples before the first step",
    ("instructft.training.run_warnings", "RunWarnings", "on_evaluate"): "· · warnings",
    ("instructft.training.run_warnings", "RunWarnings", "on_train_begin"): "· warnings before the first step",
    ("instructft.training.trainer", "Trainer", "_save_checkpoint"): "· checkpoints",
}


def watch(spent: Counter[str]) -> None:
    """Time every part, in this process; one that is not there by this name is left out."""
    import importlib

    road = importlib.import_module("instructft.training.run")
    places: list[tuple[Any, str, str]] = [(road, name, words) for name, words in FUNCTIONS.items()]
    places += [(getattr(importlib.import_module(module), of, None), name, words)
               for (module, of, name), words in METHODS.items()]  # fmt: skip
    for owner, name, words in places:
        function = getattr(owner, name, None)
        if function is not None:
            setattr(owner, name, _timed(function, words, spent))


def _timed(function: Any, words: str, spent: Counter[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[words] += time.perf_counter() - began

    return call


def quickstart(settings: Settings) -> Result:
    """The shipped recipe, as it is."""
    from instructft.recipe.load import load_recipe

    changes = [f"output_dir={settings.folder('quickstart')}/run"]
    if settings.tiny:
        changes += [
            "train.max_steps=6",
            "train.eval_steps=3",
            "train.use_cpu=true",
            "train.warmup_steps=1",
            "samples=[]",
        ]
    return _report(load_recipe("quickstart", overrides=changes))


def lora(settings: Settings) -> Result:
    """Rows of which a tenth is held out, and three questions at every evaluation."""
    folder = settings.folder("evaluated")
    model = save_model(settings, folder, shape(settings, "llama"), low=True)
    given = content(
        settings, folder, rows=300, data={"packing": False, "splits": {"validation": 0.1}},
        train={"max_steps": 30, "logging_steps": 10}, adapter={"type": "lora", "r": 16, "alpha": 32},
        samples=["What is the capital of Norway?", "Count to five.", "Name a colour."],
    )  # fmt: skip
    given["model"] = {"name_or_path": str(model)}
    given["train"]["per_device_train_batch_size"] = 8
    return _report(recipe(folder, "lora", given))


def _report(made: Any) -> Result:
    spent: Counter[str] = Counter()
    watch(spent)
    began = time.perf_counter()
    done = train(made)
    whole = time.perf_counter() - began
    facts = done.facts["train"]
    slow = spent["· evaluation, samples included"] + spent["· warnings before the first step"]
    slow += spent["· samples before the first step"]
    return {
        "whole": round(whole, 2),
        "steps": facts["steps"],
        "ms a step": round(1e3 * facts["seconds"] / facts["steps"], 1),
        "share of evaluation": round(slow / spent["training, evaluations included"], 3),
        "parts": {words: round(spent[words], 2) for words in [*FUNCTIONS.values(), *METHODS.values()] if spent[words]},
        "run": Path(done.output_dir).name,
    }


def jobs(settings: Settings) -> Iterator[Job]:
    """Both runs."""
    yield Job("quickstart", quickstart, {"settings": settings}, limit=90)
    if not settings.tiny:
        yield Job("LoRA, 30 steps, evaluated", lora, {"settings": settings}, limit=60)


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown: seconds, imports left out."""
    names = list(dict.fromkeys(name for one in found for name in one["parts"]))
    rows = [f"| seconds | {' | '.join(one['job'] for one in found)} |", f"| --- |{' ---: |' * len(found)}"]
    for name in names:
        rows.append(f"| {name} | {' | '.join(str(one['parts'].get(name, '')) for one in found)} |")
    for name in ("whole", "steps", "ms a step", "share of evaluation"):
        rows.append(f"| **{name}** | {' | '.join(str(one[name]) for one in found)} |")
    return rows
