"""Streams data sets that are larger than the disk: rows are read, encoded and mixed as training asks for them.

The rules of masks, cuts and drops are those of `data.py`, and its code; the road of a row is in `stream_rows.py`.
What a stream cannot have: held-out rows, a number of epochs, batches of rows of like length, and packs that fit best
over the whole set. A pass ends when every data set has been read to its end; in a mix, one that ends sooner begins
again. Each pass has an order of its own, which follows from `data.seed`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import count, islice
from typing import TYPE_CHECKING

from instructft.data.load import Part, shape
from instructft.data.streaming_rows import ENCODED, Row, Stream, Streams, Tally, reader
from instructft.data.tokenize import Batches, drop_reasons, shaped_by
from instructft.errors import DataError
from instructft.prompt.loss_mask import encoder

if TYPE_CHECKING:
    from datasets import IterableDataset, IterableDatasetDict
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe


class Streamed:
    """A recipe's streams; stands where `data.Prepared` stands for sets that are read whole.

    `rows`, `tokens`, `supervised_tokens`, `dropped`, `cut` and `cut_tokens` say what has passed in the iteration of
    the training rows that was begun last; a row is known to be dropped up to 1,000 rows ahead. Use `prepare_stream`.
    """

    groups: dict[str, int] = {}  # noqa: RUF012  nothing is held out

    def __init__(self, streams: list[Stream], recipe: Recipe, tokenizer: PreTrainedTokenizerBase):
        self._streams, self._data = Streams(streams, recipe.data), recipe.data
        self._tally = Tally()
        ours = [shaped_by(stream.known_by, stream.part, recipe, tokenizer) for stream in streams]
        weights = [stream.part.weight for stream in streams]
        more = [ours, weights, [e.rows for e in self._data.datasets], self._data.seed, self._data.packing]
        self.fingerprint = hashlib.sha256(json.dumps(more).encode()).hexdigest()[:16]
        self._train = self._dataset(lambda: self._pass(self._train.epoch))

    @cached_property
    def splits(self) -> IterableDatasetDict:
        """`train`, one pass over the data; `set_epoch` gives the next pass its order."""
        from datasets import IterableDatasetDict

        return IterableDatasetDict({"train": self._train})

    @cached_property
    def for_training(self) -> IterableDataset:
        """Pass after pass without end: `train.max_steps` ends it, and a step number alone tells the place in it."""
        return self._dataset(lambda: (row for number in count() for row in self._pass(number, number > 0)))

    @staticmethod
    def _dataset(rows: Callable[[], Iterator[Row]]) -> IterableDataset:
        from datasets import IterableDataset
        from datasets.iterable_dataset import ExamplesIterable  # `from_generator` would pickle the tokenizer to hash it

        return IterableDataset(ExamplesIterable(lambda: enumerate(rows()), {}))

    # -- the account ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> dict[str, int]:
        """Rows that have passed, before packing."""
        return {"train": self._tally.rows, "validation": 0, "test": 0}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that have passed."""
        return {"train": self._tally.tokens}

    @property
    def supervised_tokens(self) -> dict[str, int]:
        """Tokens that carry loss among those."""
        return {"train": self._tally.supervised_tokens}

    @property
    def dropped(self) -> Counter[str]:
        """Rows that left the stream, by reason."""
        return self._tally.dropped

    @property
    def cut(self) -> int:
        """Rows that were longer than `max_length` and are trained without their end."""
        return self._tally.cut

    @property
    def cut_tokens(self) -> int:
        """Tokens that these rows lost."""
        return self._tally.cut_tokens

    @cached_property
    def _sample(self) -> tuple[Tally, int, Row]:
        """The first thousand rows that can be trained on: their tally, the rows or packs they make, one to show."""
        tally, made = Tally(), 0
        first = example = None
        for row in self._streams.rows(0, tally, shuffle=False):
            made += 1
            first = first or row
            example = example or (row if len(row["input_ids"]) <= 300 else None)
            if tally.rows >= ENCODED:
                break
        return tally, made, example or first or {}

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a training row (pack), estimated from the first thousand rows."""
        tally, made, _ = self._sample
        return tally.tokens / made

    @property
    def example(self) -> Row:
        """A training row to show: the first one of at most 300 tokens, where there is one."""
        return self._sample[2]

    def account(self, max_length: int) -> list[tuple[str, str]]:
        """What the data is, line by line: (what, how much). Figures are estimates, and say so."""
        streams, (tally, _, _) = self._streams.streams, self._sample
        share, mean = tally.supervised_tokens / tally.tokens, tally.tokens / tally.rows
        total = sum(stream.part.weight for stream in streams)
        mix = " · ".join(f"{s.part.weight / total:.0%} {s.part.label}" for s in streams)
        guess = f"estimated from the first {tally.rows:,} rows"
        lines = [
            ("data", f"{mix if len(streams) > 1 else streams[0].part.label}, read as it is trained on"),
            ("loss on", f"about {share:.1%} of training tokens; about {mean:.0f} tokens a row ({guess})"),
        ]
        if tally.dropped:
            lines.append(("dropped", f"{drop_reasons(tally.dropped)}, before the first {tally.rows:,} rows were full"))
        if tally.cut:
            lost = f"{tally.cut:,} of the first {tally.rows:,} rows are longer than {max_length} tokens"
            lines.append(("cut", f"{lost} and lose {tally.cut_tokens:,}; they do not teach the end of an answer"))
        if self._data.packing:
            fill = self.tokens_per_row / max_length
            lines.append(("packed", f"in windows of {ENCODED:,} rows, packs of {max_length} tokens, {fill:.1%} full"))
        return lines

    # -- the rows ---------------------------------------------------------------------------------------------------

    def _pass(self, number: int, goes_on: bool = False) -> Iterator[Row]:
        """The rows of one pass in its own order, counted anew, or on top of the pass before it."""
        if not goes_on:
            self._tally = Tally()
        yield from self._streams.rows(number, self._tally)


def prepare_stream(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Streamed:
    """Open the data sets of a recipe that streams; no more than the first thousand rows of each are read.

    >>> data = prepare_stream(recipe, tokenizer)
    >>> next(iter(data.splits["train"])).keys()
    dict_keys(['input_ids', 'labels'])

    Raises:
        DataError: a file, URL or Hub id that cannot be read, or whose rows have no known format; while rows are read
            also one that cannot be, with its line, or a stream of which no row can be trained on.
        TemplateError: a template under which a row has no honest mask.
    """
    encoder(tokenizer)  # a template that cannot be trained is refused here
    streams = []
    for i, entry in enumerate(recipe.data.datasets):
        key = f"data.datasets[{i}]"
        label = entry.name or entry.hub or entry.path or entry.url or key
        read, known_by = reader(entry, label, key)
        columns: dict[str, None] = {}  # a set that keeps its order
        for row in islice(read(), ENCODED):
            columns.update(dict.fromkeys(row))
        if not columns:
            raise DataError(f"{key}: {label} holds no rows")
        fmt, mapped = shape(entry, list(columns), label, key)
        part = Part(label, None, fmt, mapped, {}, key, None, entry.weight)
        streams.append(Stream(part, read, Batches(part, recipe.data, tokenizer).encode, known_by))
    return Streamed(streams, recipe, tokenizer)
