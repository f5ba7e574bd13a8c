"""Default learning rates, early stopping and 4 bits hold on a real model, and plain TRL learns the same."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft

QUIET = Console(quiet=True)


def end_of(recipe: Any) -> float:
    """The validation loss at the end of a run."""
    result = instructft.train(recipe, console=QUIET)
    return float(json.loads((Path(result.output_dir) / "run.json").read_text())["metrics"]["eval_loss"])


@pytest.fixture(scope="module")
def lora(recipe_of: Any) -> dict[float, float]:
    """Validation loss by learning rate."""
    rates = (2e-5, 2e-4, 2e-3)
    return {rate: end_of(recipe_of(f"lora-{rate}", f"train.learning_rate={rate}")) for rate in rates}


def test_the_default_rate_of_lora_beats_ten_times_less_and_more(lora: dict[float, float], note: Any) -> None:
    note("default learning rate", "LoRA, 6 steps at 2e-5, 2e-4, 2e-3", ", ".join(f"{x:.4f}" for x in lora.values()))
    assert lora[2e-4] < min(lora[2e-5], lora[2e-3])


def test_four_bits_learn_as_full_precision_does(recipe_of: Any, lora: dict[float, float], note: Any) -> None:
    loss = end_of(recipe_of("four-bits", "model.quantization=4bit"))
    note("QLoRA on the CPU", "4 bits, validation loss beside LoRA's", f"{loss:.4f} beside {lora[2e-4]:.4f}")
    assert loss == pytest.approx(lora[2e-4], rel=0.02)


def test_plain_trl_learns_the_same(recipe_of: Any, lora: dict[float, float], tmp_path: Path, note: Any) -> None:
    """The same rows in the same order, the same masks, without a module of ours in the loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    recipe = recipe_of("trl")
    tokenizer = instructft.load_tokenizer(recipe)
    splits = instructft.prepare_dataset(recipe, tokenizer)
    set_seed(42)
    model = instructft.load_model(recipe_of("trl-full", "adapter.type=none"), tokenizer)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=2e-4, warmup_steps=0,
        lr_scheduler_type=recipe.train["lr_scheduler_type"], report_to="none", save_strategy="no", use_cpu=True,
        weight_decay=recipe.train.get("weight_decay", 0.0), max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    collate = instructft.CompletionOnlyCollator(tokenizer.pad_token_id)
    trainer = SFTTrainer(
        model, arguments, data_collator=collate, train_dataset=splits["train"], eval_dataset=splits["validation"],
        processing_class=tokenizer,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    seconds, loss = time.perf_counter() - began, trainer.evaluate()["eval_loss"]
    note(
        "beside plain TRL", f"6 steps in {seconds:.0f} s, validation loss beside ours", f"{loss:.4f}, {lora[2e-4]:.4f}"
    )
    assert loss == pytest.approx(lora[2e-4], rel=0.05)
