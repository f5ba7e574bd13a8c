"""The id of a row, by what it says; and the list of ids that `data.exclude` leaves out of training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from instructft.errors import DataError
from instructft.whole_file import read_whole

_ID = re.compile(r"[0-9a-f]{16}")


def row_id(row: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that a row is known by: the same in every type of file, in any place of it, under every
    template and tokenizer. Two rows that say the same have one id.

    >>> row_id({"prompt": "Hi", "completion": "Hello"}) == row_id({"completion": "Hello", "prompt": "Hi"})
    True
    """
    return blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass
class Excluded:
    """The rows that a recipe leaves out, and which of them were met.

    Args:
        ids: of rows, `row_id`.
        file: where they are listed, for messages.
    """

    ids: frozenset[str] = frozenset()
    file: str = ""
    met: set[str] = field(default_factory=set)

    def among(self, found: Sequence[str]) -> np.ndarray:
        """Which of the rows with these ids are left out: (rows,) bool."""
        self.met.update(self.ids.intersection(found))
        return np.array([one in self.ids for one in found], dtype=bool)

    def unmatched(self) -> str:
        """What to say of ids that no training row has; "" where all were met."""
        missing = sorted(self.ids - self.met)
        if not missing:
            return ""
        listed = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        return f"{len(missing):,} of the {len(self.ids):,} ids in {self.file} match no training row: {listed}"


def read_excluded(path: str | None) -> Excluded:
    """The ids of a file, one at the start of each line; what follows it on a line is for people, and so are lines that
    begin with `#`.

    Raises:
        DataError: it cannot be read, or a line begins with something else; with its number.
    """
    if path is None:
        return Excluded()
    file = Path(path).expanduser()
    try:
        lines = read_whole(file, "utf-8-sig", most=1 << 30).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.exclude: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    found = set()
    for number, line in enumerate(lines, 1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        if not _ID.fullmatch(words[0].lower()):
            raise DataError(
                f"data.exclude: {path}, line {number}: found {words[0][:40]!r}, expected a row id of 16 hexadecimal "
                "digits, as `instructft rows RUN --exclude FILE` writes them"
            )
        found.add(words[0].lower())
    if not found:
        raise DataError(f"data.exclude: {path} holds no row id; take the key out, or list ids, one a line")
    return Excluded(frozenset(found), file.name)
