"""A configuration of another tool as it is used up: each key finds its place in a recipe, or is told with a reason.

A module of a peer takes what means something there and puts what means the same here. What it leaves goes through
tables that all of them share: fields of `trl.SFTConfig` keep their names, and what `instructft.recipe.aliases` knows to
be unnecessary is told in its words. Nothing is dropped without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructft.formatting import nearest, short
from instructft.recipe.aliases import ALIASES, TRAIN_HOMES
from instructft.recipe.commented import Draft, flow
from instructft.recipe.fields import legal_train_fields
from instructft.redaction import is_secret

Lost = tuple[str, Any, str]  # key, its value, why there is no counterpart
_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
_BUILDERS = {"json", "csv", "parquet", "arrow", "text"}  # of the datasets library: the rows are in `data_files`
TRUSTS = "code of a model is run only where the command line says --trust-remote-code, and of the Hub a pinned commit"


@dataclass
class Config:
    """What a peer's file says, less what has found its place.

    Args:
        left: keys that nobody has taken yet.
        folder: where the file lies; its paths may be relative to it.
        draft: the recipe so far; the reason of each key is what the peer's file said.
        lost: what has no counterpart.
        differs: what means something else here, a line each.
        same: keys that say what is so here anyway.
        strategy: of `instructft launch`, where the peer divides the model among processes.
        files: further files that the recipe needs, name -> text, to be written beside it.
    """

    left: dict[str, Any]
    folder: Path
    draft: Draft = field(default_factory=Draft)
    lost: list[Lost] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    same: list[tuple[str, str]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)  # our dotted key -> the peer's
    strategy: str = ""
    files: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which from now on is used; an empty one is the default."""
        given = key in self.left
        value = self.left.pop(key, None)
        if value is None or value == "":
            self.empty += [key] if given else []
            return default
        return value

    def put(self, path: str, value: Any, key: str = "", said: Any = None) -> None:
        """Write a key of ours, with what the peer's file said; or, where it said nothing, with the peer's default."""
        shown = f"{key}: {short(flow(value if said is None else said), 60)}" if key else ""
        self.draft.put(path, value, shown)
        self.origin[path] = key

    def move(self, key: str, path: str, default: Any = None) -> Any:
        """Take a key and put it as it stands; `default` is the peer's own, where it is another than ours."""
        given = key in self.left and self.left[key] not in (None, "")
        value = self.take(key, default)
        if value is not None:
            self.draft.put(path, value, f"{key}: {short(flow(value), 60)}" if given else f"{key}, by its default")
            self.origin[path] = key
        return value

    def lose(self, key: str, why: str, value: Any = None) -> None:
        """Tell a key that has no counterpart."""
        self.lost.append((key, self.left.pop(key, value), why))

    def drop(self, keys: Iterable[str], why: str) -> None:
        """Tell those of the keys that are there."""
        for key in keys:
            if self.left.get(key) is not None:
                self.lose(key, why) if self.left[key] is not False else self.agree(key)

    def agree(self, key: str, why: str = "off, as here") -> None:
        """Tell a key that says what is so here anyway."""
        self.left.pop(key, None)
        self.same.append((key, why))

    def rest(self, tool: str, none: Mapping[str, str], families: Mapping[str, str]) -> None:
        """What nobody took: into `train:` by its own name, or told.

        Args:
            none: key of this tool -> why it has no counterpart.
            families: beginning of keys -> why none of them has.
        """
        legal = legal_train_fields()
        for key, value in list(self.left.items()):
            family = next((why for begin, why in families.items() if key.startswith(begin)), "")
            if is_secret(key):
                self.lose(key, "a token comes from HF_TOKEN or the login, and is kept in no file")
                self.lost[-1] = (key, "…", self.lost[-1][2])
            elif value is None or value == "" or value == []:
                self.empty.append(key)
            elif key in none or family:
                self.drop([key], none.get(key) or family)
            elif key in legal:
                self.put(f"train.{key}", value, key)
            elif key in ALIASES and ALIASES[key][0] is None:
                self.drop([key], ALIASES[key][1].removeprefix("take it out: "))
            elif key in ALIASES:
                ours, how = ALIASES[key]
                self.drop([key], f"here it is {ours}" + (f": {how}" if how else ""))
            elif key in TRAIN_HOMES:
                self.drop([key], TRAIN_HOMES[key].removeprefix("take it out: "))
            else:
                self.lose(key, f"not a key of {tool} that is known here{nearest(key, {*none, *legal})}")
        self.left = {}

    # ----------------------------------------------------------------------------------------------------------------
    # What several peers have
    # ----------------------------------------------------------------------------------------------------------------

    def place(self, path: str) -> str | None:
        """A path of the peer's file as it is reached from here; None where nothing is there."""
        for candidate in (Path(path).expanduser(), self.folder / path):
            if candidate.exists():
                return path if candidate == Path(path) else os.path.relpath(candidate)
        return None

    def source(self, name: str, files: Any = None, config: Any = None, key: str = "path") -> dict[str, Any]:
        """An entry of `data.datasets` for what the datasets library is given: a file, a folder, or an id on the Hub."""
        if isinstance(files, Mapping):
            files = files.get("train") or next(iter(files.values()), None)
        files = [files] if isinstance(files, str) else list(files or [])
        if len(files) > 1:
            self.differs.append(f"{key}: {name}: the first of {len(files)} data_files is read; give each an entry")
        if files and (name in _BUILDERS or self.place(name)):
            inside = files[0] if name in _BUILDERS else f"{name}/{files[0]}"
            return {"path": self.place(inside) or inside}
        found = self.place(name)
        if found is not None or name.startswith((".", "/", "~")) or name.endswith(_SUFFIXES):
            return {"path": found or name}
        if files:
            self.lose("data_files", "of a data set on the Hub all files of a split are read", files)
        return {"hub": name, **({"config": config} if config else {})}

    def held_out(self, key: str, default: float = 0.0) -> None:
        """A share of the rows for validation. A number of rows cannot be said here before they are counted."""
        value = self.take(key, default)
        if isinstance(value, int | float) and 0 <= value < 1:
            self.put("data.splits", {"validation": float(value), "test": 0.0}, key, value)
        else:
            self.put("data.splits", {"validation": 0.05, "test": 0.0}, key, value)
            self.differs.append(f"{key}: {value} rows are held out there; here a share is, and 0.05 is written")

    def attention(self, kind: str | None) -> None:
        """Which kernel computes attention is no matter of the result; `auto` takes the fastest that is proved."""
        if kind in ("eager", "sdpa"):
            self.put("model.attn_implementation", kind, "attention", kind)
        elif kind:
            self.same.append(("attention", f"{kind}: auto takes flash attention for packs on a GPU where it is proved"))

    def divided(self, deepspeed: Any, fsdp: Any) -> None:
        """Which strategy of `launch` stands for DeepSpeed's or FSDP's configuration."""
        if fsdp:
            self.strategy = "fsdp2"
        if deepspeed:
            text = str(deepspeed).lower()
            found = self.place(str(deepspeed)) if isinstance(deepspeed, str) else None
            if found and Path(found).is_file():
                text += Path(found).read_text(encoding="utf-8", errors="replace").replace(" ", "").lower()
            stage3 = any(sign in text for sign in ("zero3", "z3", "'stage':3", '"stage":3', "'stage': 3"))
            self.strategy = "zero3" if stage3 else "zero2"
            if "offload" in text:
                self.differs.append("deepspeed: what it offloads to the CPU stays on the devices here")


def boolean(value: Any) -> Any:
    """The words that peers' readers (YAML 1.1) take for true and false."""
    words = {"yes": True, "on": True, "no": False, "off": False, "true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def number(value: Any) -> Any:
    """`2e-5`, which YAML 1.1 reads as a text, as the number that peers make of it."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
