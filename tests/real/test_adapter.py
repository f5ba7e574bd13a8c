"""An adapter on a real model learns, is merged by both proofs, and is the same model in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft

QUIET = Console(quiet=True)
KNOWN = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What color is the sky on a clear day?": "blue",
    "How many days are in a week?": "seven|7",
}


@pytest.fixture(scope="module")
def run(recipe_of: Any) -> Path:
    recipe = recipe_of("adapter", "train.max_steps=12", "train.eval_strategy=steps", "train.eval_steps=12")
    return Path(instructft.train(recipe, console=QUIET).output_dir)


def test_held_out_loss_falls_and_the_base_keeps_what_it_knew(run: Path, smollm: Path, note: Any) -> None:
    recipe = instructft.load_recipe(run / "recipe.yaml")
    from instructft.data.load import conversations

    held = conversations(recipe, "validation")
    before = instructft.evaluate(str(smollm), held, max_new_tokens=24)
    after = instructft.evaluate(str(run), held, max_new_tokens=24)
    assert after["loss"] < before["loss"]
    answers = instructft.generate(str(run), list(KNOWN), max_new_tokens=24)
    kept = [any(word in answer for word in KNOWN[q].split("|")) for q, answer in zip(KNOWN, answers, strict=True)]
    assert sum(kept) >= len(KNOWN) - 1, answers
    note("it learns", "LoRA, 12 steps of 4 rows", f"held-out loss {before['loss']:.3f} to {after['loss']:.3f}")
    note("it keeps what it knew", "general questions", f"{sum(kept)} of {len(KNOWN)} right")


def test_the_merge_is_proved_and_keeps_what_was_learned(run: Path, tmp_path: Path, note: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    facts = instructft.merge_adapter(run, tmp_path / "merged", console=QUIET).facts
    proof = facts["proof"]
    assert facts["dtype"] == "bfloat16"
    assert facts["rounding"] == "stochastic"
    assert proof["weights"]["deviation"] < 1e-12
    assert proof["weights"]["applied"] == pytest.approx(1, abs=0.01)
    assert proof["exact"] <= proof["tolerance"]
    costs = {(row["dtype"], row["rounding"]): row for row in proof["costs"]}
    assert costs["bfloat16", "stochastic"]["kl"] < costs["bfloat16", "nearest"]["kl"] / 3
    for (dtype, rounding), row in costs.items():
        figure = f"KL {row['kl']:.1e}, top-1 {row['top1']:.1%}, loss {row['loss']:.4f}, {row['vanished']:.0%} vanished"
        note("merged", f"{dtype}, {rounding}", figure)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ours = instructft.Chat(str(tmp_path / "merged")).generator.model.float().eval()
    ids = torch.arange(100, 164)[None]
    with torch.inference_mode():
        off = float((plain(input_ids=ids).logits - ours(input_ids=ids).logits).abs().max())
    assert off == 0
    note("merged, in plain transformers", "logits of 64 tokens", f"largest difference {off:.1g}")
    assert json.loads((tmp_path / "merged" / "run.json").read_text())["merge"]["proof"]["kl"] == proof["kl"]
