"""A checkpoint from elsewhere runs no code as it is resumed from, whatever its manifest says."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from instructft.checkpoints import pickles
from instructft.checkpoints.manifest import seal, verify
from instructft.checkpoints.resume import find
from instructft.errors import CheckpointError, ResumeError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHARDS = "pytorch_model_fsdp_0"
OPTIMIZER = "optimizer_0"


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(autouse=True)
def as_at_the_start() -> Iterator[None]:
    yield
    pickles.trust(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed checkpoint in shards, as FSDP2 leaves it."""
    folder = tmp_path / "run" / "checkpoint-4"
    folder.mkdir(parents=True)
    save(folder / SHARDS, {"model": {"weight": torch.arange(6.0).reshape(2, 3)}})
    state = {"step": torch.tensor(4.0), "exp_avg": torch.ones(2, 3, dtype=torch.bfloat16)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.99), "fused": None, "params": ["weight"]}]
    save(folder / OPTIMIZER, {"optimizer": {"state": {"weight": state}, "param_groups": groups}})
    for name in ("scheduler.pt", "trainer_state.json", "rng_state.pth", "progress_0.json"):
        (folder / name).write_bytes(b"{}")
    seal(folder, {}, {})
    return folder


def save(place: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=str(place), no_dist=True)


def table(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Put a changed table of contents into the optimizer's shards, under a manifest that fits."""
    path = folder / OPTIMIZER / ".metadata"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(content) or content))
    reseal(folder)


def reseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    seal(folder, {}, {})


def value(folder: Path, content: bytes) -> None:
    """Put a value that is no tensor into the optimizer's shards."""

    def change(content_of: Metadata) -> None:
        shard = folder / OPTIMIZER / "__0_0.distcp"
        offset = shard.stat().st_size
        with shard.open("ab") as file:
            file.write(content)
        for index, stored in content_of.storage_data.items():
            if index.fqn.endswith("lr"):
                stored.offset, stored.length = offset, len(content)

    table(folder, change)


def saved(what: Any) -> bytes:
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


def test_a_true_checkpoint_in_shards_verifies(folder: Path) -> None:
    assert verify(folder, foreign=True).step == 4


def in_the_table(folder: Path, marker: Path) -> None:
    table(folder, lambda _: Code(marker))


def inside_the_table(folder: Path, marker: Path) -> None:
    table(folder, lambda content: setattr(content, "planner_data", {"a": Code(marker)}))


def by_a_dotted_name(folder: Path, marker: Path) -> None:
    """`torch` alone is on the list with some names; a name with a dot reaches further in protocol 4."""
    path = folder / OPTIMIZER / ".metadata"
    text = str(marker).encode()
    path.write_bytes(
        b"\x80\x04\x8c\x05torch\x8c\x16serialization.os.mkdir\x93\x8c" + bytes([len(text)]) + text + b"\x85R."
    )
    reseal(folder)


def in_a_value(folder: Path, marker: Path) -> None:
    value(folder, saved({"lr": Code(marker)}))


def in_a_value_of_the_old_form(folder: Path, marker: Path) -> None:
    value(folder, pickle.dumps(Code(marker), protocol=2))


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (in_the_table, r"\.metadata: it names (posix|nt)\.mkdir, which no such file does"),
        (inside_the_table, r"\.metadata: it names (posix|nt)\.mkdir"),
        (by_a_dotted_name, r"\.metadata: it names torch\.serialization\.os\.mkdir"),
        (in_a_value, r"__0_0\.distcp: the value optimizer\.param_groups\.0\.lr is not plain"),
        (in_a_value_of_the_old_form, r"the value optimizer\.param_groups\.0\.lr is not plain"),
    ],
)
def test_code_in_shards_is_refused_unread(folder: Path, tmp_path: Path, attack: Any, said: str) -> None:
    marker = tmp_path / "ran"
    attack(folder, marker)
    with pytest.raises(CheckpointError, match=said):
        verify(folder)
    with pytest.raises(ResumeError, match=said):
        find(folder.parent, "checkpoint-4")
    assert not marker.exists()


def test_the_attack_is_one(folder: Path, tmp_path: Path) -> None:
    """Read as torch reads it, the table of contents runs its code."""
    in_the_table(folder, tmp_path / "ran")
    pickle.loads((folder / OPTIMIZER / ".metadata").read_bytes())
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    ("place", "said"),
    [("../../outside", "names ../../outside, which is no file"), ("__9_9.distcp", "names __9_9.distcp")],
)
def test_a_table_that_leaves_its_checkpoint_is_refused(folder: Path, place: str, said: str) -> None:
    (folder.parent.parent / "outside").write_bytes(b"x")

    def change(content: Metadata) -> None:
        next(iter(content.storage_data.values())).relative_path = place

    table(folder, change)
    with pytest.raises(CheckpointError, match=said):
        verify(folder)


def test_a_damaged_table_is_named(folder: Path) -> None:
    path = folder / OPTIMIZER / ".metadata"
    path.write_bytes(path.read_bytes()[:200])
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"optimizer_0/\.metadata could not be read: "):
        verify(folder)


def test_states_of_deepspeed_are_read_where_they_were_written_or_by_a_flag(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "global_step4").mkdir()
    (folder / "global_step4" / "mp_rank_00_model_states.pt").write_bytes(zipfile.ZipFile.__name__.encode())
    reseal(folder)
    assert verify(folder).step == 4
    with pytest.raises(CheckpointError, match=r"model_states\.pt is a state of DeepSpeed.*--trust-checkpoint"):
        verify(folder, foreign=True)
    if hasattr(os, "getuid"):
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        with pytest.raises(CheckpointError, match="was not written by you on this machine"):
            verify(folder)
    pickles.trust()
    assert verify(folder, foreign=True).step == 4
