"""Conversations to rows of `input_ids` and `labels`, many at a time, and cached by all that shapes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.data.load import Part
from instructft.data.sources import Unusable
from instructft.errors import DataError, TemplateError
from instructft.prompt.loss_mask import IGNORE_INDEX, encoder
from instructft.prompt.render import Message

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe

_ROWS_PER_PROCESS = 5_000  # fewer rows than this are encoded sooner than another process starts
_MANY = 5_000  # rows; for fewer of them a faster tokenizer is not worth its proof


class Batches:
    """Encodes batches of raw rows. Holds no more than that takes, since it is sent to other processes."""

    def __init__(self, part: Part, data: Any, tokenizer: PreTrainedTokenizerBase):
        # the rows come as batches, so the part goes along without them
        self.part = dataclasses.replace(part, raw=None, rows={})
        self.train_on, self.max_length, self.on_too_long = data.train_on, data.max_length, data.on_too_long
        self.tokenizer = tokenizer
        self.many = part.raw is None or len(part.raw) >= _MANY  # a stream has no number of rows

    def __call__(self, table: pa.Table, numbers: list[int]) -> pa.Table:
        import pyarrow as pa

        ids, labels, lengths, lost, verdicts = self.encode(table.to_pylist(), numbers)
        offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), type=pa.int32())
        columns = {
            name: pa.ListArray.from_arrays(offsets, pa.array(x)) for name, x in (("input_ids", ids), ("labels", labels))
        }
        return pa.table({**columns, "dropped": verdicts, "cut_tokens": pa.array(lost, type=pa.int32())})

    def encode(
        self, batch: Sequence[dict[str, Any]], numbers: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Encode raw rows with these row numbers.

        Returns ids and labels end to end; for each row its tokens (0 when dropped), the tokens cut off, and why it is
        dropped ("" when it is not).
        """
        verdicts: list[str] = []
        usable: list[list[Message]] = []
        for raw in batch:
            try:
                usable.append(self.part.conversation(raw))
                verdicts.append("")
            except Unusable as reason:
                verdicts.append(reason.reason)
        places = [i for i, verdict in enumerate(verdicts) if not verdict]  # of the usable rows in the batch
        lengths, lost = np.zeros((2, len(verdicts)), dtype=np.int64)
        ids = labels = np.zeros(0, dtype=np.int32)
        if usable:
            ids, labels, lengths[places], lost[places] = self._rows(usable, places, numbers, verdicts)
        return ids, labels, lengths, lost, verdicts

    def _rows(
        self, usable: list[list[Message]], places: list[int], numbers: Sequence[int], verdicts: list[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids and labels end to end, tokens and lost tokens of each usable row; verdicts on rows that do not fit."""
        try:
            rows = encoder(self.tokenizer).encode(usable, self.train_on, self.many)
        except TemplateError:
            self._blame([numbers[i] for i in places], usable)
            raise
        over = np.maximum(rows.lengths - self.max_length, 0)
        if self.on_too_long == "error" and over.any():
            first = int(np.flatnonzero(over)[0])
            raise DataError(
                f"{self.part.describe(numbers[places[first]])} has {rows.lengths[first]} tokens, more than "
                f"data.max_length ({self.max_length}); raise it, or set data.on_too_long to truncate or drop"
            )
        row_of = np.repeat(np.arange(len(usable)), rows.lengths)  # of each token
        position = np.arange(len(row_of)) - np.repeat(np.cumsum(rows.lengths) - rows.lengths, rows.lengths)
        fits = position < self.max_length
        trains = fits & (position > 0) & (rows.labels != IGNORE_INDEX)
        has_loss = np.bincount(row_of[trains], minlength=len(usable)) > 0
        too_long = (over > 0) & (self.on_too_long == "drop")
        for i in np.flatnonzero(too_long | ~has_loss):
            verdicts[places[i]] = "too_long" if too_long[i] else "answer_cut_away" if over[i] else "no_loss"
        keep = has_loss & ~too_long
        kept = fits & keep[row_of]
        lengths = np.where(keep, np.minimum(rows.lengths, self.max_length), 0)
        return rows.input_ids[kept], rows.labels[kept], lengths, np.where(keep, over, 0)

    def _blame(self, numbers: list[int], conversations: list[list[Message]]) -> None:
        """Name the row of a batch that the template does not take."""
        for number, messages in zip(numbers, conversations, strict=True):
            try:
                encoder(self.tokenizer).encode([messages], self.train_on)
            except TemplateError as error:
                raise TemplateError(f"{self.part.describe(number)}: {error}") from error


def drop_reasons(dropped: Counter[str]) -> str:
    """How many rows were dropped for which reason, the most frequent first.

    >>> drop_reasons(Counter(empty_answer=2, not_text=1200))
    '1,200 not text, 2 empty answer'
    """
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.most_common()) or "none given"


def shaped_by(raw: Any, part: Part, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that shapes the encoded rows: a cache of one template is never used with another.

    Args:
        raw: what the raw rows are known by.
    """
    everything: Sequence[Any] = (
        _code(),
        raw,
        part.format,
        sorted(part.columns.items()),
        tokenizer.chat_template,
        tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else repr(tokenizer),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        recipe.data.train_on,
        recipe.data.max_length,
        recipe.data.on_too_long,
    )
    return hashlib.sha256(json.dumps(everything, default=str).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _code(package: Path = Path(__file__).parents[1]) -> str:
    """A hash of all that makes a row, ours and upstream's: an upgrade that changes it never meets rows of the old one.

    `prompt` and `data` are hashed whole, since a list of names is forgotten when a module is added.
    """
    digest = hashlib.sha256()
    for path in sorted(path for room in ("prompt", "data") for path in (package / room).rglob("*") if path.is_file()):
        if path.suffix != ".pyc":
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    for library in ("tokenizers", "tiktoken", "jinja2", "transformers"):
        digest.update(f"{library} {version(library)}\0".encode())
    return digest.hexdigest()[:16]


def encode_part(part: Part, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Encode all raw rows of a part, in order; a row that is dropped keeps its place and carries the reason."""
    from datasets import Features, List, Value

    encoder(tokenizer)  # a template that cannot be trained is refused here, not in another process
    batches = Batches(part, recipe.data, tokenizer)
    fingerprint = shaped_by(part.raw._fingerprint, part, recipe, tokenizer)
    cached = [
        path for f in part.raw.cache_files[:1] for path in Path(f["filename"]).parent.glob(f"cache-{fingerprint}*")
    ]
    if batches.many and not cached:
        encoder(tokenizer).make_fast()  # here, once: processes that are forked inherit it
    shape = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
    shape |= {"dropped": Value("string"), "cut_tokens": Value("int32")}
    processes = min(os.cpu_count() or 1, len(part.raw) // _ROWS_PER_PROCESS)
    with _one_thread_each(processes):
        return (
            part.raw.with_format("arrow")
            .map(
                batches,
                with_indices=True,
                batched=True,
                batch_size=1000,
                num_proc=processes if processes > 1 else None,
                remove_columns=part.raw.column_names,
                features=Features(shape),
                new_fingerprint=fingerprint,
                desc=None,
            )
            .with_format(None)
        )


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
