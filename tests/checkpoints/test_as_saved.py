"""Weights that are not those that were saved are refused, by their sums, with the file and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructft.checkpoints.as_saved import require_as_saved, sums
from instructft.checkpoints.manifest import Checkpoint, read_manifest, seal
from instructft.checkpoints.resume import RunStart
from instructft.errors import CheckpointError, ModelFileError, ResumeError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-4"):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "config.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "progress_0.json"):
        (run / "checkpoint-4" / name).write_bytes(b"{}")
    seal(run / "checkpoint-4", {}, {"torch": "2.13"})
    facts = {"versions": {"instructft": "1"}, "train": {"steps": 4}, "files": sums(run)}
    (run / "run.json").write_text(json.dumps(facts))
    return run


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def test_what_was_saved_passes_and_configurations_may_be_edited(run: Path) -> None:
    assert sorted(sums(run)) == ["model.safetensors", "tokenizer.json"]
    (run / "config.json").write_text('{"edited": true}')
    require_as_saved(run, whole=True)
    require_as_saved(run / "checkpoint-4", whole=True)
    require_as_saved("org/name", whole=True)


@pytest.mark.parametrize("place", [".", "checkpoint-4"])
@pytest.mark.parametrize(
    ("damage", "said", "at_a_glance"),
    [
        (zeros, r"is not what was saved \(its SHA-256 differs\)", False),
        (lambda path: path.write_bytes(b""), "has 0 bytes, and 256 were saved", True),
        (Path.unlink, "is missing, which was saved with its model", True),
    ],
)
def test_damage_is_named(run: Path, place: str, damage: Callable[[Path], Any], said: str, at_a_glance: bool) -> None:
    damage(run / place / "model.safetensors")
    with pytest.raises(ModelFileError, match=rf"model\.safetensors {said}") as refused:
        require_as_saved(run / place, whole=True)
    assert refused.value.exit_code == 2
    assert ("checkpoint-4 lies beside it" in str(refused.value)) is (place == ".")
    if at_a_glance:
        with pytest.raises(ModelFileError, match=said):
            require_as_saved(run / place, whole=False)
    else:
        require_as_saved(run / place, whole=False)


def finished(run: Path) -> Any:
    return RunStart({}, Checkpoint(run / "checkpoint-4", 4, {}, {})).finished(run)


def test_a_finished_run_without_its_model_is_not_called_finished(run: Path) -> None:
    assert finished(run)["train"]["steps"] == 4
    (run / "model.safetensors").write_bytes(b"")
    with pytest.raises(ResumeError, match=r"is finished, but its model is damaged: .*has 0 bytes.*remove .*run\.json"):
        finished(run)


@pytest.mark.parametrize("text", ['{"versions": {"inst', "[]", '{"train": 3}'])
def test_a_damaged_run_json_is_named_with_the_way_out(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    with pytest.raises(ResumeError, match=r"run\.json is damaged, .*ends the run anew from checkpoint-4"):
        finished(run)


@pytest.mark.parametrize(
    "files", [["model.safetensors"], {"model.safetensors": 5}, {"../a": {"size": 1, "sha256": ""}}, {"a": {}}, None]
)
def test_sums_in_run_json_that_no_run_wrote_are_an_error(run: Path, files: Any) -> None:
    (run / "run.json").write_text(json.dumps({"files": files}))
    with pytest.raises(ModelFileError, match=r"run\.json: files is not what a run writes there") as refused:
        require_as_saved(run, whole=True)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "1"),
        ("format", True),
        ("step", "4"),
        ("identity", 7),
        ("versions", ["torch"]),
        ("versions", {"torch": 2}),
        ("files", ["model.safetensors"]),
        ("files", {"model.safetensors": 5}),
        ("files", {"../model.safetensors": {"size": 1, "sha256": ""}}),
        ("files", {"model.safetensors": {"size": "1", "sha256": ""}}),
    ],
)
def test_a_manifest_that_says_something_else_is_none(run: Path, key: str, value: Any) -> None:
    """Its own hash proves nothing: whoever writes a manifest can hash it."""
    from instructft.checkpoints.manifest import manifest_text

    path = run / "checkpoint-4" / "manifest.json"
    path.write_text(manifest_text({**json.loads(path.read_text())["manifest"], key: value}))
    with pytest.raises(CheckpointError, match=r"manifest\.json is not what was written"):
        read_manifest(run / "checkpoint-4")
    with pytest.raises(ModelFileError, match=r"manifest\.json is not what was written"):
        require_as_saved(run / "checkpoint-4", whole=False)
