"""Checkpoint folders in a repository: what ours are called, and which of any is the newest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

_WEIGHTS = re.compile(r"(.+\.safetensors|.+\.safetensors\.index\.json|pytorch_model.*\.bin(\.index\.json)?)")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# What counts how far a checkpoint is, in order of trust: `tokens_500k`, `checkpoint-1200`, `step_100`, `epoch-3`.
_UNITS = ("tokens", "step", "epoch")
_COUNTED = [
    ("tokens", re.compile(r"(?:^|[_-])tokens?[_-](\d+(?:\.\d+)?)([kmbt]?)(?![a-z0-9])")),
    ("tokens", re.compile(r"(?:^|[_-])(\d+(?:\.\d+)?)([kmbt]?)[_-]?(?:tokens|toks|tok)(?![a-z0-9])")),
    ("step", re.compile(r"(?:^|[_-])(?:steps?|iter|iters|iteration)[_-]?(\d+(?:\.\d+)?)([kmbt]?)(?![a-z0-9])")),
    ("step", re.compile(r"^(?:checkpoint|ckpt|check[_-]?point)[_-]?(\d+(?:\.\d+)?)([kmbt]?)$")),
    ("epoch", re.compile(r"(?:^|[_-])epochs?[_-]?(\d+(?:\.\d+)?)()(?![a-z0-9])")),
]  # fmt: skip


def checkpoint_name(tokens: int, loss: float | None = None) -> str:
    """The folder of a checkpoint on the Hub: exact to the token, short where the number is round.

    >>> checkpoint_name(500_000, 1.23451), checkpoint_name(1_234_567)
    ('checkpoint_tokens_500k_loss_1.2345', 'checkpoint_tokens_1.234567M')
    """
    factor, unit = next(((f, u) for f, u in ((10**9, "B"), (10**6, "M"), (10**3, "k")) if tokens >= f), (1, ""))
    digits = len(str(factor)) - 1
    count = f"{tokens // factor}.{tokens % factor:0{digits}d}".rstrip("0").rstrip(".") if factor > 1 else str(tokens)
    return f"checkpoint_tokens_{count}{unit}" + (f"_loss_{loss:.4f}" if loss is not None else "")


def progress(name: str) -> tuple[str, float] | None:
    """How far the checkpoint in a folder of this name is: what is counted, and how many; None for other folders.

    >>> progress("checkpoint_tokens_500k_loss_1.2345"), progress("checkpoint-1200"), progress("tokenizer")
    (('tokens', 500000.0), ('step', 1200.0), None)
    """
    for unit, pattern in _COUNTED:
        if found := pattern.search(name.lower()):
            return unit, float(found[1]) * _FACTORS[found[2]]
    return None


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint folder of a repository.

    Args:
        folder: its path.
        why: in a few words, how it was told.
    """

    folder: str
    why: str


def newest_checkpoint(files: Iterable[str], inside: str = "") -> Newest | None:
    """The newest folder with a model or an adapter among the files of a repository; None where there is no such folder.

    Args:
        files: all paths.
        inside: look in this folder only.

    >>> files = ["checkpoint-1200/config.json", "checkpoint-1200/model.safetensors", "checkpoint-1300/config.json"]
    >>> newest_checkpoint(files)
    Newest(folder='checkpoint-1200', why='1,200 steps, the most of 1 checkpoint; without weights: checkpoint-1300')

    Raises:
        ValueError: folders of several kinds, of which none can be told to be the newest.
    """
    held: dict[str, set[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        held.setdefault(path.parent.as_posix(), set()).add(path.name)
    named = {folder: progress(PurePosixPath(folder).name) for folder in held if _lies(folder, inside)}
    counted = {folder: how_far for folder, how_far in named.items() if how_far}
    whole = {folder: how_far for folder, how_far in counted.items() if _is_model(held[folder])}
    if not whole:
        return None
    units = {unit for unit, _ in whole.values()}
    if len(units) > 1:
        few = ", ".join(sorted(whole)[:6])
        raise ValueError(f"they count different things ({', '.join(u for u in _UNITS if u in units)}): {few}")
    unit = units.pop()
    most = max(how_far for _, how_far in whole.values())
    # of two as far the one whose name sorts last: `run2/checkpoint-10` after `run1/checkpoint-10`
    folder = max(name for name, (_, how_far) in whole.items() if how_far == most)
    number = "checkpoint" if len(whole) == 1 else "checkpoints"
    why = f"{most:,.10g} {unit if unit == 'tokens' else unit + 's'}, the most of {len(whole):,} {number}"
    without = sorted(PurePosixPath(name).name for name in counted.keys() - whole.keys())
    if without:
        why += f"; without weights: {', '.join(without[:3])}" + (", …" if len(without) > 3 else "")
    return Newest(folder, why)


def _lies(folder: str, inside: str) -> bool:
    place = inside.strip("/")
    return not place or folder.startswith(f"{place}/")


def _is_model(names: set[str]) -> bool:
    return bool({"config.json", "adapter_config.json"} & names) and any(_WEIGHTS.fullmatch(name) for name in names)
