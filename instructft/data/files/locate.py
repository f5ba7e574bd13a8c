"""Where rows lie: a file, a folder of files, a pattern or a URL, and which of the files are which split.

A name that exists is taken literally, whatever letters it has: `many*.parquet` is a pattern only where no file is
called that. What `save_to_disk` wrote is read too.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from instructft.data import readers
from instructft.data.files.kinds import ARROW_KINDS, SUFFIXES, not_known, suffix_of
from instructft.errors import DataError
from instructft.whole_file import read_whole

Splits = dict[str, list["DataFile"]]  # the files of each split, in order

# Words by which people say of a file or a folder which split it holds; the same ones as on the Hub.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# What lies beside rows and holds none.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


@dataclass(frozen=True)
class DataFile:
    """A file of rows: its name in messages, its ending, and where it lies, here or at an address."""

    name: str
    suffix: str
    path: Path | None = None
    url: str = ""

    def here(self) -> Path:
        """The file on this machine, fetched first where it lies elsewhere."""
        return self.path or fetched(self.url)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Row after row; of a file elsewhere nothing is put on the disk, except a copy from before when offline."""
        from datasets import config

        if self.path:
            yield from readers.rows(self.path, self.suffix, self.name)
        elif config.HF_HUB_OFFLINE:
            yield from readers.rows(fetched(self.url), self.suffix, self.name)
        elif self.url.startswith("hf://") or self.suffix.startswith(ARROW_KINDS):  # the index stands at the end
            import fsspec

            with fsspec.open(self.url, "rb") as file:
                yield from readers.rows_of(file, self.suffix, self.name)
        else:
            with readers.opened(self.url) as body:
                yield from readers.rows_of(body, self.suffix, self.name)


_ON_HUB = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")


def fetched(url: str) -> Path:
    """A file of a data set on the Hub, or at any other address, as it lies on this machine."""
    if found := _ON_HUB.match(url):
        from urllib.parse import unquote

        from huggingface_hub import hf_hub_download

        repo, revision, inside = found.groups()
        return Path(hf_hub_download(repo, inside, repo_type="dataset", revision=unquote(revision)))
    return readers.download(url)


def located(location: str, key: str) -> Splits:
    """The files that a path or URL stands for, by split; those of no split that is named are `train`.

    Raises:
        DataError: nothing is there, or it is no file of rows; with what it is and the way out.
    """
    if "://" in location:
        return {"train": [DataFile(location, known_suffix(location, key), url=location)]}
    path = Path(location).expanduser()
    if path.is_file():
        return {"train": [_file(path, location, key)]}
    if path.is_dir():
        return _folder(path, location, key)
    if glob.has_magic(location):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            raise DataError(f"{key}: no file is called {location}, and none fits it as a pattern")
        return {"train": [_file(file, str(file), key) for file in files]}
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1, cutoff=0.75)
    raise DataError(f"{key}: there is no file {location}" + (f"; did you mean {near[0]}?" if near else ""))


def as_pattern(location: str, folder: Path) -> str | None:
    """The pattern that a path is, seen from the current directory or from `folder`, if files fit it.

    None where something is called just that, or nothing fits.
    """
    path = Path(location).expanduser()
    if not glob.has_magic(location) or path.exists() or (folder / path).exists():
        return None
    places = (str(path), str(Path(glob.escape(str(folder))) / path))
    return next((place for place in places if glob.glob(place, recursive=True)), None)


def known_suffix(location: str, key: str) -> str:
    """The ending of a path or URL, one of `SUFFIXES`."""
    suffix = suffix_of(location)
    if suffix not in SUFFIXES:
        raise DataError(f"{key}: {not_known(location)}")
    return suffix


def _file(path: Path, name: str, key: str) -> DataFile:
    return DataFile(name, known_suffix(name, key), path)


def _folder(folder: Path, location: str, key: str) -> Splits:
    """The files of a folder and of those in it, or the tables that `save_to_disk` wrote there."""
    if (folder / "dataset_dict.json").is_file():
        names = _json_of(folder / "dataset_dict.json", key).get("splits", [])
        return {str(name): _saved(folder / Path(str(name)).name, key) for name in names}
    if (folder / "state.json").is_file():
        return {"train": _saved(folder, key)}
    everything = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_aside(path, folder))
    files = [path for path in everything if suffix_of(path.name) in SUFFIXES]
    if not files:
        what = f"; {not_known(everything[0].name)}" if everything else ""
        raise DataError(f"{key}: the folder {location} holds no file of rows{what}")
    splits: dict[str, list[DataFile]] = {}
    for path in files:
        split = _split_of(path.relative_to(folder)) or "train"
        splits.setdefault(split, []).append(DataFile(str(path), suffix_of(path.name), path))
    return splits


def _is_aside(path: Path, folder: Path) -> bool:
    inside = path.relative_to(folder)
    return (
        path.name in _NO_ROWS or path.name.lower() == "readme.md" or any(p.startswith((".", "_")) for p in inside.parts)
    )


def _split_of(inside: Path) -> str | None:
    """The split that a file is said to hold, by its name first, else by its nearest folder that says so."""
    for part in reversed(inside.parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in _WORDS.items():
            if any(word in names for word in words):
                return split
    return None


def _saved(folder: Path, key: str) -> list[DataFile]:
    """The tables of one split as `save_to_disk` wrote them."""
    state = _json_of(folder / "state.json", key)
    names = [Path(str(entry["filename"])).name for entry in state.get("_data_files", [])]
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing or not names:
        raise DataError(f"{key}: {folder} is a data set saved to disk, and its table {missing or ''} is not there")
    return [DataFile(str(folder / name), ".arrow", folder / name) for name in names]


def _json_of(path: Path, key: str) -> Mapping[str, Any]:
    try:
        found = json.loads(read_whole(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {path} could not be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{key}: {path} is not what save_to_disk writes")
    return found
