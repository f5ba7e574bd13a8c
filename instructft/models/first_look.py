"""What can be told of models, data files and packages in under a second: without torch, and without the network.

Whatever needs more is left to those who load: nothing is refused here that they would not refuse.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from instructft.errors import DataError, UsageError
from instructft.formatting import nearest
from instructft.progress import say
from instructft.weights.base_record import is_hub_id
from instructft.whole_file import read_whole

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe

ROWS = 1000  # of a file that are looked at
PATIENCE = 5.0  # seconds for a connection to the Hub
_LISTED = 8  # names in a message
_OURS = ("instructft.json", "run.json")  # what a run or a merge leaves in its folder
_RUNS = Path("runs")


def refuse_at_a_glance(recipe: Recipe, here: bool = False) -> None:
    """Refuse a recipe that names what is not there.

    Args:
        here: it is to be trained on this machine, whose packages count then.

    Raises:
        UsageError: all models and packages that are missing, a line each; or what is wrong with a data file.
    """
    problems = list(_models(recipe))
    if here:
        from instructft.recipe.installed import missing_packages, precision_and_kernels, surely_on_the_cpu

        problems += missing_packages(recipe)
        if surely_on_the_cpu(recipe):
            problems += [*precision_and_kernels(recipe, "cpu"), *_in_4_bits(recipe)]
    if problems:
        raise UsageError("\n".join(problems))
    _look_into_files(recipe)
    entries = [*recipe.data.datasets, *(recipe.data.validation or ()), *(recipe.data.test or ())]
    away = all(entry.path or entry.name == "quickstart" for entry in entries) and recipe.hub.repo_id is None
    if said := look_for_the_hub(_names(recipe).values(), may_stay_away=away):
        say(said)


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------


def _in_4_bits(recipe: Recipe) -> Iterator[str]:
    """Why the model cannot be computed in 4 bits on the CPU, by its config; loading looks at every layer."""
    from instructft.adapters.quantization import told_by_width

    if recipe.model.quantization != "4bit":
        return
    try:
        folder = Path(recipe.model.name_or_path or "", recipe.model.subfolder or "")
        config = json.loads(read_whole(folder / "config.json"))
    except (OSError, ValueError):
        return
    if isinstance(config, dict) and (why := told_by_width(config)):
        yield f"model.quantization: {why}"


def _names(recipe: Recipe) -> dict[str, str]:
    """Key of `model:` -> the model or tokenizer that it names."""
    named = {key: getattr(recipe.model, key) for key in ("name_or_path", "tokenizer")}
    return {key: name for key, name in named.items() if name is not None and name != "quickstart"}


def _models(recipe: Recipe) -> Iterator[str]:
    for key, name in _names(recipe).items():
        if why := missing(name):
            yield f"model.{key}: {why}"


def missing(name: str, bare: bool = True, cached: bool = True) -> str:
    """Why a name stands for no model, as far as this machine can tell; "" where it does, or where the Hub may know it.

    A name such as `runs/nope` could be one on the Hub; where `runs` holds runs of ours it is taken for a folder.

    Args:
        bare: whether a name without an owner, such as `gpt2`, may be one on the Hub.
        cached: with the Hub switched off, look into its cache too.

    Example::

        missing("runs/nope")
        # 'there is no model folder runs/nope; in runs/: quickstart'
    """
    path = Path(name).expanduser()
    if path.exists():
        return ""
    hub_id = name.partition("@")[0]
    may_be_on_hub = is_hub_id(hub_id) and name[0] not in "./~" and (bare or "/" in name)
    if may_be_on_hub and "/" in name and any(is_ours(folder) for folder in _folders(path.parent)):
        may_be_on_hub = False
    if not may_be_on_hub:
        return _no_folder(name, path)
    if cached and is_offline() and not _in_cache(hub_id):
        text = _no_folder(name, path) if path.parent.is_dir() and "/" in name else f"there is no model folder {name}"
        return f"{text}; nor is it in the Hub's cache, and HF_HUB_OFFLINE is set"
    return ""


def is_ours(folder: Path) -> bool:
    """Whether a run or a merge of ours has left its mark in a folder."""
    return any((folder / name).is_file() for name in _OURS)


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _no_folder(name: str, path: Path) -> str:
    """What to say of a folder that is not there: what is near it."""
    text, parent = f"there is no model folder {name}", path.parent
    missed = None
    while not parent.is_dir() and parent != parent.parent:
        missed, parent = parent, parent.parent
    if missed is not None:
        text += f", nor is there {missed}"
    wanted = (missed or path).name
    if "/" not in name and _RUNS.is_dir():  # the bare name of a run
        parent = _RUNS
    there = [folder.name for folder in _folders(parent)]
    if name.startswith("checkpoint-") or path.name.startswith("checkpoint-"):
        there = [one for one in there if one.startswith("checkpoint-")] or there
    if not there or (parent == Path() and len(path.parts) > 1):
        return f"{text}; give a run folder, or a Hub id such as org/name"
    there.sort(key=lambda one: (len(one), one) if one.startswith("checkpoint-") else (0, one))
    more = [f"and {len(there) - _LISTED} more"] if len(there) > _LISTED else []
    where = f"in {parent}/" if parent != Path() else "here"
    prefix = "" if parent == Path() else f"{parent}/"
    return f"{text}; {where}: {', '.join([*there[:_LISTED], *more])}{nearest(wanted, there, prefix=prefix)}"


def is_offline() -> bool:
    """Whether the Hub is switched off, as huggingface_hub reads it."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def look_for_the_hub(names: Iterable[str], may_stay_away: bool = True) -> str:
    """Try once whether the Hub can be reached, where a model is to come from it; why it cannot, or "".

    Libraries try again for every file. Where the cache has all the models, they are told to stay away instead.

    Args:
        names: of models.
        may_stay_away: nothing else is asked of the network.

    Raises:
        UsageError: it cannot be reached, and the cache does not hold a model.
    """
    wanted = [name.partition("@")[0] for name in names if not Path(name).expanduser().exists()]
    wanted = [name for name in wanted if is_hub_id(name)]
    proxies = any(
        name.lower() in ("https_proxy", "http_proxy", "all_proxy") and os.environ[name] for name in os.environ
    )
    if not wanted or is_offline() or proxies:
        return ""
    why = _unreachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    lacking = [name for name in wanted if not _in_cache(name)]
    if why and lacking:
        raise UsageError(
            f"{lacking[0]} is no folder here and not in the Hub's cache, and the Hub cannot be reached: {why}. Check "
            "the network and the name, or name a folder"
        )
    if why and may_stay_away:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
        return f"the Hub cannot be reached ({why}): going on with what its cache holds"
    return ""


