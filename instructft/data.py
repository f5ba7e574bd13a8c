"""The one road that data takes: load, map to conversations, split, encode, count.

    files, URLs, Hub ──► raw rows ──► conversations ──► input_ids, labels
                          │ split by row number, seeded: the same on every process and for every template

Nothing is lost without a word: a row is trained, held out, or counted in `dropped` under its reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.encode import IGNORE_INDEX, encoder
from instructft.errors import DataError, TemplateError
from instructft.files import ROW, SUFFIXES, columns_of, download, first_line, read_file, suffix_of
from instructft.pack import pack
from instructft.sources import FORMATS, SOURCES, Message, Unusable, detect_format, to_conversation

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe import DatasetEntry, Recipe

SPLITS = ("train", "validation", "test")


# --------------------------------------------------------------------------------------------------------------------
# Load
# --------------------------------------------------------------------------------------------------------------------


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
    for i, entry in enumerate(recipe.data.datasets):
        key = f"data.datasets[{i}]"
        label = entry.name or entry.hub or entry.path or entry.url or key
        raw = _load(entry, label, key)
        if len(raw) == 0:
            raise DataError(f"{key}: {label} holds no rows")
        drawn = None
        if entry.rows is not None:
            drawn = _draw(len(raw), entry.rows, recipe.data.seed, i, f"{key}.rows")
            raw = raw.select(drawn)
        columns = dict(entry.columns or {})
        found = columns_of(raw)
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
        parts.append(Part(label, raw, fmt, columns, _split_rows(len(raw), recipe, i), key, drawn))
    return parts


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


def _load(entry: DatasetEntry, label: str, key: str) -> Dataset:
    import datasets

    source = SOURCES[entry.name] if entry.name else None
    try:
        if entry.name == "quickstart":
            from instructft.quickstart import rows

            return datasets.Dataset.from_list(rows())
        hub = entry.hub or (source.hub if source else None)
        if hub:
            split = entry.split or "train"
            files = dict(source.files) if source and source.files else None
            if files and entry.config:  # a folder of the repository, as hh-rlhf's `helpful-base`
                files = {s: [f for f in names if f.startswith(f"{entry.config}/")] for s, names in files.items()}
                if not any(files.values()):
                    folders = sorted({f.split("/")[0] for names in dict(source.files).values() for f in names})  # type: ignore[union-attr, arg-type]
                    raise DataError(f"{key}.config: {label} has no part {entry.config!r}; it has {', '.join(folders)}")
            return datasets.load_dataset(
                hub,
                name=None if files else entry.config,
                data_files=files,
                split=split,
                revision=entry.revision,
            )
        location = entry.path or entry.url or (source.url if source else None)
        return _read_file(str(location), key)
    except DataError:
        raise
    except Exception as error:
        raise DataError(_not_read(entry, label, key, error)) from error


def _read_file(location: str, key: str) -> Dataset:
    """The rows of a local file or a URL."""
    suffix = suffix_of(location)
    if suffix not in SUFFIXES:
        raise DataError(f"{key}: {location} ends in {suffix or 'nothing'}; files may be {', '.join(sorted(SUFFIXES))}")
    if "://" in location:
        path = download(location)
    else:
        path = Path(location).expanduser()
        if not path.is_file():
            raise DataError(f"{key}: there is no file {location}" + (" (it is a folder)" if path.is_dir() else ""))
    try:
        return read_file(path, suffix, location)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def _not_read(entry: DatasetEntry, label: str, key: str, error: Exception) -> str:
    if entry.path:
        return f"{key}: {label} could not be read: {first_line(error)}"
    where = "the Hugging Face Hub" if entry.hub or (entry.name and SOURCES[entry.name].hub) else "its URL"
    return (
        f"{key}: {label} could not be fetched from {where}: {first_line(error)}\n"
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


# --------------------------------------------------------------------------------------------------------------------
# Encode and count
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Encoded splits with their account.

    Args:
        splits: rows of `input_ids` and `labels`, two lists of int32 of the same length; an empty split is left out.
        dropped: rows that no split holds, by reason.
        cut: rows that were longer than `max_length` and are trained without their end.
        cut_tokens: tokens that these rows lost.
    """

    splits: DatasetDict
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    cut_tokens: int = 0

    @property
    def rows(self) -> dict[str, int]:
        """Rows in each split, 0 for an empty one."""
        return {name: len(self.splits[name]) if name in self.splits else 0 for name in SPLITS}

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Tokens in each split."""
        return {name: sum(len(ids) for _, ids, _ in _arrays(split)) for name, split in self.splits.items()}

    @cached_property
    def supervised_tokens(self) -> dict[str, int]:
        """Tokens that carry loss in each split."""
        return {
            name: sum(int((labels != IGNORE_INDEX).sum()) for _, _, labels in _arrays(split))
            for name, split in self.splits.items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every id and label of every split, in order: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            digest.update(name.encode())
            for lengths, ids, labels in _arrays(split):
                for array in (lengths, ids, labels):
                    digest.update(array.astype(np.int32).tobytes())
        return digest.hexdigest()[:16]


def _arrays(split: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The lengths of rows, and all their `input_ids` and `labels` as flat arrays, a few thousand rows at a time."""
    for table in split.with_format("arrow").iter(batch_size=4096):
        ids, labels = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
        yield ids.value_lengths().to_numpy(), ids.flatten().to_numpy(), labels.flatten().to_numpy()


