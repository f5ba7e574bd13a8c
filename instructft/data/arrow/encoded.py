"""All rows of a data set as tokens in an Arrow file, made once for all that shapes them and mapped from there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from instructft.data.arrow.store import cached, mapped, write
from instructft.data.arrow.token_rows import PARTS, cuts, ranges
from instructft.data.arrow.workers import cores, in_order
from instructft.data.batches.branches import fold_all
from instructft.data.load import Part
from instructft.data.readers import ROW
from instructft.data.tokenize import Batches, schema, shaped_by, written
from instructft.progress import Progress
from instructft.prompt.loss_mask import encoder

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe

TRAINED = "trained"  # column with the number of a row among all that its data set is trained as
_ROWS_PER_PROCESS = 1_000  # fewer rows than this are encoded sooner than another process starts
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 500, 1 << 22  # what one process encodes together


def encode_part(part: Part, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Encode all raw rows of a part, in order; a row that is dropped keeps its place and carries the reason.

    A raw row that is trained as several rows has them end to end, and in `turns` the tokens of each (`trained_rows`).
    """
    encoder(tokenizer)  # a template that cannot be trained is refused here, not in another process
    whole = written(tokenizer)
    fingerprint = shaped_by(part.raw._fingerprint, part, recipe, tokenizer, whole)
    batches = Batches(part, recipe.data, tokenizer)
    return mapped(cached(fingerprint, lambda path: _encode(part.raw, batches, whole, path)), fingerprint)


