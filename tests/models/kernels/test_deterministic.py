"""Deterministic kernels: torch is held to them inside, left as it was outside, and what has none is named."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import instructft
from instructft.errors import ModelError
from instructft.models.kernels.deterministic import deterministic


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    fill = torch.utils.deterministic.fill_uninitialized_memory
    asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return (*asked, fill, cudnn.deterministic, cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))


def test_on_inside_and_as_it_was_outside() -> None:
    before = settings()
    with deterministic():
        assert settings() == (True, False, False, True, False, ":4096:8")
    assert settings() == before
    with pytest.raises(KeyError), deterministic():
        raise KeyError
    assert settings() == before


def test_what_the_person_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_such_a_kernel_is_named() -> None:
    says = r"train\.deterministic: some_op_cuda has no kernel .*train\.use_cpu=true"
    with pytest.raises(ModelError, match=says), deterministic():
        raise RuntimeError("some_op_cuda does not have a deterministic implementation, but you set 'torch.use_…'")
    with pytest.raises(RuntimeError, match="out of memory"), deterministic():
        raise RuntimeError("out of memory")


def test_a_run_is_held_to_it_and_says_what_it_costs(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    backward = torch.Tensor.backward

    def watched(*args: object, **kwargs: object) -> object:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    printed = io.StringIO()
    recipe = instructft.load_recipe(write_recipe(), ["train.deterministic=true", "train.max_steps=2"])
    instructft.train(recipe, console=Console(file=printed, width=200))
    assert len(seen) >= 3
    assert all(seen[1:])  # the first is of the optimizer that is tried on one weight before anything is loaded
    assert "attention's backward pass takes longer" in printed.getvalue()
    assert not torch.are_deterministic_algorithms_enabled()
