"""Files of every kind are read, none of their code is run, and what is no checkpoint is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import UsageError
from tests.helpers.gpt2_kin import NanoGPT, args, convert, gap, shaken


def test_the_old_file_format(tmp_path: Path, save: Any) -> None:
    model = shaken(NanoGPT())
    state = {"model": model.state_dict(), "model_args": args()}
    convert(save(state, _use_new_zipfile_serialization=False), tmp_path / "out")
    assert gap(model, tmp_path / "out") < 1e-5


class Code:
    """What a file must not do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"model": NanoGPT().state_dict(), "model_args": args(), "extra": Code()}
    with pytest.raises(UsageError, match=r"more than tensors and numbers \(\w+\.mkdir\).*was not loaded"):
        convert(save(state, _use_new_zipfile_serialization=zipped), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_other_files_are_refused(tmp_path: Path, save: Any) -> None:
    whole = save({"model": NanoGPT().state_dict(), "model_args": args()}, "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    (tmp_path / "empty.pt").write_bytes(b"")
    cases = {
        "cut.pt": "cut short",
        "text.pt": "no file of torch.save",
        "empty.pt": "no file of torch.save",
        "none.pt": "there is no file",
        ".": "is a folder",
    }
    for name, message in cases.items():
        with pytest.raises(UsageError, match=message):
            convert(tmp_path / name, tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds step, note, expected a state dict"):
        convert(save({"step": 1, "note": "x"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_whose_sums_differ_is_refused(tmp_path: Path, save: Any) -> None:
    """torch reads zeros in the middle of a weight without a word."""
    path = save({"model": NanoGPT().state_dict(), "model_args": args()})
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"is damaged: .*data/\d+ in it is not what was written \(its sum differs\)"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
