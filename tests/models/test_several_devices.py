"""Time on several devices, beside published runs of torchtune on 8 H100 (its README, Llama 3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructft.check.report import check
from instructft.models.several_devices import CARDS, bytes_between, on_paper
from instructft.recipe.load import load_recipe

LLAMA_8B, LLAMA_70B, ADAPTER_70B = 8_030_261_248, 70_553_706_496, 200_000_000


def needs(parameters: int, trainable: int, devices: int = 8, tokens: int = 65_536, batches: int = 1) -> dict[str, Any]:
    schedule = {"processes": devices, "gradient_accumulation_steps": batches, "tokens_per_step": tokens, "steps": 100}
    return {"parameters": {"all": parameters, "trainable": trainable}, "schedule": schedule}


@pytest.mark.parametrize(
    ("parameters", "trainable", "published"),
    [(LLAMA_8B, LLAMA_8B, 5762), (LLAMA_8B, LLAMA_8B, 6667), (LLAMA_70B, ADAPTER_70B, 1092)],
)
def test_published_speeds_are_within_a_tenth(parameters: int, trainable: int, published: int) -> None:
    found = on_paper(needs(parameters, trainable), "fsdp2")
    assert found["tokens_per_second_per_device"] == pytest.approx(published, rel=0.1)
    assert found["communicating_seconds"] < found["computing_seconds"]
    assert found["seconds"] == pytest.approx(65_536 / 8 / found["tokens_per_second_per_device"] * 100)


def test_one_device_talks_to_nobody() -> None:
    alone = on_paper(needs(LLAMA_8B, LLAMA_8B, devices=1), "ddp")
    assert alone["bytes_between_devices"] == alone["communicating_seconds"] == 0


def test_small_steps_wait_for_the_weights() -> None:
    """Of few tokens between two machines, the network decides."""
    found = on_paper(needs(LLAMA_70B, ADAPTER_70B, devices=16, tokens=4096), "fsdp2")
    assert found["communicating_seconds"] > found["computing_seconds"]
    assert found["step_seconds"] == found["communicating_seconds"]
    inside = on_paper(needs(LLAMA_70B, ADAPTER_70B, devices=8, tokens=4096), "fsdp2")
    assert inside["communicating_seconds"] < found["communicating_seconds"] / 5


def test_what_each_strategy_moves() -> None:
    full, adapter = {"all": 100, "trainable": 100}, {"all": 100, "trainable": 1}
    assert [bytes_between(full, name, 4, 2) for name in ("ddp", "zero2", "fsdp2", "zero3")] == [800, 1800, 3200, 3200]
    assert [bytes_between(adapter, name, 1, 2) for name in ("ddp", "zero2", "fsdp2")] == [8, 6, 404]


def test_it_stands_in_the_report(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(), ["train.use_cpu=false"])
    report = check(recipe, device="cuda", processes=4, strategy="fsdp2", card="a100")["estimate"]
    assert report["precision"].startswith("bfloat16 autocast")
    assert report["schedule"]["processes"] == 4
    assert report["paper"] == on_paper(report, "fsdp2", "a100")
    assert report["paper"]["operations"] == pytest.approx(
        6 * report["parameters"]["all"] * report["schedule"]["tokens_per_step"] / 4
    )
    assert set(CARDS) == {"h100", "h200", "a100"}
