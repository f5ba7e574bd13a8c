"""An adapter on a real model learns, is merged by both proofs, and is the same model in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from tests.conftest import BATTERY
from tests.real.conftest import differs_in_plain_transformers, held_out, noted_costs

QUIET = Console(quiet=True)
KNOWN = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What color is the sky on a clear day?": "blue",
    "How many days are in a week?": "seven|7",
}


def test_held_out_loss_falls_and_the_base_keeps_what_it_knew(tuned: Path, note: Any) -> None:
    before, after = held_out(tuned)
    assert after < before
    answers = instructft.generate(str(tuned), list(KNOWN), max_new_tokens=24)
    kept = [any(word in answer for word in KNOWN[q].split("|")) for q, answer in zip(KNOWN, answers, strict=True)]
    assert sum(kept) >= len(KNOWN) - 1, answers
    note("it learns", "LoRA, 8 steps of 4 rows", f"held-out loss {before:.3f} to {after:.3f}")
    note("it keeps what it knew", "general questions", f"{sum(kept)} of {len(KNOWN)} right")


@pytest.fixture(scope="module")
def long_merged(recipe_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than ten times as many steps, of a row each: a change that is ten times as far from the base."""
    recipe = recipe_of("long", "train.max_steps=120", "train.per_device_train_batch_size=1", "data.max_length=64")
    output = tmp_path_factory.mktemp("long") / "merged"
    instructft.merge_adapter(instructft.train(recipe, console=QUIET).output_dir, output, console=QUIET)
    return output


@pytest.mark.parametrize(
    ("which", "what"),
    [
        ("merged", "merged"),
        pytest.param(
            "long_merged",
            "merged, 120 steps",
            marks=pytest.mark.skipif(not BATTERY, reason="four minutes: INSTRUCTFT_KILLS=17, as in make battery"),
        ),
    ],
)
def test_the_merge_is_proved_and_keeps_what_was_learned(
    which: str, what: str, note: Any, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))["merge"]
    proof = facts["proof"]
    assert facts["dtype"] == "bfloat16"
    assert facts["rounding"] == "stochastic"
    assert proof["weights"]["deviation"] < 1e-12
    assert proof["weights"]["applied"] == pytest.approx(1, abs=0.01)
    assert proof["exact"] <= proof["tolerance"]
    note(what, "what the adapter does to its base", f"KL {proof['effect_kl']:.1e}")
    costs = noted_costs(proof, what, note)
    # the longer it trained, the less rounds away
    most = costs["bfloat16", "nearest"]["kl"] / (3 if which == "merged" else 1)
    assert costs["bfloat16", "stochastic"]["kl"] < most
    off = differs_in_plain_transformers(folder)
    note(what, "in plain transformers: logits of 64 tokens", f"largest difference {off:.1g}")
    assert off == 0


def test_a_chat_of_three_turns(tuned: Path, note: Any) -> None:
    """Each answer is made with the turns before it, and is what `generate` makes of the whole conversation."""
    chat = instructft.Chat(str(tuned), max_new_tokens=24)
    asked = ["What is the capital of France?", "And what is the capital of Italy?", "Name both cities again."]
    answers = [chat.send(question) for question in asked]
    for turn, (question, answer) in enumerate(zip(asked, answers, strict=True), 1):
        note("a chat of three turns", f"{turn}. {question}", " ".join(answer.split()).replace("|", "/"))
    assert "Paris" in answers[0]
    assert "Rome" in answers[1]
    assert [m["content"] for m in chat.messages][::2] == asked
    whole = instructft.generate(chat.generator, [chat.messages[:-1]], max_new_tokens=24)
    assert whole == answers[-1:]
