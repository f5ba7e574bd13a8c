"""Manifests: what is whole verifies, what is damaged in any byte does not, and nothing of others is deleted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from instructft.checkpoints import manifest
from instructft.checkpoints.lineage import retain
from instructft.checkpoints.manifest import MANIFEST, begin, folders, newest, require_space, seal, verify
from instructft.checkpoints.resume import find, refuse_changes
from instructft.errors import CheckpointError, ResumeError

FILES = {
    "model.safetensors": b"w" * 3000, "optimizer.pt": b"o" * 100, "scheduler.pt": b"l", "rng_state.pth": b"r",
    "trainer_state.json": b"{}", "progress_0.json": b"{}", "inner/scaler.pt": b"s",
}  # fmt: skip


def make(run: Path, step: int, sealed: bool = True, **identity: Any) -> Path:
    folder = run / f"checkpoint-{step}"
    begin(folder)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content + str(step).encode())
    if sealed:
        seal(folder, identity, {"torch": "2"})
    return folder


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", [damage_missing, damage_short, damage_bit])
def test_damage_in_any_file_is_found_and_the_one_before_is_taken(tmp_path: Path, name: str, damage: Any) -> None:
    make(tmp_path, 2, seed=1)
    last = make(tmp_path, 10, seed=1)
    found, passed = newest(tmp_path)
    assert found
    assert (found.folder, found.step, dict(found.identity), passed) == (last, 10, {"seed": 1}, [])
    damage(last / name)
    found, passed = newest(tmp_path)
    assert found
    assert (found.step, len(passed)) == (2, 1)
    assert name in passed[0]
    with pytest.raises(ResumeError, match="checkpoint-10"):
        find(tmp_path, str(last))


def test_a_flipped_manifest_never_verifies(tmp_path: Path) -> None:
    """Every single byte of it: it either fails to parse, or no longer agrees with the files."""
    folder = make(tmp_path, 3)
    whole = (folder / MANIFEST).read_bytes()
    silent = []
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        (folder / MANIFEST).write_bytes(content)
        try:
            verify(folder)
        except CheckpointError:
            continue
        silent.append(whole[max(0, place - 12) : place + 12])
    assert not silent


def test_a_save_that_was_cut_short_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 4)
    monkeypatch.undo()
    assert newest(tmp_path)[0] is None
    assert find(tmp_path, "auto") == (
        None,
        [f"{tmp_path}/checkpoint-4: there is no manifest.json; writing it was cut short"],
    )
    make(tmp_path, 4)
    found, _ = newest(tmp_path)
    assert found
    assert found.step == 4


def test_none_that_verifies_stops_the_run(tmp_path: Path) -> None:
    damage_bit(make(tmp_path, 4) / "optimizer.pt")
    with pytest.raises(ResumeError, match=r"none of the checkpoints.*\n.*optimizer.pt is not what was written"):
        find(tmp_path, "auto")
    assert find(tmp_path, "never") == (None, [])


def test_folders_of_others_are_never_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-7"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "checkpoint-best").mkdir()
    for step in (1, 2, 3, 10):
        make(tmp_path, step)
    assert retain(tmp_path, 2, best=str(tmp_path / "checkpoint-1")) == ["checkpoint-2"]
    assert [path.name for path in folders(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-7",
        "checkpoint-3",
        "checkpoint-1",
    ]
    assert retain(tmp_path, None) == []
    with pytest.raises(CheckpointError, match="did not make it"):
        begin(foreign)
    assert (foreign / "model.safetensors").read_bytes() == b"mine"
    for folder in folders(tmp_path):
        if folder != foreign:
            shutil.rmtree(folder)
    with pytest.raises(ResumeError, match="another tool made it"):
        find(tmp_path, "auto")


def test_a_full_disk_is_said_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 4)
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 5 << 20))
    require_space(tmp_path, 4 << 20)
    with pytest.raises(CheckpointError, match=r"needs about 6 MiB, and 5 MiB are free. checkpoint-4 stands"):
        require_space(tmp_path, 6 << 20)


@pytest.mark.parametrize("asked", ["checkpoint-9", "/nowhere/checkpoint-4"])
def test_a_checkpoint_that_is_not_there(tmp_path: Path, asked: str) -> None:
    make(tmp_path, 4)
    with pytest.raises(ResumeError, match=r"no such folder; .* holds checkpoint-4"):
        find(tmp_path, asked)
    found, _ = find(tmp_path, "checkpoint-4")
    assert found
    assert found.step == 4


BASE = {
    "train.seed": 1, "train.lr_scheduler_type": "linear", "train.max_steps": 10, "processes": 1, "data.max_length": 64,
    "data (its rows)": "a1", "precision": "bfloat16", "device": "cuda",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train.seed": 2}, "train.seed: 1 when checkpoint-4 was written, now 2"),
        ({"processes": 2}, "processes: 1 when"),
        ({"data.max_length": 32, "data (its rows)": "b2"}, "data.max_length: 64"),
        ({"data (its rows)": "b2"}, 'data .its rows.: "a1"'),
        ({"train.max_steps": 20}, "it may only grow, and with a schedule"),
        ({"train.max_steps": 5, "train.lr_scheduler_type": "constant"}, "train.max_steps"),
        ({"precision": "float16"}, 'precision: "bfloat16" when checkpoint-4 was written, now "float16"'),
        ({"device": "cpu"}, 'device: "cuda" when checkpoint-4 was written, now "cpu"'),
        ({"train.optim": "sgd"}, "train.optim: null when"),
    ],
)
def test_changes_that_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    found = verify(make(tmp_path, 4, **BASE))
    with pytest.raises(ResumeError, match=said):
        refuse_changes(found, {**BASE, **change})


def test_changes_that_are_allowed(tmp_path: Path) -> None:
    constant = {**BASE, "train.lr_scheduler_type": "constant"}
    found = verify(make(tmp_path, 4, **constant))
    assert refuse_changes(found, constant) == {}
    assert refuse_changes(found, {**constant, "train.max_steps": 20}) == {"train.max_steps": [10, 20]}
    with pytest.raises(ResumeError):
        refuse_changes(found, {**constant, "train.max_steps": 20, "train.warmup_steps": 0.1})


def test_the_manifest_lists_what_is_there(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    manifest = json.loads((folder / MANIFEST).read_text())["manifest"]
    assert set(manifest["files"]) == set(FILES)
    assert manifest["files"]["model.safetensors"]["size"] == 3001
    assert sorted(path.name for path in folder.iterdir()) == sorted({name.split("/")[0] for name in FILES} | {MANIFEST})
