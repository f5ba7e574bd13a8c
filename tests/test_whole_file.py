"""Tests of `instructft.whole_file`: the old text or the new one, and never another file's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from instructft.whole_file import write_whole


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
