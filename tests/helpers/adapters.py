"""Adapter folders as a test wants them."""

from __future__ import annotations

from pathlib import Path

from instructft.weights.base_record import BaseModelRecord, base_folder, commit_of
from instructft.weights.weight_files import fingerprint


def record_base(
    folder: Path, name: str, vocab_size: int, revision: str | None = None, quantization: str = "none"
) -> None:
    """Write `base.json` as a run in float32 would have done."""
    found = base_folder(name, revision)
    assert found is not None
    about = (commit_of(found), fingerprint(found), vocab_size, quantization)
    BaseModelRecord(name, revision, None, *about).write(folder)
