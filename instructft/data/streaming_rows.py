"""The road of a streamed row: read, shuffle, encode, mix, pack, each step a generator that holds little.

    for each data set:  raw rows ──► shuffle ──► encode ──┐
                        (in order)   (10,000)    (1,000)  ├──► mix by weight ──► packs ──► trainer
    the next one:       raw rows ──► shuffle ──► encode ──┘                      (1,000)

The figures are rows in memory, the most that is ever held.
"""

from __future__ import annotations

import gzip
import random
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from instructft.data import readers
from instructft.data.load import Part, existing, known_suffix, load_raw, not_read
from instructft.data.packing import best_fit
from instructft.data.sources import SOURCES
from instructft.data.tokenize import drop_reasons
from instructft.errors import DataError
from instructft.formatting import first_line
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    from instructft.recipe.schema import DatasetEntry

SHUFFLED = 10_000  # raw rows of a data set among which the next one is drawn
ENCODED = 1_000  # rows encoded at a time, packed together, and looked at for the account ahead of a run

Row = dict[str, list[int]]
Encoded = tuple[np.ndarray, np.ndarray]  # input_ids and labels of one row
T = TypeVar("T")


@dataclass
class Tally:
    """What has passed so far in one iteration of a stream."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    cut_tokens: int = 0


@dataclass(frozen=True)
class Stream:
    """One entry of `data.datasets`: where its raw rows come from, and what makes rows of them."""

    part: Part
    read: Callable[[], Iterator[dict[str, Any]]]  # begins anew at each call
    encode: Callable[..., Any]
    known_by: Any  # changes when the raw rows do, as far as that can be told without reading them


class Streams:
    """All streams of a recipe, and how they become one.

    Args:
        streams: one for each of `data.datasets`.
        data: the `data` section of the recipe.
    """

    def __init__(self, streams: list[Stream], data: Any):
        self.streams, self.data = streams, data

    def rows(self, number: int, tally: Tally, shuffle: bool = True) -> Iterator[Row]:
        """The rows (packs) of pass `number`, counted in `tally`."""
        rows = self._mixed(number, tally, shuffle)
        packs = _packs(rows, self.data.max_length, self.data.seed) if self.data.packing else ([row] for row in rows)
        for documents in packs:
            ids = np.concatenate([ids for ids, _ in documents])
            labels = np.concatenate([labels for _, labels in documents])
            lengths = [len(ids) for ids, _ in documents]
            row = {"input_ids": ids.tolist()}
            if self.data.packing:  # no first token is predicted from its neighbour's last
                labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
                row["seq_lengths"] = lengths
            row["labels"] = labels.tolist()
            tally.rows += len(documents)
            tally.tokens += len(ids)
            tally.supervised_tokens += int((labels != IGNORE_INDEX).sum())
            yield row

    def _mixed(self, number: int, tally: Tally, shuffle: bool) -> Iterator[Encoded]:
        """Rows of all streams, each as often as its weight says."""
        everyone = range(len(self.streams))
        weights = [stream.part.weight for stream in self.streams]
        draw = random.Random(f"{self.data.seed} mix {number}")
        rounds = [0 for _ in everyone]  # how often each was read to its end
        opened = [self._one(i, (number, 0), tally, shuffle) for i in everyone]
        while True:
            i = draw.choices(everyone, weights)[0] if len(weights) > 1 else 0
            row = next(opened[i], None)
            if row is None:
                rounds[i] += 1
                if all(rounds):
                    return
                opened[i] = self._one(i, (number, rounds[i]), tally, shuffle)
                row = next(opened[i])  # `_one` gives a row or raises
            yield row

    def _one(self, i: int, number: tuple[int, int], tally: Tally, shuffle: bool) -> Iterator[Encoded]:
        """Ids and labels of the rows of stream `i` that can be trained on, read once from start to end."""
        stream, given = self.streams[i], False
        rows: Iterator[tuple[int, dict[str, Any]]] = enumerate(stream.read())
        if shuffle:
            rows = shuffled(rows, random.Random(f"{self.data.seed} {i} {number}"), SHUFFLED)
        while batch := list(islice(rows, ENCODED)):
            ids, labels, lengths, lost, verdicts = stream.encode([row for _, row in batch], [n for n, _ in batch])
            tally.dropped.update(verdict for verdict in verdicts if verdict)
            tally.cut += int((lost > 0).sum())
            tally.cut_tokens += int(lost.sum())
            ends = np.cumsum(lengths)
            for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
                if end > start:
                    given = True
                    yield ids[start:end], labels[start:end]
        if not given:
            part = stream.part
            raise DataError(f"{part.key}: no row of {part.label} can be trained on: {drop_reasons(tally.dropped)}")


def shuffled(rows: Iterable[T], draw: random.Random, size: int) -> Iterator[T]:
    """All `rows`, each drawn from the `size` that were read last and are still there.

    >>> list(shuffled("abcdef", random.Random(1), 3))
    ['a', 'd', 'c', 'e', 'b', 'f']
    """
    rows = iter(rows)
    held = list(islice(rows, size))
    for row in rows:
        i = draw.randrange(size)
        yield held[i]
        held[i] = row
    draw.shuffle(held)
    yield from held


def _packs(rows: Iterator[Encoded], capacity: int, seed: int) -> Iterator[list[Encoded]]:
    """Documents that share a pack; none is split or dropped, and each window of rows is packed to the end."""
    while window := list(islice(rows, ENCODED)):
        for documents in best_fit([len(ids) for ids, _ in window], capacity, seed):
            yield [window[i] for i in documents]


def reader(entry: DatasetEntry, label: str, key: str) -> tuple[Callable[[], Iterator[dict[str, Any]]], Any]:
    """What reads the raw rows of one entry from the start, and what they are known by."""
    source = SOURCES[entry.name] if entry.name else None
    begin: Callable[[], Iterator[dict[str, Any]]]
    known_by: Any
    if entry.name == "quickstart":
        from instructft.data.quickstart import rows as made

        begin, known_by = (lambda: iter(made())), "quickstart"
    elif hub := entry.hub or (source.hub if source else None):
        raw = load_raw(entry, label, key)
        begin, known_by = (lambda: iter(raw)), [hub, entry.config, entry.split, entry.revision]
    else:
        location = str(entry.path or entry.url or (source.url if source else None))
        suffix = known_suffix(location, key)
        if "://" in location:
            begin, known_by = (lambda: _url(location, suffix)), location
        else:
            path = existing(location, key)
            begin, known_by = (lambda: _file(path, suffix, location)), [location, *path.stat()[6:9:2]]

    def read() -> Iterator[dict[str, Any]]:
        try:
            yield from islice(begin(), entry.rows)
        except DataError as error:
            raise error if str(error).startswith(key) else DataError(f"{key}: {error}") from error
        except Exception as error:
            raise DataError(not_read(entry, label, key, error)) from error

    return read, known_by


def _file(path: Path, suffix: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, a few in memory at a time; `.json` is one array, and is refused before it comes here."""
    if suffix != ".parquet":
        yield from readers.rows(path, suffix, name)
        return
    with path.open("rb") as file:
        yield from _parquet_rows(file, name)


def _url(url: str, suffix: str) -> Iterator[dict[str, Any]]:
    """The rows of a file on the web, none of which is put on the disk; with HF_HUB_OFFLINE=1 an earlier copy's."""
    from datasets import config

    if config.HF_HUB_OFFLINE:
        yield from _file(readers.download(url), suffix, url)
    elif suffix == ".parquet":  # its index stands at the end
        import fsspec

        with fsspec.open(url, "rb") as file:
            yield from _parquet_rows(file, url)
    else:
        request = urllib.request.Request(url, headers={"User-Agent": "instructft"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            body: Any = gzip.GzipFile(fileobj=answer) if suffix.endswith(".gz") else answer
            yield from readers.rows_of(body, suffix, url)
            if answer.length:  # bytes that were promised and did not come
                raise OSError(f"the connection broke {answer.length:,} bytes before the end")


def _parquet_rows(file: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{name} is not a whole Parquet file: {first_line(error)}") from error
