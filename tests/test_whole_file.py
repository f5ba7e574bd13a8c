"""Tests of `instructft.whole_file`: the old text or the new one, and never another file's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from instructft.whole_file import read_whole, write_whole


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    for name in ("file", ".file.part"):  # the file's own name, and that of its draft
        os.symlink(theirs, tmp_path / name)
    write_whole(tmp_path / "file", "ours", sync=True)
    assert theirs.read_text() == "precious"
    assert (tmp_path / "file").read_text() == "ours"
    assert not (tmp_path / "file").is_symlink()


def test_what_fails_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    """A link to a device, a pipe that nobody writes to, and what would not fit."""
    os.symlink("/dev/zero", tmp_path / "device")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "text").write_text("\ufeffyes", encoding="utf-8")
    os.symlink("text", tmp_path / "link")
    assert read_whole(tmp_path / "link", "utf-8-sig") == "yes"
    for name in ("device", "pipe"):
        with pytest.raises(OSError, match="found a device or a pipe, expected a file"):
            read_whole(tmp_path / name)
    with pytest.raises(OSError, match="it has 1,099,511,627,776 bytes, expected at most 67,108,864"):
        read_whole(tmp_path / "large")
    with pytest.raises(IsADirectoryError):
        read_whole(tmp_path)
