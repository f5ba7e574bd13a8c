"""Loads the raw rows of a recipe's data sets and divides them into splits, the same ones on every process.

A row's split depends on `data.seed`, `data.splits` and its row number, and on nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.data.files.hub import fetch, hub_splits
from instructft.data.files.locate import DataFile, Splits, located
from instructft.data.files.row_ids import Excluded, row_id
from instructft.data.formats import AS_IT_STANDS, FORMATS, Rules, detect_format, to_conversation
from instructft.data.readers import ROW, columns_of, read_file
from instructft.data.sources import SOURCES
from instructft.errors import DataError
from instructft.formatting import first_line
from instructft.prompt.conversation import Conversation
from instructft.prompt.ledger import Unread, Unusable
from instructft.redaction import bare_url

if TYPE_CHECKING:
    from datasets import Dataset

    from instructft.recipe.schema import DatasetEntry, Recipe


SPLITS = ("train", "validation", "test")

# How rows are to be read: the format (None: told by their columns), and our column name -> the name in the file.
Shape = tuple[str | None, Mapping[str, str]]
# Rows, with what `Part.drawn` and `Part.files` say of them.
Raw = tuple["Dataset", "np.ndarray | None", tuple[tuple[str, int], ...]]


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
    repeat: float = 1.0  # how often its rows are trained in an epoch
    files: tuple[tuple[str, int], ...] = ()  # where there are several: each one's name, and its first row's number
    rules: Rules = AS_IT_STANDS  # what the recipe says of how rows are read

    def row(self, raw: dict[str, Any]) -> dict[str, Any]:
        """One raw row as it stands in its file, with the columns that the recipe maps under our names too."""
        row: dict[str, Any] = _decoded(raw[ROW]) if ROW in raw else raw  # a stream's rows come as they are
        return {**row, **{ours: row.get(theirs) for ours, theirs in self.columns.items()}} if self.columns else row

    def ids(self, numbers: np.ndarray) -> list[str]:
        """What these rows of `raw` are known by, in this file or another (`instructft.data.files.row_ids`)."""
        batches = self.raw.select(numbers).iter(1000)
        return [row_id(json.loads(text)) for batch in batches for text in batch[ROW]]

    def without(self, excluded: Excluded) -> tuple[Part, int]:
        """A part whose rows are those that a recipe does not leave out of training, and how many it does."""
        train = self.rows["train"]
        out = excluded.among(self.ids(train)) if excluded.ids and len(train) else np.zeros(len(train), dtype=bool)
        if not out.any():
            return self, 0
        keep = np.delete(np.arange(len(self.raw)), train[out])
        place = np.full(len(self.raw), -1)
        place[keep] = np.arange(len(keep))
        rows = {name: place[numbers] for name, numbers in self.rows.items()} | {"train": place[train[~out]]}
        drawn = keep if self.drawn is None else self.drawn[keep]
        return dataclasses.replace(self, raw=self.raw.select(keep), rows=rows, drawn=drawn), int(out.sum())

    def conversation(self, raw: dict[str, Any]) -> Conversation:
        """One raw row as messages; raises `Unusable` and `Unread`."""
        return to_conversation(self.row(raw), self.format, self.rules)

    def place(self, number: int) -> str:
        """The place in the file, counted from 1, of row `number` of `raw`, and which file where there are several."""
        name, place = self.found(number)
        return f"{place} of {name}" if name else str(place)

    def found(self, number: int) -> tuple[str | None, int]:
        """The file of row `number` of `raw`, where there are several, and its place there, from 1."""
        place = number if self.drawn is None else int(self.drawn[number])
        name, start = next(((name, first) for name, first in reversed(self.files) if first <= place), (None, 0))
        return name, place - start + 1

    def describe(self, number: int) -> str:
        """Name row `number` of `raw` by its place in the file."""
        name, place = self.found(number)
        return f"{self.key}: row {place} of {name or self.label}"


_decode = json.JSONDecoder().raw_decode


def _decoded(text: str) -> Any:
    """`json.loads` without what it does around a value that begins with the text, as most do."""
    return _decode(text)[0] if text.startswith("{") else json.loads(text)


def load_parts(recipe: Recipe, splits: Sequence[str] = SPLITS) -> list[Part]:
    """Load the raw rows of every data set of a recipe that has rows in `splits`, and divide them into splits.

    The split of a row of `data.datasets` depends on `data.seed`, `data.splits` and its row number only: not on the
    template, the tokenizer or `max_length`, so that runs with different settings are compared on the same held-out
    rows. The rows of `data.validation` and `data.test` are all held out.

    Raises:
        DataError: a file, URL or Hub id that cannot be read, or whose rows have no known format.
    """
    parts = []
    shared = any(name == "train" or getattr(recipe.data.splits, name) for name in splits)
    if shared and any(entry.streaming for entry in recipe.data.datasets):
        raise DataError(
            "data.datasets[].streaming: rows that are read as they come cannot be counted, held out or looked up "
            "ahead of a run; set streaming: false here, with rows: N if the whole set is too large"
        )
    for i, entry in enumerate(recipe.data.datasets if shared else ()):
        part = _part(entry, f"data.datasets[{i}]", recipe, i)
        parts.append(dataclasses.replace(part, rows=_split_rows(len(part.raw), recipe, i)))
    for split in ("validation", "test"):
        for i, entry in enumerate((getattr(recipe.data, split) or ()) if split in splits else ()):
            part = _part(entry, f"data.{split}[{i}]", recipe, len(recipe.data.datasets) + i)
            rows = {name: np.arange(len(part.raw) if name == split else 0) for name in ("validation", "test", "train")}
            parts.append(dataclasses.replace(part, rows=rows))
    return parts


def _part(entry: DatasetEntry, key: str, recipe: Recipe, number: int) -> Part:
    """One entry with its raw rows, not yet divided; `number` goes into the seed."""
    label = label_of(entry, key)
    raw, drawn, files = load_raw(entry, label, key)
    if entry.rows is not None:
        some = _draw(len(raw), entry.rows, recipe.data.seed, number, f"{key}.rows")
        raw = raw.select(some)
        drawn = some if drawn is None else drawn[some]
    fmt, columns = shape(shape_of(entry), columns_of(raw), label, key)
    rules, shares = rules_of(recipe, columns), (entry.weight, entry.repeat)
    return Part(label, raw, fmt, columns, {}, key, drawn, *shares, files, rules)


def rules_of(recipe: Recipe, columns: dict[str, str]) -> Rules:
    """What a recipe says of how the rows of an entry are read."""
    data = recipe.data
    return Rules(
        frozenset(data.ignore), data.strip, dict(data.template_options), frozenset((*columns, *columns.values()))
    )


def shape(asked: Shape, found: list[str], label: str, key: str) -> tuple[str, dict[str, str]]:
    """The format of rows with the columns `found`, and which of them the recipe maps to a name of ours.

    Raises:
        DataError: a column that is mapped or that the format needs is not there, or no format fits.
    """
    fmt, columns = asked[0], dict(asked[1])
    absent = [f"{ours}: {theirs}" for ours, theirs in columns.items() if theirs not in found]
    if absent:
        raise DataError(
            f"{key}.columns: {label} has no column for {', '.join(absent)}; its columns are {', '.join(found)}"
        )
    present = list(dict.fromkeys([*found, *columns]))
    if fmt is None:
        fmt = detect_format(present, f"{key}: {label}")
    elif missing := FORMATS[fmt].lacks(present):
        raise DataError(
            f"{key}: {label} is read as {fmt}, which needs the column {', '.join(missing)}; "
            f"its columns are {', '.join(found)}. Set format or columns for it."
        )
    return fmt, columns


def shape_of(entry: DatasetEntry) -> Shape:
    """The shape that an entry gives its rows."""
    return entry.format or (SOURCES[entry.name].format if entry.name else None), dict(entry.columns or {})


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


def load_raw(entry: DatasetEntry, label: str, key: str) -> Raw:
    """The rows of one entry."""
    try:
        splits = splits_of(entry, label, key)
        return _read(splits, entry.split or "train", shape_of(entry), label, key)
    except DataError:
        raise
    except Exception as error:
        raise DataError(not_read(entry, label, key, error)) from error


def _read(splits: Splits, wanted: str, asked: Shape, label: str, key: str) -> Raw:
    """The rows of the splits, or parts of them, that are wanted."""
    from datasets import concatenate_datasets

    names = _names_of_splits(wanted, splits, label, key)
    fetch([file for name in names for file in splits[name]])
    found, files, starts, lengths = [], [], {}, {}
    total = 0
    for name in names:
        starts[name] = total
        for file in splits[name]:
            try:
                rows = read_file(file.here(), file.suffix, file.name)
            except DataError as error:
                raise DataError(f"{key}: {error}") from error
            files.append((file.name, total))
            found.append(rows)
            total += len(rows)
        lengths[name] = total - starts[name]
    if len(found) > 1:
        _refuse_different(files, found, asked, label, key)
    raw = found[0] if len(found) == 1 else concatenate_datasets(found)
    drawn = None
    if "[" in wanted:
        drawn = _slice(wanted, lengths, starts, key)
        if not len(drawn):
            raise DataError(f"{key}.split: {wanted} of {label} holds no row")
        raw = raw.select(drawn)
    return raw, drawn, tuple(files) if len(files) > 1 else ()


def _refuse_different(files: list[tuple[str, int]], found: list[Dataset], asked: Shape, label: str, key: str) -> None:
    """Rows of one data set whose formats differ from file to file would be dropped as unreadable: an error."""
    formats: dict[str, str] = {}
    for (name, _), raw in zip(files, found, strict=True):
        formats.setdefault(shape(asked, columns_of(raw), name, key)[0], name)
    if len(formats) > 1:
        listed = ", ".join(f"{name} is read as {fmt}" for fmt, name in formats.items())
        raise DataError(
            f"{key}: the files of {label} differ in their columns: {listed}. Give each its own entry in "
            "data.datasets, or say which columns to read with format and columns"
        )


_SPLIT = re.compile(r"\s*([^\[\s]+)\s*(\[.*\])?\s*")


def _names_of_splits(wanted: str, splits: Splits, label: str, key: str) -> list[str]:
    """The splits that `split: train+test[:10%]` names, each once; `all` are all of them."""
    if wanted == "all" and "all" not in splits:
        return list(splits)
    names = []
    for part in wanted.split("+"):
        found = _SPLIT.fullmatch(part)
        name = found[1] if found else part
        if name not in splits:
            have = ", ".join(splits)
            raise DataError(
                f"{key}.split: {label} has no split {name!r}; it has {have}. Name one of them, e.g. split: "
                f"{next(iter(splits))}"
            )
        names.append(name)
    return list(dict.fromkeys(names))


def _slice(wanted: str, lengths: dict[str, int], starts: dict[str, int], key: str) -> np.ndarray:
    """Row numbers of `train[:10%]` and its like, in the rows of all splits end to end."""
    from datasets import ReadInstruction

    try:
        instructions = ReadInstruction.from_spec(wanted).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{key}.split: found {wanted}, expected a split or a part of it, such as train[:90%] or train[100:200]: "
            f"{first_line(error)}"
        ) from error
    pieces = [
        np.arange(found.from_ or 0, lengths[found.splitname] if found.to is None else found.to)
        + starts[found.splitname]
        for found in instructions
    ]
    return np.concatenate(pieces).astype(np.int64)


def splits_of(entry: DatasetEntry, label: str, key: str) -> Splits:
    """The files of one entry, by split."""
    if not (hub := hub_id(entry)):
        return located(location_of(entry), key)
    source = SOURCES[entry.name] if entry.name else None
    files = dict(source.files) if source and source.files else None
    if files and entry.config:  # a folder of the repository, as hh-rlhf's `helpful-base`
        folders = sorted({name.split("/")[0] for names in files.values() for name in names})
        if entry.config not in folders:
            raise DataError(f"{key}.config: {label} has no part {entry.config!r}; it has {', '.join(folders)}")
        files = {s: [f for f in names if f.startswith(f"{entry.config}/")] for s, names in files.items()}
    return hub_splits(hub, entry.config, entry.revision, files, key)


def stream_files(entry: DatasetEntry, label: str, key: str) -> list[DataFile]:
    """The files of one entry that streams, in the order in which they are read."""
    try:
        splits = splits_of(entry, label, key)
    except DataError:
        raise
    except Exception as error:
        raise DataError(not_read(entry, label, key, error)) from error
    return [file for name in _names_of_splits(entry.split or "train", splits, label, key) for file in splits[name]]


def files_on_disk(entry: DatasetEntry, key: str) -> list[DataFile]:
    """The local files of one entry that its `split` takes rows from."""
    label = label_of(entry, key)
    splits = located(location_of(entry), key)
    return [file for name in _names_of_splits(entry.split or "train", splits, label, key) for file in splits[name]]


def label_of(entry: DatasetEntry, key: str) -> str:
    """What an entry is called in messages and in an account."""
    url = entry.url and bare_url(entry.url)
    return entry.label or entry.name or entry.hub or entry.path or url or key


def hub_id(entry: DatasetEntry) -> str | None:
    """The data set on the Hub that an entry stands for."""
    return entry.hub or (SOURCES[entry.name].hub if entry.name else None)


def location_of(entry: DatasetEntry) -> str:
    """The path or URL that an entry which is not on the Hub stands for."""
    source = SOURCES[entry.name] if entry.name else None
    return str(entry.path or entry.url or (source and (source.url or source.path)))


def not_read(entry: DatasetEntry, label: str, key: str, error: Exception) -> str:
    """Say in words why a data set could not be read or fetched, and what to try."""
    from datasets.config import HF_DATASETS_CACHE

    cause = error.__cause__ or error
    named = getattr(cause, "filename", None)
    if named and Path(HF_DATASETS_CACHE).is_relative_to(str(named)):  # the cache itself, or a folder above it
        return (
            f"the cache folder {HF_DATASETS_CACHE} cannot be made: {named}: {getattr(cause, 'strerror', cause)}; set "
            "HF_HOME (or HF_DATASETS_CACHE) to a folder that can be written"
        )
    said = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    reason = "\n".join(said[:6]) or type(error).__name__
    if entry.path:
        return f"{key}: {label} could not be read: {reason}"
    where = "the Hugging Face Hub" if hub_id(entry) else "its URL"
    return (
        f"{key}: {label} could not be fetched from {where}: {reason}\n"
        f"{_what_to_try(error)}A local copy works too: data.datasets=[{{path: FILE}}]"
    )


def _what_to_try(error: BaseException | None) -> str:
    """The advice that goes with a failure to fetch: on the name or the network where it is one of these."""
    names: set[str] = set()
    while error is not None:
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError"}:
        return "Check the spelling; a private or gated data set needs `hf auth login` or HF_TOKEN. "
    away = {"ConnectionError", "TransportError", "TimeoutError", "URLError", "OfflineModeIsEnabled", "HfHubHTTPError"}
    return "Check the network and the spelling. " if names & {*away, "LocalEntryNotFoundError", "HTTPError"} else ""


def conversations(recipe: Recipe, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The usable rows of one split as text, for evaluation: `messages`, `dataset`, `category` (or None), `_row`.

    `_row` is the row as it stands in its file, for metrics of the user's own.

    >>> conversations(load_recipe("quickstart"), "test")[0]["messages"][-1]["role"]
    'assistant'
    """
    found: list[dict[str, Any]] = []
    for part in load_parts(recipe, [split]):
        found += _usable(part, part.raw.select(part.rows[split]))
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


