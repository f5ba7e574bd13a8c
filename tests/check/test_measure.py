"""Which batches are tried, by processes that are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructft.check import measure
from instructft.errors import InstructftError, UsageError
from instructft.recipe.load import load_recipe


@pytest.fixture
def tries(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`measure` on a device that holds so many rows at once, and so many more with checkpointing."""

    def tries(rows: int, batches: int, holds: int, more: int = 0, *overrides: str, device: str = "cuda") -> Any:
        def step(path: str, words: list[str]) -> dict[str, Any]:
            written = dict(word.split("=", 1) for word in words)
            asked = int(written["train.per_device_train_batch_size"])
            checkpointing = written["train.gradient_checkpointing"] == "true"
            assert asked * int(written["train.gradient_accumulation_steps"]) == rows * batches  # the step stays
            assert load_recipe(path, words).train["max_steps"] == 3
            if asked > holds + more * checkpointing:
                return {"fits": False}
            seconds = (1 + checkpointing / 3) * rows * batches / (asked + 4)
            return {"fits": True, "memory": asked << 30, "seconds": seconds, "tokens": rows * batches * 100}

        monkeypatch.setattr(measure, "_in_a_process", step)
        recipe = load_recipe(write_recipe(), [f"train.per_device_train_batch_size={rows}", *overrides])
        return measure.measure(recipe, batches, device, lambda line: None)

    return tries


def sizes(found: dict[str, Any]) -> list[tuple[int, bool]]:
    return [(one["rows"], one["fits"]) for one in found["tries"]]


def test_what_fits_is_made_larger(tries: Any) -> None:
    found = tries(4, 8, 16)
    assert sizes(found) == [(4, True), (16, True), (32, False)]
    assert (found["best"]["rows"], found["best"]["gradient_accumulation_steps"]) == (16, 2)


def test_what_does_not_fit_is_made_smaller_and_checkpointed_last(tries: Any) -> None:
    assert sizes(tries(8, 1, 2)) == [(8, False), (2, True), (4, False)]
    found = tries(8, 1, 0, 4)
    assert sizes(found)[:3] == [(8, False), (2, False), (1, False)]
    assert (found["best"]["rows"], found["best"]["gradient_checkpointing"]) == (4, True)
    assert tries(8, 1, 0)["best"] is None


def test_checkpointing_that_is_not_needed_is_left_out(tries: Any) -> None:
    found = tries(4, 2, 8, 8, "train.gradient_checkpointing=true")
    assert (found["best"]["rows"], found["best"]["gradient_checkpointing"]) == (8, False)


def test_on_a_cpu_other_programs_keep_their_memory(tries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        available = 10 << 30

    monkeypatch.setattr("psutil.virtual_memory", Machine)
    assert sizes(tries(4, 8, 99, device="cpu")) == [(4, True), (8, True)]


def test_a_step_that_fails_for_another_reason_is_told(write_recipe: Callable[..., Path], forked: None) -> None:
    recipe = load_recipe(write_recipe(), ["model.config.n_head=3"])  # 32 is no multiple of it
    with pytest.raises(InstructftError, match="a step of this recipe failed"):
        measure.measure(recipe, 1, "cpu", lambda line: None)


def test_a_stream_is_refused(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Hi", "output": "Hello"}\n')
    streamed = [
        f"data.datasets=[{{path: {tmp_path / 'rows.jsonl'}, streaming: true}}]",
        "data.splits={validation: 0, test: 0}",
    ]
    with pytest.raises(UsageError, match="a stream does not tell"):
        measure.measure(load_recipe(write_recipe(), streamed), 1, "cpu", lambda line: None)
