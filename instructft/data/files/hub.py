"""Which files of a data set on the Hub hold which split: what `datasets` finds in names, folders and `README.md`.

The files are then read by the readers of local files, since the library's own guess types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from instructft.data.files.kinds import SUFFIXES, not_known, suffix_of
from instructft.data.files.locate import DataFile, Splits
from instructft.errors import DataError

_AT_ONCE = 8  # downloads
_READ_AS_ROWS = ("json", "csv", "parquet", "arrow")


def hub_splits(
    hub: str, config: str | None, revision: str | None, files: Mapping[str, list[str]] | None, key: str
) -> Splits:
    """The files of each split of a data set; with `files` those alone, in the repository.

    Offline, or where the Hub does not answer, the files that lie in the Hub's cache on this machine are the data set.

    Raises:
        DataError: it has several configurations and none is named, or another one; it holds no rows.
        Exception: what `datasets` and `huggingface_hub` raise for a data set that is not there, or a Hub.
    """
    from datasets import config as settings
    from datasets import load_dataset_builder

    def resolved(place: str, at: str | None) -> Any:
        wanted = {split: list(names) for split, names in files.items()} if files else None
        return load_dataset_builder(place, name=None if files else config, data_files=wanted, revision=at).config

    try:
        if settings.HF_HUB_OFFLINE and not Path(hub).is_dir():
            found = resolved(_cached(hub, revision), None)
        else:
            try:
                found = resolved(hub, revision)
                if found.data_files is None:  # the library fell back to a table of its own, made with types guessed
                    raise ConnectionError(f"Couldn't reach '{hub}' on the Hub")
            except ConnectionError as error:
                try:
                    found = resolved(_cached(hub, revision), None)
                except Exception:
                    raise error from None
    except ValueError as error:
        raise _config_error(error, hub, key) or error from error
    module = type(found).__module__.split(".")[-1]
    if module not in _READ_AS_ROWS:
        names: list[str] = next(iter((found.data_files or {}).values()), [])
        shown = f" ({not_known(str(names[0]).rpartition('/')[2])})" if names else ""
        raise DataError(f"{key}: the data set {hub} holds {module} files, not rows of text{shown}")
    return {str(split): [_data_file(str(name), key) for name in names] for split, names in found.data_files.items()}


def fetch(files: list[DataFile]) -> None:
    """Bring files here, several at a time; a failure is left to the one who opens them."""
    away = [file for file in files if file.path is None]
    if len(away) > 1:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda file: file.here(), away))


def _data_file(name: str, key: str) -> DataFile:
    suffix = suffix_of(name)
    if suffix not in SUFFIXES:
        raise DataError(f"{key}: {not_known(name)}")
    shown = re.sub(r"^hf://datasets/", "", name)
    shown = re.sub(r"@[0-9a-f]{40}/", "/", shown)
    return DataFile(shown, suffix, url=name) if "://" in name else DataFile(shown, suffix, Path(name))


def _cached(hub: str, revision: str | None) -> str:
    """The folder of a data set in the Hub's cache on this machine."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(hub, repo_type="dataset", revision=revision, local_files_only=True))


def _config_error(error: ValueError, hub: str, key: str) -> DataError | None:
    """What `datasets` says of a configuration that is missing or unknown, with the key to set."""
    import ast

    said = str(error)
    listed = re.search(r"[Aa]vailable(?: configs)?: (\[.*\])", said)
    if listed is None:
        return None
    names = [str(name) for name in ast.literal_eval(listed[1])]
    unknown = re.search(r"BuilderConfig '(.*)' not found", said)
    wrong = f"has no configuration {unknown[1]!r}" if unknown else "has several configurations"
    return DataError(f"{key}.config: {hub} {wrong}; name one of {', '.join(names)}, e.g. config: {names[0]}")