def drawn(recipe: Recipe, split: str, most: int) -> list[dict[str, Any]]:
    """Usable rows of one split as they stand in their files, with `messages` and `dataset`, drawn by `data.seed`.

    Fewer of them are the beginning of more.

    >>> drawn(load_recipe("quickstart"), "validation", 1)[0]["dataset"]
    'quickstart'
    """
    parts = load_parts(recipe, [split])
    places = [(part, number) for part in parts for number in part.rows[split]]
    found: list[dict[str, Any]] = []
    for place in np.random.default_rng([recipe.data.seed, len(places)]).permutation(len(places)):
        if len(found) >= most:
            break
        part, number = places[place]
        row = part.raw[int(number)]
        try:
            found.append({**part.row(row), "messages": part.conversation(row), "dataset": part.label})
        except Unusable:  # counted by `prepare`
            continue
    return found


def file_conversations(
    path: str,
    limit: int | None = None,
    shapes: Sequence[Shape] = (),
    recipe: Recipe | None = None,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """The usable rows of a file, folder, pattern or URL, as `conversations` gives them.

    Args:
        recipe: says how rows are read: `data.ignore`, `data.strip`, `data.template_options`.
        shapes: how rows like these may be read, the first that fits; else their columns tell.
        strict: they are to be read as one of the shapes.
    """
    key = "--data"
    try:
        splits = located(path, key)
        wanted = next((name for name in ("test", "validation") if name in splits and len(splits) > 1), "all")
        raw, drawn, files, fmt, columns = _read_as_one_of(
            shapes if strict else [*shapes, (None, {})], splits, wanted, path, key
        )
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{key}: {path} could not be read: {first_line(error)}") from error
    rules = rules_of(recipe, columns) if recipe else Rules(read=frozenset((*columns, *columns.values())))
    part = Part(path, raw, fmt, columns, {}, key, drawn, files=files, rules=rules)
    found = _usable(part, raw)
    if not found:
        raise DataError(f"{key}: no row of {path} has a question and an answer")
    return found[:limit]


def _read_as_one_of(
    shapes: Sequence[Shape], splits: Splits, wanted: str, label: str, key: str
) -> tuple[Dataset, np.ndarray | None, tuple[tuple[str, int], ...], str, dict[str, str]]:
    """The rows, their format and columns by the first shape that fits them."""
    for asked in shapes:
        try:
            raw = _read(splits, wanted, asked, label, key)
            return *raw, *shape(asked, columns_of(raw[0]), label, key)
        except DataError:
            if asked is shapes[-1]:
                raise
    raise AssertionError("there is a last shape")


def _usable(part: Part, rows: Dataset) -> list[dict[str, Any]]:
    found = []
    for raw in rows:
        try:
            messages, row = part.conversation(raw), part.row(raw)
            found.append({"messages": messages, "dataset": part.label, "category": row.get("category"), "_row": row})
        except Unusable:  # counted by `prepare`
            continue
        except Unread as unread:
            raise DataError(f"{part.key}: {part.label}: {unread}") from unread
    return found