def _unreachable(endpoint: str) -> str:
    """Why no connection can be made to an address; "" where one can."""
    place = urlsplit(endpoint)
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=PATIENCE).close()
    except OSError as error:
        return f"{place.hostname}: {error.strerror or error}"
    return ""


def _in_cache(hub_id: str) -> bool:
    """Whether the Hub's cache on this machine holds anything of a repository."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return (Path(cache).expanduser() / f"models--{hub_id.replace('/', '--')}").is_dir()


# --------------------------------------------------------------------------------------------------------------------
# Data files
# --------------------------------------------------------------------------------------------------------------------


def _look_into_files(recipe: Recipe) -> None:
    """Read the first rows of each local file as the run will read them.

    Raises:
        DataError: as the run would say.
    """
    from instructft.data import readers
    from instructft.data.load import files_on_disk, shape, shape_of

    for kind in ("datasets", "validation", "test"):
        for number, entry in enumerate(getattr(recipe.data, kind) or ()):
            key = f"data.{kind}[{number}]"
            if entry.path is None:
                continue
            for file in files_on_disk(entry, key):
                columns: dict[str, None] = {}
                try:
                    for row in itertools.islice(readers.rows(file.here(), file.suffix, file.name), ROWS):
                        columns.update(dict.fromkeys(row))
                except DataError as error:
                    raise DataError(f"{key}: {error}") from error
                if columns:
                    shape(shape_of(entry), list(columns), entry.label or entry.path, key)
