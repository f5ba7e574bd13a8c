"""Which keys of a recipe are fixed for the life of a run, and which may change when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import instructft
from instructft.checkpoints.manifest import Checkpoint
from instructft.checkpoints.resume import RunStart, fixed_keys, identity, refuse_changes
from instructft.errors import ResumeError


def test_of_the_data_loader_only_speed_may_change(write_recipe: Callable[..., Path]) -> None:
    """Each field by name, so that one that comes with an upgrade is fixed until somebody has looked at it."""
    from trl import SFTConfig

    free = {"num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context"}
    names = {f.name.removeprefix("dataloader_") for f in fields(SFTConfig) if f.name.startswith("dataloader_")}
    assert {*free, "drop_last"} <= names
    values = {"num_workers": 1, "prefetch_factor": 2, "multiprocessing_context": "spawn"}
    overrides = [f"train.dataloader_{name}={str(values.get(name, True)).lower()}" for name in names]
    recipe = instructft.load_recipe(write_recipe(), overrides)
    fixed = {key.removeprefix("train.dataloader_") for key in fixed_keys(recipe) if "dataloader_" in key}
    assert fixed == names - free


@pytest.mark.parametrize(
    ("bf16", "fp16", "precision"),
    [(True, False, "bfloat16"), (False, True, "float16"), (False, False, "as the weights")],
)
def test_precision_and_device_are_part_of_a_run_where_the_machine_decides_them(
    write_recipe: Callable[..., Path], bf16: bool, fp16: bool, precision: str
) -> None:
    """The recipe says neither; on another machine either would give other bits."""
    recipe = instructft.load_recipe(write_recipe())
    known: Any = SimpleNamespace(chat_template="{{ messages }}", name=None)
    made = {}
    for device in ("cpu", "cuda"):
        args: Any = SimpleNamespace(
            world_size=1, bf16=bf16, fp16=fp16, device=SimpleNamespace(type=device), train_sampling_strategy="random"
        )
        made[device] = identity(recipe, known, "f", known, args)
    assert made["cpu"]["precision"] == precision
    with pytest.raises(ResumeError, match=r'device: "cpu" when checkpoint-3 was written, now "cuda"'):
        refuse_changes(Checkpoint(Path("run/checkpoint-3"), 3, made["cpu"], {}), made["cuda"])


def test_a_template_that_has_changed_at_its_source_is_told(write_recipe: Callable[..., Path]) -> None:
    recipe = instructft.load_recipe(write_recipe())
    args: Any = SimpleNamespace(
        world_size=1, bf16=False, fp16=False, device=SimpleNamespace(type="cpu"), train_sampling_strategy="random"
    )
    then, now = (
        identity(recipe, SimpleNamespace(chat_template=text), "f", SimpleNamespace(name=None), args)  # type: ignore[arg-type]
        for text in ("{{ messages }}", "{{ messages[0] }}")
    )
    with pytest.raises(
        ResumeError, match=r"data.template \(its text\): .* it has changed at its source since: model\."
    ):
        refuse_changes(Checkpoint(Path("run/checkpoint-3"), 3, then, {}), now)


def test_a_checkpoint_of_an_older_version_is_resumed() -> None:
    """It does not hold `dataloader_drop_last`, which was free then, and false unless someone had set it."""
    old = Checkpoint(Path("run/checkpoint-3"), 3, {"train.seed": 42}, {})
    later = {"train.dataloader_drop_last": False, "precision": "bfloat16", "device": "cuda"}
    assert refuse_changes(old, {"train.seed": 42, **later}) == {}
    with pytest.raises(ResumeError, match=r"train.dataloader_drop_last: false when checkpoint-3 was written, now true"):
        refuse_changes(old, {"train.seed": 42, "train.dataloader_drop_last": True})


def test_how_blocks_are_computed_may_change() -> None:
    """Also where a checkpoint of an older version holds it as fixed."""
    old = Checkpoint(Path("run/checkpoint-3"), 3, {"train.seed": 42, "train.torch_compile": False}, {})
    later = ("train.fp8", "train.float32_copies", "train.deterministic")
    assert refuse_changes(old, {"train.seed": 42, **dict.fromkeys(later, False)}) == {}
    for key in later:
        with pytest.raises(ResumeError, match=rf"{key}: false when checkpoint-3 was written, now true"):
            refuse_changes(old, {"train.seed": 42, key: True})


@pytest.mark.parametrize(
    ("device", "deterministic", "exact"), [("cpu", False, True), ("cuda", False, False), ("cuda", True, True)]
)
def test_only_where_results_never_vary_is_a_resumed_run_said_to_be_exact(
    device: str, deterministic: bool, exact: bool
) -> None:
    start = RunStart(
        {"device": device, "train.deterministic": deterministic}, Checkpoint(Path("run/checkpoint-3"), 3, {}, {})
    )
    assert any("but for rounding; train.deterministic=true" in line for line in start.lines()) is not exact
    assert start.record({})[0]["exact"] is exact
