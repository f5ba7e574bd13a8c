"""What a machine decides of the training arguments."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, TrainingArguments

import instructft
from instructft.errors import UsageError
from instructft.models import memory
from instructft.training import arguments
from instructft.training.arguments import (
    decide_checkpointing,
    follow_model,
    remarks,
    training_arguments,
    usual_rate,
)


def test_one_process_takes_one_gpu(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several that are visible; upstream would wrap the model in `DataParallel`, which TRL refuses."""

    def four(self: TrainingArguments) -> torch.device:
        self._n_gpu = 4
        return torch.device("cpu")

    devices = functools.cached_property(four)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    recipe = instructft.load_recipe(write_recipe())
    data = SimpleNamespace(splits={"validation": None}, tokens_per_row=10.0)
    args, _ = training_arguments(recipe, data, SimpleNamespace(num_processes=1))  # type: ignore[arg-type]
    assert args.n_gpu == 1
    assert args.train_batch_size == recipe.train["per_device_train_batch_size"]


def config(**fields: int) -> GPT2Config:
    return GPT2Config(**{"n_layer": 1, "n_head": 2, "n_embd": 64, "n_positions": 128, **fields})


@pytest.mark.parametrize(
    ("width", "rate"), [(768, 5.3e-5), (2048, 2e-5), (8192, 2e-5), (64, 6.4e-4), (16, 1e-3)], ids=str
)
def test_the_default_rate_follows_the_width(width: int, rate: float, write_recipe: Callable[..., Path]) -> None:
    recipe = instructft.load_recipe(write_recipe())
    assert usual_rate(recipe, config(n_embd=width))[0] == rate
    lora = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"type": "lora"})})
    assert usual_rate(lora, config(n_embd=width))[0] == pytest.approx(min(1e-3, 10 * rate), rel=0.02)


LEFT_OPEN = """
model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 64, n_positions: 128}, tokenizer: quickstart}
data: {datasets: [{path: rows.jsonl}], template: instruction}
train: {use_cpu: true}
"""


@pytest.fixture
def left_open(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., instructft.Recipe]:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "1 + 1?", "output": "2"}\n', encoding="utf-8")
    return lambda *overrides: instructft.load_recipe(write_recipe(LEFT_OPEN), overrides)


def test_what_a_recipe_leaves_open_follows_the_model_and_is_said(left_open: Callable[..., Any]) -> None:
    recipe, said = follow_model(left_open(), config())
    assert (recipe.data.max_length, recipe.train["learning_rate"]) == (128, 6.4e-4)
    assert [key for key, _ in said] == ["max_length", "rate"]
    assert "64 wide" in said[1][1]
    again, said = follow_model(recipe, config())
    assert (again, said) == (recipe, [])


def test_what_a_recipe_says_stays(left_open: Callable[..., Any]) -> None:
    written = left_open("data.max_length=1024", "train.learning_rate=1e-5")
    assert follow_model(written, config()) == (written, [])


def test_a_resumed_run_keeps_what_it_began_with(left_open: Callable[..., Any]) -> None:
    before = {"train.learning_rate": 2e-5, "data.max_length": 100}
    recipe, said = follow_model(left_open(), config(), before)
    assert (recipe.data.max_length, recipe.train["learning_rate"]) == (100, 2e-5)
    assert "when the run began" in said[0][1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=30", "46,875 times what is usual"),
        ("train.learning_rate=2e-5", "32 times below what is usual"),
        ("train.learning_rate=0", "0 is far from what is usual"),
        ("train.warmup_steps=100", "100 steps of warm-up in a run of 4"),
        ("model.dtype=float16", "trained in float16 itself"),
        ("model.dtype=bfloat16", "rounds most updates of a usual learning rate away"),
        ("train.learning_rate=1e-3", ""),
        ("train.warmup_steps=3", ""),
        ("train.warmup_steps=0.5", ""),
    ],
)
def test_remarks(override: str, said: str, left_open: Callable[..., Any]) -> None:
    recipe, _ = follow_model(left_open(override), config())
    args, _ = training_arguments(recipe, DATA, ONE)
    found = remarks(recipe, args, config(), 4)
    assert said in "".join(found)
    assert len(found) == bool(said)


