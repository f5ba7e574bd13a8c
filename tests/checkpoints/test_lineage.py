"""One line of checkpoints a run: what a resume from an older one leaves behind is kept, and no longer counted."""

from __future__ import annotations

import json
from pathlib import Path

from instructft.checkpoints.lineage import retain, set_aside
from instructft.checkpoints.manifest import folders, newest, verify
from tests.checkpoints.test_manifest import make


def names(folder: Path) -> list[str]:
    return [path.name for path in folders(folder)]


def test_those_above_are_set_aside_whole(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        make(tmp_path, step)
    make(tmp_path, 20, sealed=False)
    place, moved = set_aside(tmp_path, 8)
    assert (place, moved) == (tmp_path / "set-aside-1", ["checkpoint-12", "checkpoint-16"])
    assert [verify(path).step for path in folders(tmp_path / "set-aside-1")] == [16, 12]
    found, _ = newest(tmp_path)
    assert found
    assert found.step == 8
    assert set_aside(tmp_path, 8) == (None, [])
    make(tmp_path, 12)
    assert set_aside(tmp_path, 4) == (tmp_path / "set-aside-2", ["checkpoint-8", "checkpoint-12"])
    assert names(tmp_path / "set-aside-1") == ["checkpoint-16", "checkpoint-12"]


def test_the_end_of_the_run_that_was_left_is_set_aside_too(tmp_path: Path) -> None:
    """Else the new one would pass for finished where the other was."""
    for step in (4, 8):
        make(tmp_path, step)
    (tmp_path / "run.json").write_text(json.dumps({"train": {"steps": 8}}))
    assert set_aside(tmp_path, 8) == (None, [])
    place, _ = set_aside(tmp_path, 4)
    assert place
    assert (place / "run.json").is_file()
    assert not (tmp_path / "run.json").exists()


def test_retention_neither_counts_nor_deletes_what_is_above_the_last_one(tmp_path: Path) -> None:
    for step in (4, 6, 8, 12, 16):
        make(tmp_path, step)
    assert retain(tmp_path, 1, newest=8) == ["checkpoint-6", "checkpoint-4"]
    assert names(tmp_path) == ["checkpoint-16", "checkpoint-12", "checkpoint-8"]
