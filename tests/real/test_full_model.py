"""A real model that was trained whole learns, and is stored in bfloat16 with what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

import instructft
from tests.real.conftest import differs_in_plain_transformers, noted_costs

QUIET = Console(quiet=True)


def test_a_model_trained_whole_is_stored_in_less_with_what_it_learned(
    recipe_of: Any, tmp_path: Path, note: Any
) -> None:
    """At the default rate of a full fine-tuning."""
    recipe = recipe_of(
        "whole", "adapter.type=none", "model.dtype=float32", "train.max_steps=6", "train.learning_rate=2e-5",
        "train.per_device_train_batch_size=2",
    )  # fmt: skip
    run = Path(instructft.train(recipe, console=QUIET).output_dir)
    facts = instructft.merge_adapter(run, tmp_path / "narrow", dtype="bfloat16", console=QUIET).facts
    proof, what = facts["proof"], "trained whole, stored in less"
    assert proof["exact"] <= proof["tolerance"]
    note(what, "what training does to its base", f"KL {proof['effect_kl']:.1e}")
    costs = noted_costs(proof, what, note)
    least = min(costs["bfloat16", rounding]["kl"] for rounding in ("stochastic", "nearest"))
    assert proof["kl"] <= least / 0.9  # what is written is the rounding that loses least, or next to nothing more
    off = differs_in_plain_transformers(tmp_path / "narrow")
    note(what, "in plain transformers: logits of 64 tokens", f"largest difference {off:.1g}")
    assert off == 0
