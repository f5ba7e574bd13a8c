"""What a run leaves is on the disk before it has the name by which it is known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from instructft.training.outcome import _give_names, _write_facts


def test_files_and_folders_are_on_disk_around_each_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes before the name, and the names of the model before those of `run.json`."""
    run, partial = tmp_path / "run", tmp_path / "run" / "final.partial"
    partial.mkdir(parents=True)
    events: list[tuple[str, str]] = []
    known: dict[int, str] = {run.stat().st_ino: "run", partial.stat().st_ino: "final.partial"}
    for name in ("config.json", "model.safetensors"):
        (partial / name).write_bytes(b"x")
        known[(partial / name).stat().st_ino] = name
    fsync, replace = os.fsync, Path.replace

    def noted_sync(handle: int) -> None:
        events.append(("disk", known.get(os.fstat(handle).st_ino, "run.json")))
        fsync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    _give_names(partial, run)
    _write_facts(run, {"train": {}})
    assert sorted(events[:3]) == [("disk", "config.json"), ("disk", "final.partial"), ("disk", "model.safetensors")]
    assert events[3:] == [
        ("name", "model.safetensors"), ("name", "config.json"), ("disk", "run"),
        ("disk", "run.json"), ("name", "run.json"), ("disk", "run"),
    ]  # fmt: skip
