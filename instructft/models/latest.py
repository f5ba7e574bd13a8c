"""`subfolder: latest` becomes the newest checkpoint folder of a repository, at the commit where it was found."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from instructft.errors import UsageError
from instructft.formatting import first_line
from instructft.models.hub_checkpoints import newest_checkpoint
from instructft.weights.base_record import is_hub_id

if TYPE_CHECKING:
    from instructft.checkpoints.manifest import Checkpoint
    from instructft.recipe.schema import Recipe

LATEST = "latest"


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
