"""Streams data sets that are larger than the disk: rows are read, encoded and mixed as training asks for them.

    for each data set:  raw rows ──► shuffle ──► encode ──┐
                        (in order)   (10,000)    (1,000)  ├──► mix by weight ──► packs ──► trainer
    the next one:       raw rows ──► shuffle ──► encode ──┘                      (1,000)

Each step is a generator; the figures are rows in memory, the most that is ever held. The rules of masks, cuts and
drops are those of `instructft.data.tokenize`. What a stream cannot have: held-out rows, a number of epochs, batches of
rows of like length, and packs that fit best over the whole set. A pass ends when every data set has been read to its
end; in a mix, one that ends sooner begins again. Each pass has an order of its own, which follows from `data.seed`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain, count, groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from instructft.data.account import Hidden, WhyNot, folding, said_of_hidden
from instructft.data.arrow.token_rows import flat_rows, tokens_of
from instructft.data.batches import branches
from instructft.data.deduplicate import Known
from instructft.data.files.row_ids import read_excluded, row_id
from instructft.data.load import Part, hub_id, label_of, not_read, rules_of, shape, shape_of, stream_files
from instructft.data.packing import best_fit
from instructft.data.tokenize import (
    Batches,
    drop_examples,
    drop_reasons,
    refuse_losses,
    refuse_unread,
    shaped_by,
    written,
)
from instructft.errors import DataError
from instructft.prompt.loss_mask import IGNORE_INDEX, encoder

if TYPE_CHECKING:
    from datasets import IterableDataset, IterableDatasetDict
    from transformers import PreTrainedTokenizerBase

    from instructft.data.prepare import Prepared
    from instructft.recipe.schema import DatasetEntry, Recipe

SHUFFLED = 10_000  # raw rows of a data set among which the next one is drawn
ENCODED = 1_000  # rows encoded at a time, packed together, and looked at for the account ahead of a run

Row = dict[str, list[int]]
T = TypeVar("T")


@dataclass
class _Tally:
    """What has passed so far in one iteration."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    cut_tokens: int = 0
    hidden: Hidden = field(default_factory=Hidden)
    ahead: bool = False  # of the account, before a run


@dataclass(frozen=True)
class _Stream:
    """One entry of `data.datasets`: where its raw rows come from, and what makes rows of them."""

    part: Part
    read: Callable[[], Iterator[dict[str, Any]]]  # begins anew at each call
    encode: Callable[..., Any]
    known_by: Any  # changes when the raw rows do, as far as that can be told without reading them