@pytest.mark.parametrize(("method", "alone"), [("fork", False), ("spawn", True), ("forkserver", True)])
def test_no_process_that_loads_rows_runs_a_script_without_a_guard(
    method: str, alone: bool, left_open: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch starts them by `fork`, `spawn` or `forkserver`, as the system and the version of Python have it."""
    monkeypatch.setattr(arguments, "script_without_guard", lambda: "mine.py")
    monkeypatch.setattr(arguments.multiprocessing, "get_start_method", lambda allow_none: method)
    recipe, _ = follow_model(left_open("train.dataloader_num_workers=2"), config())
    args, _ = training_arguments(recipe, DATA, ONE)
    assert args.dataloader_num_workers == (0 if alone else 2)
    found = remarks(recipe, args, config(), 4)
    assert ("dataloader_num_workers: 2, but mine.py has no `if __name__" in "".join(found)) is alone
    given, _ = follow_model(
        left_open("train.dataloader_num_workers=2", f"train.dataloader_multiprocessing_context={method}"), config()
    )
    monkeypatch.setattr(arguments.multiprocessing, "get_start_method", lambda allow_none: "fork")
    assert training_arguments(given, DATA, ONE)[0].dataloader_num_workers == (0 if alone else 2)


def test_a_rate_for_all_weights_is_low_for_an_adapter(left_open: Callable[..., Any]) -> None:
    recipe = left_open("train.learning_rate=2e-5")
    lora = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"type": "lora"})})
    args, _ = training_arguments(lora, DATA, ONE)
    assert "50 times below what is usual for LoRA on a model this wide (0.001)" in remarks(lora, args, config(), 4)[0]
    wide = follow_model(left_open().model_copy(update={"adapter": lora.adapter}), config(n_embd=4096))[0]
    assert wide.train["learning_rate"] == pytest.approx(2e-4)


DATA: Any = SimpleNamespace(splits={"validation": None}, tokens_per_row=10.0)
ONE: Any = SimpleNamespace(num_processes=1)


@pytest.mark.parametrize(
    ("free", "overrides", "decided"),
    [
        (1 << 40, [], False),  # not even estimated
        (1 << 20, [], True),
        (1 << 20, ["train.gradient_checkpointing=false"], False),
    ],
    ids=["room enough", "too little", "as the recipe says"],
)
def test_checkpointing_where_memory_would_not_hold_a_step(
    free: int, overrides: list[str], decided: bool, left_open: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = follow_model(left_open(*overrides), config())
    args, _ = training_arguments(recipe, DATA, ONE)
    monkeypatch.setattr(arguments, "memory_here", lambda args: free)
    monkeypatch.setattr(memory, "largest_batch", lambda *_: None)
    monkeypatch.setattr(memory, "resident", lambda: 0)

    def needed(recipe: Any, start: Any, batch: Any, args: Any, *_: Any) -> dict[str, Any]:
        assert free < 1 << 40, "a rough look is enough here"
        return {"memory": {"total": (1 if args.gradient_checkpointing else 2) << 20}}

    monkeypatch.setattr(memory, "memory", needed)
    found, why = decide_checkpointing(recipe, SimpleNamespace(config=config()), DATA, args, None)  # type: ignore[arg-type]
    assert found.train["gradient_checkpointing"] is decided
    assert ("2 MiB of the 1 MiB" in why) is decided
    kept, _ = decide_checkpointing(recipe, None, DATA, args, {"train.gradient_checkpointing": decided})  # type: ignore[arg-type]
    assert kept.train["gradient_checkpointing"] is decided


def test_a_rough_look_takes_sizes_that_are_one_a_layer(left_open: Callable[..., Any]) -> None:
    """Gemma 3n has widths of its own for each layer."""
    recipe, _ = follow_model(left_open(), config())
    args, _ = training_arguments(recipe, DATA, ONE)
    one, many = config(), config()
    one.intermediate_size, many.intermediate_size = 4096, [2048, 4096]
    assert arguments._roughly(many, args, recipe) == arguments._roughly(one, args, recipe)


def test_a_pipe_is_no_configuration(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A library would open it, and wait for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    recipe = instructft.load_recipe(write_recipe(), [f"train.accelerator_config={tmp_path / 'pipe.json'}"])
    with pytest.raises(UsageError, match=r"accelerator_config: .*pipe\.json is a folder, a device or a pipe"):
        arguments.refuse_what_cannot_run(recipe, SimpleNamespace(num_processes=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("found", ["2 processes", "FSDP", "DeepSpeed"])
def test_checkpoints_beside_training_are_of_one_process(
    found: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if found in ("FSDP", "DeepSpeed"):
        monkeypatch.setenv(f"ACCELERATE_USE_{found.upper()}", "true")
    state: Any = SimpleNamespace(num_processes=2 if found == "2 processes" else 1, distributed_type=None)
    arguments.refuse_what_cannot_run(instructft.load_recipe(write_recipe()), state)  # auto: false
    recipe = instructft.load_recipe(write_recipe(), ["train.save_in_background=true"])
    with pytest.raises(UsageError, match=f"save_in_background: true is for one process .* found {found}. Write auto"):
        arguments.refuse_what_cannot_run(recipe, state)
