"""Loads the raw rows of a recipe's data sets and divides them into splits, the same ones on every process.

A row's split depends on `data.seed`, `data.splits` and its row number, and on nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.data.files.kinds import SUFFIXES, not_known, suffix_of
from instructft.data.readers import ROW, columns_of, download, read_file
from instructft.data.sources import FORMATS, SOURCES, Unusable, detect_format, to_conversation
from instructft.errors import DataError
from instructft.formatting import first_line
from instructft.prompt.render import Message

if TYPE_CHECKING:
    from datasets import Dataset

    from instructft.recipe.schema import DatasetEntry, Recipe


@dataclass(frozen=True)
class Part:
    """One entry of `data.datasets`: its raw rows, what they are, and which of them each split holds."""

    label: str
    raw: Dataset
    format: str
    columns: dict[str, str]  # our column name -> the name in the file
    rows: dict[str, np.ndarray]  # split -> row numbers in `raw`
    key: str  # where the recipe names it, for messages
    drawn: np.ndarray | None = None  # row numbers in the file of the rows in `raw`; None: all, in order
    weight: float = 1.0  # share in a mix, relative to the other parts

    def row(self, raw: dict[str, Any]) -> dict[str, Any]:
        """One raw row as it stands in its file, with the columns that the recipe maps under our names too."""
        row = json.loads(raw[ROW]) if ROW in raw else raw
        return {**row, **{ours: row.get(theirs) for ours, theirs in self.columns.items()}}

    def conversation(self, raw: dict[str, Any]) -> list[Message]:
        """One raw row as messages; raises `Unusable`."""
        return to_conversation(self.row(raw), self.format)

    def describe(self, number: int) -> str:
        """Name row `number` of `raw` by its place in the file, counted from 1."""
        place = number if self.drawn is None else int(self.drawn[number])
        return f"{self.key}: row {place + 1} of {self.label}"


def load_parts(recipe: Recipe) -> list[Part]:
    """Load the raw rows of every data set of a recipe and divide them into splits.

    The split of a row depends on `data.seed`, `data.splits` and its row number only: not on the template, the
    tokenizer or `max_length`, so that runs with different settings are compared on the same held-out rows.

    Raises:
        DataError: a file, URL or Hub id that cannot be read, or whose rows have no known format.
    """
    parts = []
    if any(entry.streaming for entry in recipe.data.datasets):
        raise DataError(
            "data.datasets[].streaming: rows that are read as they come cannot be counted, held out or looked up "
            "ahead of a run; set streaming: false here, with rows: N if the whole set is too large"
        )
    for i, entry in enumerate(recipe.data.datasets):
        key = f"data.datasets[{i}]"
        label = label_of(entry, key)
        raw = load_raw(entry, label, key)
        if len(raw) == 0:
            raise DataError(f"{key}: {label} holds no rows")
        drawn = None
        if entry.rows is not None:
            drawn = _draw(len(raw), entry.rows, recipe.data.seed, i, f"{key}.rows")
            raw = raw.select(drawn)
        fmt, columns = shape(entry, columns_of(raw), label, key)
        parts.append(Part(label, raw, fmt, columns, _split_rows(len(raw), recipe, i), key, drawn, entry.weight))
    return parts


def shape(entry: DatasetEntry, found: list[str], label: str, key: str) -> tuple[str, dict[str, str]]:
    """The format of rows with the columns `found`, and which of them the recipe maps to a name of ours.

    Raises:
        DataError: a column that is mapped or that the format needs is not there, or no format fits.
    """
    columns = dict(entry.columns or {})
    absent = [f"{ours}: {theirs}" for ours, theirs in columns.items() if theirs not in found]
    if absent:
        raise DataError(
            f"{key}.columns: {label} has no column for {', '.join(absent)}; its columns are {', '.join(found)}"
        )
    fmt = entry.format or (SOURCES[entry.name].format if entry.name else None)
    present = list(dict.fromkeys([*found, *columns]))
    if fmt is None:
        fmt = detect_format(present, f"{key}: {label}")
    elif missing := sorted(set(FORMATS[fmt].columns) - set(present)):
        raise DataError(
            f"{key}: {label} is read as {fmt}, which needs the column {', '.join(missing)}; "
            f"its columns are {', '.join(found)}. Set format or columns for it."
        )
    return fmt, columns


def _draw(total: int, wanted: int, seed: int, part: int, key: str) -> np.ndarray:
    """`wanted` row numbers of `total`, drawn by the seed, in the order of the file."""
    if wanted > total:
        raise DataError(f"{key}: {wanted} rows are wanted, but there are {total}")
    return np.sort(np.random.default_rng([seed, part, 1]).permutation(total)[:wanted])


def _split_rows(total: int, recipe: Recipe, part: int) -> dict[str, np.ndarray]:
    """Divide row numbers 0 … total-1 by a seeded permutation; each split keeps the order of the file."""
    order = np.random.default_rng([recipe.data.seed, part]).permutation(total)
    validation = round(total * recipe.data.splits.validation)
    held_out = validation + round(total * recipe.data.splits.test)
    return {
        "validation": np.sort(order[:validation]),
        "test": np.sort(order[validation:held_out]),
        "train": np.sort(order[held_out:]),
    }


def load_raw(entry: DatasetEntry, label: str, key: str) -> Dataset:
    """The rows of one entry; with `streaming` an `IterableDataset`, of a data set on the Hub only."""
    import datasets

    source = SOURCES[entry.name] if entry.name else None
    try:
        if not (hub := hub_id(entry)):
            return _read_file(location_of(entry), key)
        files = dict(source.files) if source and source.files else None
        if files and entry.config:  # a folder of the repository, as hh-rlhf's `helpful-base`
            folders = sorted({name.split("/")[0] for names in files.values() for name in names})
            if entry.config not in folders:
                raise DataError(f"{key}.config: {label} has no part {entry.config!r}; it has {', '.join(folders)}")
            files = {s: [f for f in names if f.startswith(f"{entry.config}/")] for s, names in files.items()}
        return datasets.load_dataset(
            hub,
            name=None if files else entry.config,
            data_files=files,
            split=entry.split or "train",
            revision=entry.revision,
            streaming=entry.streaming,
        )
    except DataError:
        raise
    except Exception as error:
        raise DataError(not_read(entry, label, key, error)) from error


def label_of(entry: DatasetEntry, key: str) -> str:
    """What an entry is called in messages and in an account."""
    return entry.name or entry.hub or entry.path or entry.url or key


def hub_id(entry: DatasetEntry) -> str | None:
    """The data set on the Hub that an entry stands for."""
    return entry.hub or (SOURCES[entry.name].hub if entry.name else None)


def location_of(entry: DatasetEntry) -> str:
    """The path or URL that an entry which is not on the Hub stands for."""
    source = SOURCES[entry.name] if entry.name else None
    return str(entry.path or entry.url or (source and (source.url or source.path)))


def _read_file(location: str, key: str) -> Dataset:
    """The rows of a local file or a URL."""
    suffix = known_suffix(location, key)
    path = download(location) if "://" in location else existing(location, key)
    try:
        return read_file(path, suffix, location)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def known_suffix(location: str, key: str) -> str:
    """The ending of a path or URL, one of `SUFFIXES`."""
    suffix = suffix_of(location)
    if suffix not in SUFFIXES:
        raise DataError(f"{key}: {location} ends in {suffix or 'nothing'}; files may be {', '.join(sorted(SUFFIXES))}")
    return suffix


def existing(location: str, key: str) -> Path:
    """The path of a local file, which must be there."""
    path = Path(location).expanduser()
    if not path.is_file():
        raise DataError(f"{key}: there is no file {location}" + (" (it is a folder)" if path.is_dir() else ""))
    return path


def not_read(entry: DatasetEntry, label: str, key: str, error: Exception) -> str:
    """Say in words why a data set could not be read or fetched, and what to try."""
    if entry.path:
        return f"{key}: {label} could not be read: {first_line(error.__cause__ or error)}"
    where = "the Hugging Face Hub" if hub_id(entry) else "its URL"
    return (
        f"{key}: {label} could not be fetched from {where}: {first_line(error.__cause__ or error)}\n"
        "Check the spelling and the network; a private or gated data set needs `hf auth login` or HF_TOKEN. "
        "A local copy works too: data.datasets=[{path: FILE}]"
    )


def conversations(recipe: Recipe, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The usable rows of one split as text, for evaluation: `messages`, `dataset`, `category` (or None).

    >>> conversations(load_recipe("quickstart"), "test")[0]["messages"][-1]["role"]
    'assistant'
    """
    found: list[dict[str, Any]] = []
    for part in load_parts(recipe):
        found += _usable(part, part.raw.select(part.rows[split]))
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


def file_conversations(path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The usable rows of one file, as `conversations` gives them."""
    raw = _read_file(path, "--data")
    if len(raw) == 0:
        raise DataError(f"--data: {path} holds no rows")
    part = Part(path, raw, detect_format(columns_of(raw), f"--data: {path}"), {}, {}, "--data")
    found = _usable(part, raw)
    if not found:
        raise DataError(f"--data: no row of {path} has a question and an answer")
    return found[:limit]


def _usable(part: Part, rows: Dataset) -> list[dict[str, Any]]:
    found = []
    for raw in rows:
        try:
            messages = part.conversation(raw)
            found.append({"messages": messages, "dataset": part.label, "category": part.row(raw).get("category")})
        except Unusable:  # counted by `prepare`
            continue
    return found