class Streamed:
    """A recipe's streams; stands where `data.prepare.Prepared` stands for sets that are read whole.

    `rows`, `tokens`, `supervised_tokens`, `dropped`, `cut` and `cut_tokens` say what has passed in the iteration of
    the training rows that was begun last; a row is known to be dropped up to 1,000 rows ahead. Use `prepare_stream`.
    """

    def __init__(
        self,
        streams: list[_Stream],
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        held_out: Prepared | None = None,
        why_not: WhyNot | None = None,
    ):
        self._folding = cache(lambda: folding(recipe, why_not))  # asked when the first conversation could be folded
        self._held_out = held_out
        self.groups = held_out.groups if held_out else {}
        held = [tokens_of(rows) for rows in held_out.splits.values()] if held_out else []
        self._known = Known(held) if held else None
        self._streams, self._data, self._check, self._tally = streams, recipe.data, recipe.check, _Tally()
        self._excluded = read_excluded(recipe.data.exclude)
        self._weights = [stream.part.weight for stream in streams]
        whole = written(tokenizer)
        ours = [shaped_by(stream.known_by, stream.part, recipe, tokenizer, whole) for stream in streams]
        more = [
            ours,
            self._weights,
            [e.rows for e in self._data.datasets],
            self._data.seed,
            self._data.packing,
            self._data.mix_by,
        ]
        if held_out:
            more.append(held_out.fingerprint)
        if self._excluded.ids:
            more.append(sorted(self._excluded.ids))
        self.fingerprint = hashlib.sha256(json.dumps(more).encode()).hexdigest()[:16]
        self._train = self._dataset(lambda: self._pass(self._train.epoch))

    @cached_property
    def splits(self) -> IterableDatasetDict:
        """`train`, one pass over the data, whose order `set_epoch` gives; and what the recipe holds out, read whole."""
        from datasets import IterableDatasetDict

        return IterableDatasetDict({"train": self._train, **(self._held_out.splits if self._held_out else {})})

    @property
    def packed(self) -> bool:
        """Whether the training rows are packs; what `data.packing: auto` would save of a stream nobody knows ahead."""
        return bool(self._data.packing)

    @property
    def per_pack(self) -> float:
        """Documents in a pack, estimated from the first thousand rows."""
        tally, made, _ = self._sample
        return tally.rows / made

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
        held = self._held_out.rows if self._held_out else {"validation": 0, "test": 0}
        return {**held, "train": self._tally.rows}  # before packing

    @property
    def tokens(self) -> dict[str, int]:
        return {**(self._held_out.tokens if self._held_out else {}), "train": self._tally.tokens}

    @property
    def supervised_tokens(self) -> dict[str, int]:
        held = self._held_out.supervised_tokens if self._held_out else {}
        return {**held, "train": self._tally.supervised_tokens}

    @property
    def dropped(self) -> Counter[str]:
        return self._tally.dropped

    @property
    def alike(self) -> bool:
        """Never: a stream with nothing but copies of held-out rows ends with an error."""
        return False

    @property
    def cut(self) -> int:
        return self._tally.cut

    @property
    def cut_tokens(self) -> int:
        return self._tally.cut_tokens

    @cached_property
    def _sample(self) -> tuple[_Tally, int, Row]:
        """The first thousand rows that can be trained on: their tally, the rows or packs they make, one to show."""
        tally, made = _Tally(ahead=True), 0
        first = example = None
        for row in self._rows(0, tally, shuffle=False):
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

    @cached_property
    def folds(self) -> bool:
        """Whether turns are folded: the first thousand rows decide, so that the model is asked before it is trained."""
        return self._sample[0].hidden.unrolled > 0 and self._folding()[0] is not None

    @property
    def example(self) -> Row:
        """A training row to show: the first one of at most 300 tokens, where there is one."""
        return self._sample[2]

    def account(self, max_length: int) -> list[tuple[str, str]]:
        """What the data is, line by line: (what, how much). Figures are estimates, and say so."""
        tally = self._sample[0]
        share, mean = tally.supervised_tokens / tally.tokens, tally.tokens / tally.rows
        labels = [stream.part.label for stream in self._streams]
        total = sum(self._weights)
        mix = " · ".join(f"{w / total:.0%} {label}" for w, label in zip(self._weights, labels, strict=True))
        guess = f"estimated from the first {tally.rows:,} rows"
        lines = [
            ("data", f"{mix if len(labels) > 1 else labels[0]}, read as it is trained on"),
            ("loss on", f"about {share:.1%} of training tokens; about {mean:.0f} tokens a row ({guess})"),
        ]
        if self._held_out:
            held = " · ".join(f"{name} {count:,}" for name, count in self._held_out.rows.items() if count)
            lines.append(("held out", f"{held} rows, read whole"))
        if tally.dropped:
            lines.append(("dropped", f"{drop_reasons(tally.dropped)}, before the first {tally.rows:,} rows were full"))
        if tally.cut:
            lost = f"{tally.cut:,} of the first {tally.rows:,} rows are longer than {max_length} tokens"
            lines.append(("cut", f"{lost} and lose {tally.cut_tokens:,}; they do not teach the end of an answer"))
        lines += said_of_hidden(tally.hidden.facts())
        if self._data.packing:
            fill = self.tokens_per_row / max_length
            lines.append(("packed", f"in windows of {ENCODED:,} rows, packs of {max_length} tokens, {fill:.1%} full"))
        return lines

    # -- the rows ---------------------------------------------------------------------------------------------------

    def _pass(self, number: int, adds_up: bool = False) -> Iterator[Row]:
        """The rows of one pass in its own order, counted anew, or on top of the pass before it."""
        if not adds_up:
            self._tally = _Tally()
        yield from self._rows(number, self._tally)

    def _rows(self, number: int, tally: _Tally, shuffle: bool = True) -> Iterator[Row]:
        """The rows (packs) of pass `number`, counted in `tally`."""
        for documents in self._documents(self._mixed(number, tally, shuffle)):
            ids = np.concatenate([row.input_ids for row in documents])
            labels = np.concatenate([row.labels for row in documents])
            lengths = [tokens for row in documents for tokens in row.lengths]
            starts = [start for row in documents for start in row.starts]
            row = {"input_ids": ids.tolist()}
            if self._data.packing:  # no first token is predicted from its neighbour's last
                labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
            if self._data.packing or any(starts):
                row["seq_lengths"] = lengths
            if any(starts):
                row["seq_starts"] = starts
            row["labels"] = labels.tolist()
            tally.rows += len(documents)
            tally.tokens += len(ids)
            tally.supervised_tokens += int((labels != IGNORE_INDEX).sum())
            yield row

    def _documents(self, rows: Iterator[branches.Row]) -> Iterator[list[branches.Row]]:
        """Rows that share a pack; none is split or dropped, and each window of rows is packed to the end."""
        if not self._data.packing:
            yield from ([row] for row in rows)
        while window := list(islice(rows, ENCODED)):
            for documents in best_fit([len(row.input_ids) for row in window], self._data.max_length, self._data.seed):
                yield [window[i] for i in documents]

    def _mixed(self, number: int, tally: _Tally, shuffle: bool) -> Iterator[branches.Row]:
        """Rows of all streams, each as often as its weight says."""
        everyone = range(len(self._streams))
        draw = random.Random(f"{self._data.seed} mix {number}")
        rounds = [0 for _ in everyone]  # how often each was read to its end
        opened = [self._one(i, (number, 0), tally, shuffle) for i in everyone]
        passed = [0 for _ in everyone]  # tokens
        while True:
            if len(everyone) > 1 and self._data.mix_by == "tokens":  # the one that lags behind its share
                i = min(everyone, key=lambda k: passed[k] / self._weights[k])
            else:
                i = draw.choices(everyone, self._weights)[0] if len(everyone) > 1 else 0
            row = next(opened[i], None)
            if row is None:
                rounds[i] += 1
                if all(rounds):
                    return
                opened[i] = self._one(i, (number, rounds[i]), tally, shuffle)
                row = next(opened[i])  # `_one` gives a row or raises
            passed[i] += len(row[0])
            yield row

    def _one(self, i: int, number: tuple[int, int], tally: _Tally, shuffle: bool) -> Iterator[branches.Row]:
        """The rows of stream `i` that can be trained on, read once from start to end."""
        stream, given = self._streams[i], False
        rows: Iterator[tuple[int, dict[str, Any]]] = enumerate(stream.read())
        if shuffle:
            rows = shuffled(rows, random.Random(f"{self._data.seed} {i} {number}"), SHUFFLED)
        while batch := list(islice(rows, ENCODED)):
            if self._excluded.ids:
                out = self._excluded.among([row_id(row) for _, row in batch])
                batch = [one for one, without in zip(batch, out, strict=True) if not without]
                tally.dropped.update({"excluded": int(out.sum())} if out.any() else {})
                if not batch:
                    continue
            numbers = [number for number, _ in batch]
            ids, labels, lengths, of, lost, verdicts, notes = stream.encode([row for _, row in batch], numbers)
            refuse_unread(stream.part, verdicts, notes, numbers)
            dropped = Counter(verdict for verdict in verdicts if verdict)
            tally.dropped.update(dropped)
            if not shuffle and (len(ids) or len(batch) == ENCODED):  # ahead of the run; none at all is told below
                examples = drop_examples(stream.part, verdicts, notes, numbers)
                refuse_losses(stream.part, dropped, len(batch), self._check, examples, "first ")
            tally.hidden.add_notes(note for verdict, note in zip(verdicts, notes, strict=True) if not verdict)
            tally.cut += int((lost > 0).sum())
            tally.cut_tokens += int(lost.sum())
            ends = np.cumsum(lengths)
            if self._known and len(ids):
                copies = self._known.among(flat_rows({"input_ids": ids, "labels": labels}, lengths))
                copies &= lengths > 0
                tally.dropped["near_duplicate_of_held_out"] += int(copies.sum())
                ends[copies] = (ends - lengths)[copies]  # no row
                lengths = np.where(copies, 0, lengths)
            turns = [(slice(a, b), n) for a, b, n in zip(ends - lengths, ends, of, strict=True) if a < b]
            for _, same in groupby(turns, key=itemgetter(1)):
                for row in self._folded([(ids[place], labels[place]) for place, _ in same], tally):
                    given = True
                    yield row
        if not given:
            part = stream.part
            raise DataError(f"{part.key}: no row of {part.label} can be trained on: {drop_reasons(tally.dropped)}")

    def _folded(self, turns: list[tuple[np.ndarray, np.ndarray]], tally: _Tally) -> Iterator[branches.Row]:
        """The rows of a conversation, or of a document."""
        most = self._data.max_length
        if len(turns) > 1:
            alone = sum(len(ids) for ids, _ in turns)
            tally.hidden.add_turns(len(turns), alone, len(turns[-1][0]))
            worth, tally.hidden.not_folded = self._folding() if tally.ahead or self.folds else (None, "")
            folded = branches.fold(turns, most) if worth is not None else []
            tokens = sum(len(row.input_ids) for row in folded)
            if worth is not None and tokens < worth * alone:
                tally.hidden.add_folded(len(folded), tokens)
                yield from folded
                return
            tally.hidden.add_folded(len(turns), alone)
        for ids, labels in turns:
            for at in range(0, len(ids), most):  # only documents are longer
                some = slice(at, at + most)
                yield branches.Row(ids[some], labels[some], [len(ids[some])], [0])


