"""What may change when a run resumes, and what must stay as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from trl import SFTConfig

import instructft
from instructft.checkpoints.manifest import Checkpoint
from instructft.checkpoints.resume import fixed_keys, refuse_changes
from instructft.errors import ResumeError

# Of the loader of data these change how fast rows come, and nothing that is trained.
HARMLESS = {"dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"}
HARMLESS |= {"dataloader_prefetch_factor", "dataloader_multiprocessing_context"}


def made_of(write_recipe: Callable[..., Path], *overrides: str) -> dict[str, object]:
    return fixed_keys(instructft.load_recipe(write_recipe(), list(overrides)))


def checkpoint(then: dict[str, object]) -> Checkpoint:
    return Checkpoint(Path("runs/a/checkpoint-2"), 2, then, {})


def test_a_last_batch_that_is_dropped_is_fixed_for_a_runs_life(write_recipe: Callable[..., Path]) -> None:
    then = made_of(write_recipe, "train.dataloader_drop_last=true")
    with pytest.raises(ResumeError, match=r"train\.dataloader_drop_last: true when checkpoint-2 was written, now"):
        refuse_changes(checkpoint(then), made_of(write_recipe))


def test_how_fast_rows_come_may_change(write_recipe: Callable[..., Path]) -> None:
    then = made_of(write_recipe)
    now = made_of(write_recipe, "train.dataloader_num_workers=2", "train.dataloader_pin_memory=false")
    assert refuse_changes(checkpoint(then), now) == {}


def test_each_field_of_the_loader_is_known_to_be_harmless_or_fixed(write_recipe: Callable[..., Path]) -> None:
    """A field that an upgrade brings is fixed until somebody has looked at it."""
    fields = {name for name in SFTConfig.__dataclass_fields__ if name.startswith("dataloader_")}
    assert fields > HARMLESS
    fixed = made_of(write_recipe, *(f"train.{name}=true" for name in fields - HARMLESS))
    assert {name for name in fields if f"train.{name}" in fixed} == fields - HARMLESS
