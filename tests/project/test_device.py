"""What `INSTRUCTFT_TEST_DEVICE=cuda` makes of recipes and tensors, shown without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml

from tests.conftest import TINY
from tests.helpers import device


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(device, "ON_GPU", request.param)
    return bool(request.param)


@pytest.mark.parametrize(
    "text", [TINY, "train: {max_steps: 2, use_cpu: true}", "train: {use_cpu: true,\n  save_steps: 1}"]
)
def test_a_recipe_trains_where_the_tests_are_and_in_float32(text: str, gpu: bool) -> None:
    train = yaml.safe_load(device.here(text))["train"]
    assert train["use_cpu"] is not gpu
    assert train.get("bf16") is (False if gpu else None)
    assert {k: v for k, v in train.items() if k not in ("use_cpu", "bf16")} == {
        k: v for k, v in yaml.safe_load(text)["train"].items() if k != "use_cpu"
    }


def test_overrides_and_tolerances(gpu: bool) -> None:
    assert device.in_float32("adapter.r=2") == (("model.dtype=float32", "adapter.r=2") if gpu else ("adapter.r=2",))
    assert device.near(1e-6) == (2e-4 if gpu else 1e-6)
    assert device.near(1e-2) == 1e-2


def test_tensors_follow_the_model() -> None:
    model = SimpleNamespace(device=torch.device("meta"))
    moved = device.on(model, {"input_ids": torch.ones(2), "nested": {"mask": torch.ones(1)}, "max_length_q": 7})
    assert moved["input_ids"].device.type == moved["nested"]["mask"].device.type == "meta"
    assert moved["max_length_q"] == 7
    assert device.on(model, torch.ones(2)).device.type == "meta"
