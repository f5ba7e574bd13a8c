"""Whole runs with compiled blocks: eager's losses, also over a resume; one graph; evaluation and samples left alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

import instructft
from instructft.errors import UsageError

# Packs of one width in sdpa: the shape is fixed, as that of flat packs is. `aot_eager` needs no C++ compiler.
PACKS = (
    "data.packing=true", "train.pad_to_multiple_of=128", "train.per_device_train_batch_size=2", "train.eval_steps=2",
    "train.save_steps=2", "samples=[Hello]", "train.torch_compile_backend=aot_eager", "train.report_to=none",
)  # fmt: skip


def trained(path: Path, folder: Path, *overrides: str, resume: str = "auto") -> tuple[Any, list[float], str]:
    printed = io.StringIO()
    recipe = instructft.load_recipe(path, [*PACKS, f"output_dir={folder}", *overrides])
    result = instructft.train(recipe, console=Console(file=printed, width=200), resume=resume)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, [line["loss"] for line in lines if "loss" in line], printed.getvalue()


FULL, LORA = pytest.param((), id="full", marks=pytest.mark.battery), ("adapter.type=lora", "adapter.dropout=0.0")


# all weights: under checkpointing below, whose losses are held against eager's too
@pytest.mark.parametrize("adapter", [FULL, pytest.param(LORA, id="LoRA")])
def test_the_losses_of_an_eager_run(
    write_recipe: Callable[..., Path], moved_run: Path, tmp_path: Path, adapter: tuple[str, ...]
) -> None:
    path = write_recipe()
    if adapter:
        adapter = (f"model={{name_or_path: {moved_run}}}", *adapter)
    _, expected, _ = trained(path, tmp_path / "eager", "train.torch_compile=false", *adapter)
    result, found, printed = trained(path, tmp_path / "compiled", "train.torch_compile=true", *adapter)
    assert found == pytest.approx(expected, abs=1e-5)
    facts = result.facts["torch_compile"]
    assert (facts["blocks"], facts["of"], facts["graphs"]) == (2, 2, 1 + bool(adapter))
    assert "blocks are compiled: train.torch_compile is true" in printed
    assert "2 of 2 blocks compiled in" in printed
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    names = [set(load_file(tmp_path / run / weights)) for run in ("eager", "compiled")]
    assert names[0] == names[1]


def test_a_resumed_run_goes_on_to_the_same_bits(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe()
    options = ("train.torch_compile=true", "train.lr_scheduler_type=constant")
    trained(path, tmp_path / "whole", *options)
    trained(path, tmp_path / "part", *options, "train.max_steps=2")
    _, _, printed = trained(path, tmp_path / "part", *options)
    assert "resuming from" in printed
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("part", "whole"))
    assert all(bool((found[name] == expected[name]).all()) for name in expected)


def test_gradient_checkpointing(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path, checkpointing = write_recipe(), "train.gradient_checkpointing=true"
    _, expected, _ = trained(path, tmp_path / "eager", "train.torch_compile=false", checkpointing)
    result, found, _ = trained(path, tmp_path / "compiled", "train.torch_compile=true", checkpointing)
    assert found == pytest.approx(expected, abs=1e-5)
    assert result.facts["torch_compile"]["blocks"] == 2


def test_auto_leaves_a_cpu_alone_and_says_nothing(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    result, _, printed = trained(write_recipe(), tmp_path / "run")
    assert result.facts["torch_compile"] is None
    assert "compiled" not in printed


def test_the_whole_model_is_not_compiled_too(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    with pytest.raises(UsageError, match=r"dynamo_backend.*train\.torch_compile=true"):
        trained(write_recipe(), tmp_path / "run")


CHECKPOINTING = ("train.gradient_checkpointing=true",)


@pytest.mark.parametrize(
    "more", [pytest.param((), id="plain"), pytest.param(CHECKPOINTING, id="checkpointing", marks=pytest.mark.battery)]
)
def test_packs_by_their_borders_make_one_graph(
    write_recipe: Callable[..., Path], tmp_path: Path, more: tuple[str, ...]
) -> None:
    """As on a GPU: flat packs of a fixed shape, whose documents differ from step to step."""
    path = write_recipe()
    none = "n_positions: 128, attn_pdrop: 0.0, resid_pdrop: 0.0, embd_pdrop: 0.0"
    path.write_text(path.read_text().replace("n_positions: 128", none))
    options = (
        "model.attn_implementation=varlen",
        "train.max_steps=12",
        "train.eval_steps=6",
        "train.save_steps=6",
        *more,
    )
    _, expected, _ = trained(path, tmp_path / "eager", "train.torch_compile=false", *options)
    result, found, _ = trained(path, tmp_path / "compiled", "train.torch_compile=true", *options)
    assert found == pytest.approx(expected, abs=1e-5)
    assert (result.facts["torch_compile"]["blocks"], result.facts["torch_compile"]["graphs"]) == (2, 1)
