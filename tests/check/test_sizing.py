"""Batch, accumulation and checkpointing follow the memory that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instructft.check import sizing
from instructft.recipe.commented import Draft


@pytest.fixture
def draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tiny_model: Any) -> Draft:
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    draft = Draft()
    draft.put("model.name_or_path", "tiny")
    draft.put("data.datasets", [{"name": "quickstart", "rows": 400}])
    draft.put("data.template", "auto")
    draft.put("train.use_cpu", True)
    return draft


def size(draft: Draft, free: float, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    monkeypatch.setattr(sizing, "free_memory", lambda: free)
    sizing.sized(draft, "full", "r", said.append)
    return draft.values["train"], said


def test_memory_decides(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a step takes here, by the number of rows in a batch and whether layers are computed twice
    totals = {
        (8, False): 80,
        (4, False): 50,
        (2, False): 30,
        (8, True): 45,
        (4, True): 40,
        (2, True): 25,
        (1, True): 20,
    }

    def estimate(recipe: Any, *_: Any, **__: Any) -> dict[str, Any]:
        key = (recipe.train["per_device_train_batch_size"], recipe.train["gradient_checkpointing"])
        return {
            "schedule": {"steps_per_epoch": 40},
            "device": "cpu",
            "memory": {"total": totals[key]},
            "parameters": {"all": 10**6},
        }

    monkeypatch.setattr("instructft.models.memory.estimate", estimate)
    monkeypatch.setattr("instructft.data.prepare._saved", lambda *_: (1.0, 0.0))  # no packs
    for free, expected in ((100, (8, 1, False)), (70, (4, 2, False)), (55, (8, 1, True)), (32, (2, 4, True))):
        train, said = size(draft, free, monkeypatch)
        keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
        assert tuple(train[key] for key in keys) == expected, free
        assert not any("does not fit" in line for line in said)
    train, said = size(draft, 10, monkeypatch)
    assert (train["per_device_train_batch_size"], train["gradient_checkpointing"]) == (1, True)
    assert any("does not fit here" in line and "--goal lora" in line for line in said)


def test_packs_are_counted_as_packs(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    train, said = size(draft, 1 << 40, monkeypatch)
    step = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    packed = next(line for line in said if line.startswith("packing"))
    assert "yes, " in packed
    in_all = draft.reasons["train.gradient_accumulation_steps"]
    assert in_all.startswith(
        f"{train['per_device_train_batch_size']} x {train['gradient_accumulation_steps']} = {step} packs"
    )
    assert 15 <= int(in_all.split()[-4]) <= 60
