"""The newest checkpoint folder of a repository, which `subfolder: latest` stands for, at the commit that has it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from instructft.errors import UsageError
from instructft.formatting import first_line
from instructft.weights.base_record import is_hub_id

if TYPE_CHECKING:
    from instructft.checkpoints.manifest import Checkpoint
    from instructft.recipe.schema import Recipe

LATEST = "latest"
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


def asks_for_latest(recipe: Recipe) -> bool:
    """Whether the recipe leaves the folder to us: `latest`, or `instruct/latest` for the newest in `instruct/`."""
    return (recipe.model.subfolder or "").rpartition("/")[2] == LATEST


def settled(recipe: Recipe, checkpoint: Checkpoint | None = None) -> tuple[Recipe, str]:
    """The recipe with a folder in place of `latest`, and in a few words why this one; any other recipe as it is.

    Args:
        checkpoint: that a run goes on from: its base stays the one that the run began with, whatever has come since.

    >>> recipe, why = settled(load_recipe("further.yaml"))
    >>> recipe.model.subfolder, recipe.model.revision[:8], why
    ('checkpoint_tokens_2M_loss_3.1', '0123abcd', '2,000,000 tokens, the most of 4 checkpoints')

    Raises:
        UsageError: there is no checkpoint folder, or none that can be told to be the newest.
    """
    if not asks_for_latest(recipe):
        return recipe, ""
    name = str(recipe.model.name_or_path)
    if checkpoint is not None and checkpoint.identity.get("model.name_or_path") == name:
        folder, revision = checkpoint.identity["model.subfolder"], checkpoint.identity["model.revision"]
        why = "as when the run began"
    else:
        inside = str(recipe.model.subfolder).rpartition("/")[0]
        folder, revision, why = _newest(name, recipe.model.revision, inside)
    model = recipe.model.model_copy(update={"subfolder": folder, "revision": revision})
    return recipe.model_copy(update={"model": model}), why


def look_anew() -> None:
    """Forget what was found: a run takes what is the newest when it begins."""
    _newest.cache_clear()


@functools.lru_cache  # tokenizer and weights come from one place
def _newest(name: str, revision: str | None, inside: str) -> tuple[str, str | None, str]:
    """(folder, commit, why)."""
    files, commit = _files(name, revision)
    where = f"{name}/{inside}" if inside else name
    try:
        found = newest_checkpoint(files, inside)
    except ValueError as error:
        raise UsageError(f"model.subfolder: which of the checkpoints in {where} is the newest? {error}") from error
    if found is None:
        raise UsageError(
            f"model.subfolder: {where} holds no folder with a checkpoint, such as checkpoint-1200 or "
            "checkpoint_tokens_500k_loss_1.2345, with weights in it; name the folder, or leave the key out"
        )
    return found.folder, commit, found.why


def _files(name: str, revision: str | None) -> tuple[list[str], str | None]:
    """The paths of all files of a model's folder or repository, and the commit that has them."""
    local = Path(name).expanduser()
    if local.is_dir():
        return [path.relative_to(local).as_posix() for path in sorted(local.rglob("*")) if path.is_file()], revision
    if not is_hub_id(name):
        raise UsageError(f"model.name_or_path: there is no folder {name}, and it is no Hub id such as org/name")
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if constants.HF_HUB_OFFLINE:  # what is in the cache is all there is
            cached = _cached(name, revision)
            return [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()], cached.name
        info = HfApi().model_info(name, revision=revision)
    except (HfHubHTTPError, OSError) as error:
        reason = first_line(error)
        raise UsageError(
            f"model.name_or_path: the files of {name} could not be listed: {reason}. Check the spelling and the "
            "network; a private or gated model needs `hf auth login` or HF_TOKEN"
        ) from error
    return [sibling.rfilename for sibling in info.siblings or []], info.sha


def _cached(name: str, revision: str | None) -> Path:
    """The copy of a repository in the cache: of the revision, else the last one that was fetched."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    ref = place / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    copies = [path for path in (place / "snapshots").glob("*") if commit in (None, path.name)]
    if not copies:
        raise OSError("HF_HUB_OFFLINE=1 is set, and the cache holds no copy of it")
    return max(copies, key=lambda path: path.stat().st_mtime)
