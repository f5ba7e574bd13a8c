"""QLoRA on a CPU, from the first step to a merged model: the base stays what its file says, and learning is LoRA's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from tests.real.conftest import held_out

QUIET = Console(quiet=True)
WATCHED = ("train.max_steps=8", "train.eval_strategy=steps", "train.eval_steps=8", "train.eval_on_start=true")


@pytest.fixture(scope="module")
def run(recipe_of: Any) -> Path:
    return Path(instructft.train(recipe_of("qlora", "model.quantization=4bit", *WATCHED), console=QUIET).output_dir)


def test_qlora_learns_what_lora_learns(run: Path, recipe_of: Any, note: Any) -> None:
    """Each against where it starts: four bits cost this small model a tenth of its loss before the first step, and no
    training of an adapter on it can be blamed for that, nor is it undone by one.
    """
    plain = Path(instructft.train(recipe_of("lora", *WATCHED), rehearsal=False, console=QUIET).output_dir)
    facts = json.loads((run / "run.json").read_text())
    assert facts["adapter"]["moved"]
    assert facts["adapter"]["base_unchanged"]
    (before, after), (before_4bit, after_4bit) = held_out(plain), held_out(run)
    note("QLoRA on the CPU", "LoRA, 8 steps of 4 rows", f"loss {before:.4f} to {after:.4f}")
    note("QLoRA on the CPU", "the same on 4 bits", f"loss {before_4bit:.4f} to {after_4bit:.4f}, base unchanged")
    bits = before_4bit / before - 1
    gained = (before_4bit - after_4bit) / (before - after)
    note(
        "QLoRA on the CPU",
        "4 bits against 16, before and after training",
        f"{bits:+.1%}, {after_4bit / after - 1:+.1%}",
    )
    note("QLoRA on the CPU", "what QLoRA gains of what LoRA gains", f"{gained:.0%}")
    assert after_4bit < before_4bit
    assert gained > 0.98  # within 2% of LoRA's, or better
    assert after_4bit / after - 1 < bits + 0.02


def test_it_merges_and_the_nearer_base_is_measured(run: Path, tmp_path: Path, note: Any) -> None:
    facts = instructft.merge_adapter(run, tmp_path / "merged", measure_quantized=True, console=QUIET).facts
    assert facts["proof"]["exact"] <= facts["proof"]["tolerance"]
    measured, other = facts["quantized"], facts["quantized"]["other"]
    note("QLoRA merged", "as trained, on 4 bits", f"loss {measured['trained_loss']:.4f}")
    for into, found in (("published", measured), ("dequantized", other)):
        figure = f"KL to what was trained {found['kl']:.1e}, loss {found['loss']:.4f}"
        note("QLoRA merged", f"on the {into} base", figure)
    assert measured["nearer"] == other["into"] == "dequantized"