def prepare_dataset(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Load, split and encode the recipe's data.

    Returns:
        a `DatasetDict` with `train`, and `validation` and `test` where the recipe asks for them; each row holds
        `input_ids` and `labels`, two lists of T ints, a label of -100 carrying no loss.

    >>> prepare_dataset(recipe, tokenizer)["train"][0].keys()
    dict_keys(['input_ids', 'labels'])

    Raises:
        DataError: data that cannot be read, or of which nothing is left to train on.
        TemplateError: a template under which a row has no honest mask.
    """
    return prepare(recipe, tokenizer).splits


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """`prepare_dataset` with the account of what became of every row."""
    from datasets import DatasetDict, concatenate_datasets

    pieces: dict[str, list[Dataset]] = {name: [] for name in SPLITS}
    dropped: Counter[str] = Counter()
    cut = cut_tokens = 0
    for part in load_parts(recipe):
        encoded = _encode(part, recipe, tokenizer)
        used = np.sort(np.concatenate(list(part.rows.values())))
        verdict = np.asarray(encoded["dropped"][:], dtype=object)
        lost = np.asarray(encoded["cut_tokens"][:])
        reasons = Counter(str(reason) for reason in verdict[used] if reason)
        dropped.update(reasons)
        keep = {name: rows[verdict[rows] == ""] for name, rows in part.rows.items()}
        kept = np.concatenate(list(keep.values()))
        if len(kept) == 0:
            raise DataError(f"{part.key}: no row of {part.label} can be trained on: {_reasons(reasons)}")
        cut += int((lost[kept] > 0).sum())
        cut_tokens += int(lost[kept].sum())
        encoded = encoded.select_columns(["input_ids", "labels"])
        for name, rows in keep.items():
            if len(rows):
                pieces[name].append(encoded.select(rows))
    if not pieces["train"]:
        raise DataError(
            "data.splits leaves no row to train on"
            + (f"; of the few there were, some were dropped: {_reasons(dropped)}" if dropped else "")
        )
    for name in ("validation", "test"):
        if getattr(recipe.data.splits, name) > 0 and not pieces[name]:
            raise DataError(
                f"data.splits.{name}: {getattr(recipe.data.splits, name)} of so few rows is no row at all; "
                f"raise it, or set it to 0"
            )
    splits = DatasetDict({name: concatenate_datasets(rows) for name, rows in pieces.items() if rows})
    if recipe.data.packing:
        for name in ("train", "validation"):
            if name in splits:
                splits[name] = pack(splits[name], recipe.data.max_length, recipe.data.seed)
    return Prepared(splits, dropped, cut, cut_tokens)


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.most_common()) or "none given"


def _encode(part: Part, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Encode all raw rows of a part, in order; a row that is dropped keeps its place and carries the reason."""
    from datasets import Features, List, Value

    data = recipe.data
    encode = partial(encoder(tokenizer).encode, train_on=data.train_on)
    shape = Features(
        {
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "dropped": Value("string"),
            "cut_tokens": Value("int32"),
        }
    )

    def encode_batch(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        verdicts: list[str] = []
        usable: list[list[Message]] = []
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            try:
                usable.append(part.conversation(dict(zip(names, values, strict=True))))
                verdicts.append("")
            except Unusable as reason:
                verdicts.append(reason.reason)
        try:
            rows = iter(encode(usable))
        except TemplateError:
            _blame(part, [n for n, verdict in zip(numbers, verdicts, strict=True) if not verdict], usable, encode)
            raise
        out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "dropped": [], "cut_tokens": []}
        for number, verdict in zip(numbers, verdicts, strict=True):
            row = {"input_ids": [], "labels": []} if verdict else next(rows)
            lost = 0
            if not verdict:
                length = len(row["input_ids"])
                lost = max(0, length - data.max_length)
                if lost and data.on_too_long == "error":
                    raise DataError(
                        f"{part.describe(number)} has {length} tokens, more than data.max_length ({data.max_length}); "
                        "raise it, or set data.on_too_long to truncate or drop"
                    )
                if lost and data.on_too_long == "drop":
                    verdict = "too_long"
                row = {name: values[: data.max_length] for name, values in row.items()}
                if not verdict and all(label == IGNORE_INDEX for label in row["labels"][1:]):
                    verdict = "answer_cut_away" if lost else "no_loss"
            if verdict:
                row, lost = {"input_ids": [], "labels": []}, 0
            out["input_ids"].append(row["input_ids"])
            out["labels"].append(row["labels"])
            out["dropped"].append(verdict)
            out["cut_tokens"].append(lost)
        return out

    return part.raw.map(
        encode_batch,
        with_indices=True,
        batched=True,
        batch_size=1000,
        remove_columns=part.raw.column_names,
        features=shape,
        new_fingerprint=_fingerprint(part, recipe, tokenizer),
        desc=None,
    )


def _blame(part: Part, numbers: list[int], conversations: list[list[Message]], encode: Callable[..., Any]) -> None:
    """Name the row of a batch that the template does not take."""
    for number, messages in zip(numbers, conversations, strict=True):
        try:
            encode([messages])
        except TemplateError as error:
            raise TemplateError(f"{part.describe(number)}: {error}") from error


def _fingerprint(part: Part, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that shapes the encoded rows: a cache made under one template is never used with another."""
    shaped_by: Sequence[Any] = (
        _code(),
        part.raw._fingerprint,
        part.format,
        sorted(part.columns.items()),
        tokenizer.chat_template,
        tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else repr(tokenizer),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        recipe.data.train_on,
        recipe.data.max_length,
        recipe.data.on_too_long,
    )
    return hashlib.sha256(json.dumps(shaped_by, default=str).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of the code that makes a row: an upgrade that changes it never meets rows of the old one."""
    digest = hashlib.sha256()
    for name in ("data.py", "encode.py", "sources.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]