def _encode(raw: Dataset, batches: Batches, whole: str, path: Path) -> None:
    """Encode rows into a file, some at a time: in several processes, and in the order of one.

    Args:
        whole: the tokenizer as a text.
    """
    import pyarrow as pa

    if batches.many:
        encoder(batches.tokenizer).make_fast(whole)  # here, once: processes that are forked inherit it
    pieces = _pieces(raw)
    work = _Work(raw.with_format("arrow"), batches, pieces)
    processes = min(cores(), len(raw) // _ROWS_PER_PROCESS)
    with _one_thread_each(processes), Progress("tokenizing", len(raw)) as progress:

        def made() -> Iterator[pa.RecordBatch]:
            for found in in_order(work, len(pieces), processes):
                yield (batch := pa.ipc.read_record_batch(found, schema()))
                progress.add(batch.num_rows)

        write(path, schema(), made())


@dataclass(frozen=True)
class _Work:
    """Encodes one piece of the rows, for `in_order`."""

    raw: Dataset
    batches: Batches
    pieces: list[tuple[int, int]]

    def __call__(self, number: int) -> pa.Buffer:
        start, end = self.pieces[number]
        return self.batches(self.raw[start:end], range(start, end)).serialize()


def _pieces(raw: Dataset) -> list[tuple[int, int]]:
    """Where rows are cut for encoding: some at a time, fewer where they are long."""
    import pyarrow.compute as pc

    sizes = [pc.binary_length(table.column(ROW)).to_numpy() for table in raw.with_format("arrow").iter(_ROWS_AT_ONCE)]
    least = _BYTES_AT_ONCE // _ROWS_AT_ONCE
    return list(cuts(np.maximum(np.concatenate(sizes), least), least * _ROWS_AT_ONCE))


# --------------------------------------------------------------------------------------------------------------------
# Turns folded
# --------------------------------------------------------------------------------------------------------------------


def has_turns(encoded: Dataset, numbers: np.ndarray) -> bool:
    """Whether any of these raw rows is trained as several rows."""
    return bool((_turns_of(encoded)[numbers] > 1).any())


def _turns_of(encoded: Dataset) -> np.ndarray:
    chunks = encoded.data.column("turns").chunks
    return np.concatenate([np.zeros(0, dtype=np.int64), *(chunk.value_lengths().to_numpy() for chunk in chunks)])


def fold_part(encoded: Dataset, most: int, worth: float) -> Dataset:
    """`encode_part`'s rows with the turns of each raw row folded, where that is worth it (`fold_all`).

    `turns` holds the tokens of each row that is left, `segments` how many parts it has, `seq_lengths` and `seq_starts`
    these parts (`instructft.data.batches.branches`), all rows end to end.

    Args:
        most: tokens of a row.
    """
    fingerprint = blake2b(f"{encoded._fingerprint} folded {most} {worth}".encode(), digest_size=8).hexdigest()
    return mapped(cached(fingerprint, lambda path: _fold(encoded, most, worth, path)), fingerprint)


def _fold(encoded: Dataset, most: int, worth: float, path: Path) -> None:
    import pyarrow as pa

    work = _Folding(encoded, most, worth)
    pieces = -(-len(encoded) // _ROWS_AT_ONCE)
    processes = min(cores(), len(encoded) // _ROWS_PER_PROCESS)
    made = in_order(work, pieces, processes)
    write(path, _folded_schema(), (pa.ipc.read_record_batch(found, _folded_schema()) for found in made))


def _folded_schema() -> pa.Schema:
    import pyarrow as pa

    names = ("input_ids", "labels", "turns", "segments", *PARTS)
    return pa.schema({name: pa.list_(pa.int64() if name == "turns" else pa.int32()) for name in names})


@dataclass(frozen=True)
class _Folding:
    """Folds one piece of the rows, for `in_order`."""

    encoded: Dataset
    most: int
    worth: float

    def __call__(self, number: int) -> pa.Buffer:
        import pyarrow as pa

        start = number * _ROWS_AT_ONCE
        names = ["input_ids", "labels", "turns"]
        found = self.encoded.select_columns(names).with_format("arrow")[start : start + _ROWS_AT_ONCE].combine_chunks()
        ids, labels, turns = (found.column(name).combine_chunks() for name in names)
        tokens, wanted, sizes = (column.flatten().to_numpy() for column in (ids, labels, turns))
        rows = fold_all(tokens, wanted, sizes, turns.value_lengths().to_numpy(), self.most, self.worth)
        every, parts = (_sums(values, rows.each) for values in (rows.sizes, rows.segments))  # of each raw row
        values = (rows.input_ids, rows.labels, rows.sizes, rows.segments, rows.seq_lengths, rows.seq_starts)
        each = (every, every, rows.each, rows.each, parts, parts)
        batch = pa.record_batch([_lists(v, n) for v, n in zip(values, each, strict=True)], schema=_folded_schema())
        return batch.serialize()


def _sums(values: np.ndarray, each: np.ndarray) -> np.ndarray:
    """Sums over the first `each[0]` of the values, the next `each[1]`, and so on."""
    before = np.concatenate(([0], np.cumsum(values)))
    ends = np.cumsum(each)
    sums: np.ndarray = before[ends] - before[ends - each]
    return sums


def _lists(values: np.ndarray, sizes: np.ndarray) -> pa.ListArray:
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(np.concatenate(([0], np.cumsum(sizes))), type=pa.int32()), values)


# --------------------------------------------------------------------------------------------------------------------
# What is read of them
# --------------------------------------------------------------------------------------------------------------------


def verdicts(encoded: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `encode_part`'s rows why it is dropped ("" when it is not), and the tokens that it lost."""
    found = [chunk.dictionary_encode() for chunk in encoded.data.column("dropped").chunks]
    words = [np.array(one.dictionary.to_pylist(), dtype=object)[one.indices.to_numpy()] for one in found]
    lost = [chunk.to_numpy() for chunk in encoded.data.column("cut_tokens").chunks]
    return np.concatenate(words), np.concatenate(lost)


def notes(encoded: Dataset, numbers: np.ndarray) -> Iterator[str]:
    """What was found in these raw rows, whose numbers rise: few of the texts are in memory at a time."""
    import pyarrow as pa

    start = 0
    for chunk in encoded.data.column("note").chunks:
        first, last = np.searchsorted(numbers, [start, start + len(chunk)])
        yield from chunk.take(pa.array(numbers[first:last] - start)).to_pylist()
        start += len(chunk)


def trained_rows(encoded: Dataset, most: int | None = None, parts: bool = False) -> tuple[Dataset, np.ndarray]:
    """The rows that are trained, of `encode_part`'s or `fold_part`'s, and how many of them each raw row has.

    Each of a row's `turns` is a row by itself, and of a document each part of `most` tokens. No token is moved: the
    rows are other borders over the same file.

    Args:
        parts: rows say of which parts they are (`seq_lengths`, `seq_starts`), also those that have one.

    A column `TRAINED` numbers the rows; it goes with them through every selection.
    """
    import pyarrow as pa
    from datasets import Dataset

    none = np.zeros(0, dtype=np.int64)
    tables, every, known = [], [none], 0
    for batch in encoded.data.to_batches():
        turns, ids, labels = (batch.column(name) for name in ("turns", "input_ids", "labels"))
        sizes, each = turns.flatten().to_numpy(), turns.value_lengths().to_numpy().astype(np.int64)
        if most is not None:
            pieces = -(-sizes // most)
            place = ranges(np.zeros(len(sizes), dtype=np.int64), pieces)
            each = np.bincount(np.repeat(np.arange(len(each)), each), weights=pieces, minlength=len(each))
            each, sizes = each.astype(np.int64), np.minimum(np.repeat(sizes, pieces) - place * most, most)
        offsets = pa.array(np.concatenate(([0], np.cumsum(sizes))), type=pa.int32())
        lists = {
            name: pa.ListArray.from_arrays(offsets, column.flatten())
            for name, column in (("input_ids", ids), ("labels", labels))
        }
        if "segments" in batch.schema.names:
            segments = batch.column("segments").flatten().to_numpy()
            lists |= {name: _lists(batch.column(name).flatten(), segments) for name in PARTS}
        elif parts:
            one = np.ones(len(sizes), dtype=np.int64)
            values = (sizes, np.zeros_like(sizes))
            lists |= {name: _lists(v.astype(np.int32), one) for name, v in zip(PARTS, values, strict=True)}
        tables.append(pa.table({**lists, TRAINED: pa.array(np.arange(known, known + len(sizes)))}))
        known += len(sizes)
        every.append(each)
    made_of = f"{encoded._fingerprint} rows 2 {most} {parts}".encode()
    fingerprint = blake2b(made_of, digest_size=8).hexdigest()
    return Dataset(pa.concat_tables(tables), fingerprint=fingerprint), np.concatenate(every)


@contextmanager
def _one_thread_each(processes: int) -> Iterator[None]:
    """Let the tokenizers library keep to one thread in each of several processes; it warns of a fork otherwise."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if processes > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if processes > 1:
            os.environ.pop("TOKENIZERS_PARALLELISM")
            if before is not None:
                os.environ["TOKENIZERS_PARALLELISM"] = before
