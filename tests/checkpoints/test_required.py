"""What a checkpoint must hold: each part by itself, as each kind of run writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instructft.checkpoints import manifest
from instructft.checkpoints.manifest import MANIFEST, begin, manifest_text, seal, verify
from instructft.checkpoints.required import missing
from instructft.errors import CheckpointError

ONE = {
    "model.safetensors": "weights",
    "optimizer.pt": "the optimizer's state",
    "scheduler.pt": "the schedule's state",
    "rng_state.pth": "random states",
    "trainer_state.json": "the trainer's state",
    "progress_0.json": "progress",
}
TWO = {"rng_state_0.pth", "rng_state_1.pth", "progress_0.json", "progress_1.json", "trainer_state.json"}


@pytest.mark.parametrize("name", ONE)
def test_each_part_is_demanded_when_it_is_written_and_when_it_is_read(tmp_path: Path, name: str) -> None:
    """By name in the manifest, so that one written without a part does not verify because nothing in it differs."""
    assert missing(ONE, 1) == []
    folder = tmp_path / "checkpoint-3"
    begin(folder)
    for file in ONE:
        (folder / file).write_bytes(b"{}")
    seal(folder, {}, {})
    assert verify(folder).step == 3
    known = json.loads((folder / MANIFEST).read_text())["manifest"]
    del known["files"][name]
    (folder / MANIFEST).write_text(manifest_text(known))
    with pytest.raises(CheckpointError, match=f"it lacks {ONE[name]}, so no run could resume"):
        verify(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"it lacks {ONE[name]}"):
        seal(folder, {}, {})


@pytest.mark.parametrize(
    "shards",
    [
        {"model-00001-of-00002.safetensors", "optimizer.bin", "scheduler.pt"},
        {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt"},
        {"pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "scheduler.pt"},
        {"global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"},
    ],
)
def test_several_processes_and_shards(shards: set[str]) -> None:
    assert missing(shards | TWO, 2) == []
    assert missing(shards | TWO - {"rng_state_1.pth"}, 2) == ["random states of process 1"]


def test_machines_without_a_shared_folder_are_told_so(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for file in {*ONE, "rng_state_0.pth"} - {"rng_state.pth"}:
        (folder / file).write_bytes(b"{}")
    with pytest.raises(
        CheckpointError, match=r"random states of process 1, progress of process 1.*one shared output_dir"
    ):
        seal(folder, {"processes": 2}, {})
    assert manifest.kind(folder) != "sealed"