def shuffled(rows: Iterable[T], draw: random.Random, size: int) -> Iterator[T]:
    """All `rows`, each drawn from the `size` that were read last and are still there.

    >>> list(shuffled("abcdef", random.Random(1), 3))
    ['a', 'c', 'd', 'e', 'f', 'b']
    """
    rows = iter(rows)
    held = list(islice(rows, size))
    for row in rows:
        i = draw.randrange(size)
        yield held[i]
        held[i] = row
    draw.shuffle(held)
    yield from held


def prepare_stream(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Prepared | None = None,
    why_not: WhyNot | None = None,
) -> Streamed:
    """Open the data sets of a recipe that streams; no more than the first thousand rows of each are read.

    Args:
        held_out: what `instructft.data.prepare.prepare_held_out` makes of `data.validation` and `data.test`.
        why_not: as `instructft.data.prepare.prepare` takes it.

    Raises:
        DataError: a file, URL or Hub id that cannot be read, or whose rows have no known format; while rows are read
            also one that cannot be, with its line, or a stream of which no row can be trained on.
        TemplateError: a template under which a row has no honest mask.
    """
    encoder(tokenizer)  # a template that cannot be trained is refused here
    streams = []
    for i, entry in enumerate(recipe.data.datasets):
        key = f"data.datasets[{i}]"
        label = label_of(entry, key)
        read, known_by = _reader(entry, label, key)
        columns: dict[str, None] = {}  # a set that keeps its order
        for row in islice(read(), ENCODED):
            columns.update(dict.fromkeys(row))
        if not columns:
            raise DataError(f"{key}: {label} holds no rows")
        fmt, mapped = shape(shape_of(entry), list(columns), label, key)
        part = Part(label, None, fmt, mapped, {}, key, weight=entry.weight, rules=rules_of(recipe, mapped))
        streams.append(_Stream(part, read, Batches(part, recipe.data, tokenizer).encode, known_by))
    return Streamed(streams, recipe, tokenizer, held_out, why_not)


def _reader(entry: DatasetEntry, label: str, key: str) -> tuple[Callable[[], Iterator[dict[str, Any]]], Any]:
    """What reads the raw rows of one entry from the start, and what they are known by."""
    files = stream_files(entry, label, key)
    known_by: Any = [[file.name, *(file.path.stat()[6:9:2] if file.path else [])] for file in files]
    if hub := hub_id(entry):
        known_by = [hub, entry.config, entry.split, entry.revision]
    elif entry.name:
        known_by = entry.name  # what is bundled counts as code

    def read() -> Iterator[dict[str, Any]]:
        try:
            yield from islice(chain.from_iterable(file.rows() for file in files), entry.rows)
        except DataError as error:
            raise error if str(error).startswith(key) else DataError(f"{key}: {error}") from error
        except Exception as error:
            raise DataError(not_read(entry, label, key, error)) from error

    return read, known_by
