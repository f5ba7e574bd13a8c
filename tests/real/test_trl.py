"""Plain TRL learns the same from the same rows."""

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


def test_plain_trl_learns_the_same(recipe_of: Any, tmp_path: Path, note: Any) -> None:
    """The same rows in the same order, the same masks, without a module of ours in the loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    recipe = recipe_of("ours")
    ours = end_of(recipe)
    tokenizer = instructft.load_tokenizer(recipe)
    splits = instructft.prepare_dataset(recipe, tokenizer)
    set_seed(42)
    model = instructft.load_model(recipe_of("trl-full", "adapter.type=none"), tokenizer)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=2e-4, warmup_steps=0,
        bf16=False, report_to="none", save_strategy="no", use_cpu=True,
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
    note("beside plain TRL", f"6 steps in {seconds:.0f} s, validation loss beside ours", f"{loss:.4f}, {ours:.4f}")
    assert loss == pytest.approx(ours, rel=0.05)
