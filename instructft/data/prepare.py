"""The one road that data takes: load, map to conversations, split, encode, mix, pack, count.

    files, URLs, Hub ──► raw rows ──► conversations ──► input_ids, labels ──► splits ──► packs
                          (load)        (sources)      (tokenize)                   (packing)

Nothing is lost without a word: a row is trained, held out, or counted in `dropped` under its reason.
"""

from __future__ import annotations

import gc
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from instructft.data.account import Hidden, WhyNot, folding, said_of_hidden
from instructft.data.arrow.encoded import TRAINED, encode_part, fold_part, has_turns, notes, trained_rows, verdicts
from instructft.data.arrow.token_rows import PARTS, FlatRows, ranges, tokens_of
from instructft.data.batches.row_history import Origins
from instructft.data.deduplicate import Known
from instructft.data.files.row_ids import read_excluded
from instructft.data.load import SPLITS, Part, load_parts
from instructft.data.packing import arrange, best_fit, pack, padded_slots
from instructft.data.tokenize import drop_examples, drop_reasons, refuse_losses, refuse_unread
from instructft.errors import DataError
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe


ALIKE = "only rows that are nearly the same as trained ones: their loss says nothing of other rows"
SAVES = 0.1  # of the slots: from here on `data.packing: auto` packs


@dataclass(frozen=True)
class Prepared:
    """Encoded splits with their account.

    Args:
        splits: rows of `input_ids` and `labels`, two lists of int32 of the same length, and `seq_lengths` in packs;
            where turns are folded also `seq_starts` (`instructft.data.batches.branches`). An empty split is left out.
        rows: rows in each split before packing, 0 for an empty one.
        dropped: rows that no split holds, by reason.
        cut: rows that were longer than `max_length` and are trained without their end.
        cut_tokens: tokens that these rows lost.
        groups: data set -> its rows (packs) in `validation`, in order; empty for a single data set.
        hidden: what the template does to the training rows besides.
        packed: rows are packs.
        per_pack: documents in a pack, as `data.packing: auto` found it; 1 where nobody asked.
        saved: share of the slots that packs save, as `auto` found it; None where nobody asked.
        origins: where the training rows come from; None where there are none.
        parts: the recipe's data sets, which `origins` numbers.
        unmatched: what to say of ids in `data.exclude` that no row has, or "".
        alike: every training row is nearly the same as a held-out one, and is trained all the same.
    """

    splits: DatasetDict
    rows: dict[str, int]
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    cut_tokens: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    hidden: Hidden = field(default_factory=Hidden)
    packed: bool = False
    per_pack: float = 1.0
    saved: float | None = None
    origins: Origins | None = None
    parts: tuple[Part, ...] = ()
    unmatched: str = ""
    alike: bool = False

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Tokens in each split."""
        return {name: int(tokens_of(split).lengths.sum()) for name, split in self.splits.items()}

    @cached_property
    def supervised_tokens(self) -> dict[str, int]:
        """Tokens that carry loss in each split; a row's first token, which nothing predicts, is none of them."""
        found = {}
        for name, split in self.splits.items():
            found[name] = 0
            for columns, starts, lengths in _blocks(split):
                carry = columns["labels"] != IGNORE_INDEX
                found[name] += int(carry.sum() - carry[starts[lengths > 0]].sum())
        return found

    @property
    def folds(self) -> bool:
        """Whether turns are folded (`instructft.data.batches.branches`)."""
        return any(PARTS[1] in split.column_names for split in self.splits.values())

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a training row (pack)."""
        return self.tokens["train"] / len(self.splits["train"])

    @property
    def for_training(self) -> Dataset:
        """What the trainer is given."""
        return self.splits["train"]

    @property
    def example(self) -> dict[str, list[int]]:
        """A training row to show: the first one of at most 300 tokens, where there is one."""
        train = self.splits["train"]
        return next((row for row in train if len(row["input_ids"]) <= 300), train[0])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every id and label of every split, in order: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            digest.update(name.encode())
            for columns, _, lengths in _blocks(split):
                for array in (lengths, columns["input_ids"], columns["labels"]):
                    digest.update(array.astype(np.int32).tobytes())
            if PARTS[1] in split.column_names:
                columns, _, lengths = tokens_of(split).flat(PARTS)
                for array in (lengths, *columns.values()):
                    digest.update(array.astype(np.int32).tobytes())
        return digest.hexdigest()[:16]

    def account(self, max_length: int) -> list[tuple[str, str]]:
        """What became of the data, line by line: (what, how much)."""
        tokens, supervised = self.tokens["train"], self.supervised_tokens["train"]
        lines = [
            ("data", " · ".join(f"{name} {count:,}" for name, count in self.rows.items() if count) + " rows"),
            ("loss on", f"{supervised:,} of {tokens:,} training tokens ({supervised / tokens:.1%})"),
        ]
        if self.dropped:
            lines.append(("dropped", f"{sum(self.dropped.values()):,} rows: {drop_reasons(self.dropped)}"))
        if self.alike:
            lines.append(("held out", ALIKE))
        if self.unmatched:
            lines.append(("exclude", self.unmatched))
        if self.cut:
            lost = f"{self.cut:,} rows longer than {max_length} tokens lost {self.cut_tokens:,} tokens"
            lines.append(("cut", f"{lost}; they do not teach the end of an answer"))
        lines += said_of_hidden(self.hidden.facts())
        if self.packed:
            packs = len(self.splits["train"])
            fill = tokens / (packs * max_length)
            lines.append(("packed", f"{packs:,} packs of {max_length} tokens, {fill:.1%} full"))
        elif self.saved is not None:
            lines.append(("packed", self.why_loose()))
        return lines

    def why_loose(self) -> str:
        """Why `data.packing: auto` took no packs: what they would have saved, or cost."""
        saved = self.saved or 0.0
        what = f"save {saved:.0%} of the slots" if saved >= 0 else f"take {-saved:.0%} more slots"
        return f"no: packs would {what}, and auto begins where they save {SAVES:.0%}"


def _blocks(split: Dataset) -> Iterator[FlatRows]:
    """The rows of a split end to end, as many at a time as every fingerprint so far was made of."""
    rows = tokens_of(split)
    for start in range(0, len(rows), 4096):
        yield rows.some(slice(start, start + 4096)).flat()


def prepare_dataset(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Load, split and encode the recipe's data.

    Returns:
        a `DatasetDict` with `train`, and `validation` and `test` where the recipe asks for them (an
        `IterableDatasetDict` with `train` alone where the data sets stream, see `instructft.data.streaming`); each row
        holds `input_ids` and `labels`, two lists of T ints, a label of -100 carrying no loss; packs also `seq_lengths`,
        and with `data.fold_turns: true` rows of folded turns `seq_lengths` and `seq_starts`.

    Raises:
        DataError: data that cannot be read, or of which nothing is left to train on.
        TemplateError: a template under which a row has no honest mask.
    """
    if any(entry.streaming for entry in recipe.data.datasets):
        from instructft.data.streaming import prepare_stream

        return prepare_stream(recipe, tokenizer, prepare_held_out(recipe, tokenizer)).splits
    return prepare(recipe, tokenizer).splits


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, why_not: WhyNot | None = None) -> Prepared:
    """`prepare_dataset` with the account of what became of every row.

    Args:
        why_not: what the model says of folded turns (`instructft.models.branches.why_not`); without it they are folded
            where the recipe says `data.fold_turns: true`.
    """
    with _old_objects_left_alone():
        made = _Pieces(load_parts(recipe), recipe, tokenizer, why_not)
        _refuse_empty(made.pieces, recipe, made.dropped)
        made.alike = _take_out_known(made.pieces, made.dropped, bool(recipe.data.validation or recipe.data.test))
        _repeat(made.pieces["train"], made.repeats, recipe.data.seed, made.dropped)
        _weigh(made.pieces["train"], made.weights, recipe, made.dropped)
        return made.together(recipe)


_LEFT_BY_OTHERS: list[bool] = []  # whether somebody else has told the collector to leave old objects alone


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Keep Python's collector from what was there before: imports are a million objects, and rows in the making have
    it look for garbage among them again and again."""
    if not _LEFT_BY_OTHERS and gc.get_freeze_count():  # which counts them one by one
        _LEFT_BY_OTHERS.append(True)
    if _LEFT_BY_OTHERS:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def prepare_held_out(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, why_not: WhyNot | None = None
) -> Prepared | None:
    """The rows of `data.validation` and `data.test` alone, for a recipe whose other rows stream; None: it has none."""
    parts = load_parts(recipe, ["validation", "test"])
    return _Pieces(parts, recipe, tokenizer, why_not).together(recipe) if parts else None


class _Pieces:
    """The encoded rows of all parts that can be trained on, and what became of the others."""

    def __init__(
        self, parts: list[Part], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, why_not: WhyNot | None = None
    ):
        self.pieces: dict[str, dict[str, Dataset]] = {name: {} for name in SPLITS}  # split -> data set -> its rows
        self.dropped: Counter[str] = Counter()
        self.weights: dict[str, float] = {}
        self.repeats: dict[str, float] = {}
        self.cut = self.cut_tokens = 0
        self.alike = False
        self.hidden = Hidden()
        self.excluded = read_excluded(recipe.data.exclude)
        self.parts: list[Part] = []
        self.rows_of: dict[str, np.ndarray] = {}  # data set -> of each row that it is trained as, its row in the data
        kept_of: list[tuple[Part, Dataset, dict[str, np.ndarray]]] = []  # of each part the rows of its splits
        for part in parts:
            encoded = encode_part(part, recipe, tokenizer)
            part, excluded = self._without_excluded(part)
            used = np.sort(np.concatenate(list(part.rows.values())))
            verdict, lost = verdicts(encoded)
            dropped = used[verdict[used] != ""]
            why = verdict[dropped].tolist()
            refuse_unread(part, why, notes(encoded, dropped), dropped.tolist())
            examples = drop_examples(part, why, notes(encoded, dropped), dropped.tolist())
            reasons = Counter(why)
            self.dropped.update(reasons)
            keep = {name: rows[verdict[rows] == ""] for name, rows in part.rows.items()}
            kept = np.concatenate(list(keep.values()))
            if len(kept) == 0:
                said = drop_reasons(reasons + Counter(excluded=excluded)) + examples
                raise DataError(f"{part.key}: no row of {part.label} can be trained on: {said}")
            refuse_losses(part, reasons, len(used), recipe.check, examples)
            self.cut += int((lost[kept] > 0).sum())
            self.cut_tokens += int(lost[kept].sum())
            kept_of.append((part, encoded, keep))
        worth, self.hidden.not_folded = None, ""
        if any(has_turns(encoded, rows) for _, encoded, keep in kept_of for rows in keep.values()):
            worth, self.hidden.not_folded = folding(recipe, why_not)
        for part, encoded, keep in kept_of:
            label = part.label if part.label not in self.weights else f"{part.label}-{len(self.weights)}"
            self.weights[label], self.repeats[label] = part.weight, part.repeat
            length = recipe.data.max_length
            # documents without speakers have no turns, and are longer than a row
            folded = fold_part(encoded, length, worth) if worth is not None and part.format != "text" else None
            self.hidden.add(encoded, np.sort(keep.get("train", np.zeros(0, dtype=np.int64))), folded)
            most = length if part.format == "text" else None
            rows, each = trained_rows(encoded if folded is None else folded, most, worth is not None)
            first = np.cumsum(each) - each
            self.parts.append(part)
            self.rows_of[label] = np.repeat(np.arange(len(each)), each)
            for name, numbers in keep.items():
                if len(numbers):
                    self.pieces[name][label] = rows.select(ranges(first[numbers], each[numbers]))

    def _without_excluded(self, part: Part) -> tuple[Part, int]:
        """A part without the training rows that the recipe leaves out, and how many; who is held out stays so."""
        numbers = part.rows.get("train", np.zeros(0, dtype=np.int64))
        if not self.excluded.ids or not len(numbers):
            return part, 0
        out = self.excluded.among(part.ids(numbers))
        many = int(out.sum())
        self.dropped += Counter(excluded=many)
        return replace(part, rows={**part.rows, "train": numbers[~out]}), many

    def _origins(self) -> Origins | None:
        """Where the training rows come from; takes their numbers out of them."""
        found = self.pieces["train"]
        if not found:
            return None
        labels, pieces = list(self.rows_of), []
        for label, rows in found.items():
            numbers = np.asarray(rows.with_format("numpy")[TRAINED][:], dtype=np.int64)
            pieces.append((labels.index(label), numbers, self.rows_of[label]))
        return Origins.of(pieces, np.concatenate([tokens_of(rows).lengths for rows in found.values()]))

    def together(self, recipe: Recipe) -> Prepared:
        """The splits, packed where the recipe packs; validation sets each alone, so that its own loss can be told."""
        from datasets import DatasetDict, concatenate_datasets

        pieces, origins = self.pieces, self._origins()
        for found in pieces.values():
            for label, rows in found.items():
                found[label] = rows.remove_columns(TRAINED)
        counts = {name: sum(map(len, found.values())) for name, found in pieces.items()}
        packing, per_pack, saved = recipe.data.packing, 1.0, None
        if packing == "auto" and pieces["train"]:
            per_pack, saved = _saved(list(pieces["train"].values()), recipe)
            packing = saved > SAVES
        if packing:
            length, seed = recipe.data.max_length, recipe.data.seed
            if origins is not None:
                arranged = arrange(origins.lengths, length, seed)
                rows = concatenate_datasets(list(pieces["train"].values()))
                pieces["train"], origins = {"train": pack(rows, length, seed, arranged)}, origins.packed(*arranged)
            pieces["validation"] = {label: pack(rows, length, seed) for label, rows in pieces["validation"].items()}
        named = any(entry.label for entry in recipe.data.validation or ())
        several = len(recipe.data.validation or recipe.data.datasets) > 1
        groups = {label: len(rows) for label, rows in pieces["validation"].items()} if several or named else {}
        splits = {name: concatenate_datasets(list(found.values())) for name, found in pieces.items() if found}
        what = (self.dropped, self.cut, self.cut_tokens, groups, self.hidden, bool(packing), per_pack, saved)
        more = (origins, tuple(self.parts), self.excluded.unmatched(), self.alike)
        return Prepared(DatasetDict(splits), counts, *what, *more)


def _saved(pieces: list[Dataset], recipe: Recipe) -> tuple[float, float]:
    """Rows in a pack, and the share of slots that packs save: of those of rows in random order, padded by batches."""
    lengths = np.concatenate([tokens_of(rows).lengths for rows in pieces])
    packs = [lengths[documents].sum() for documents in best_fit(lengths, recipe.data.max_length, recipe.data.seed)]
    batch = int(recipe.train.get("per_device_train_batch_size") or 8)
    taken, loose = (padded_slots(np.asarray(sizes), batch, recipe.data.seed) for sizes in (packs, lengths))
    return len(lengths) / len(packs), 1 - taken / loose


def _refuse_empty(pieces: dict[str, dict[str, Dataset]], recipe: Recipe, dropped: Counter[str]) -> None:
    if not pieces["train"]:
        raise DataError(
            "data.splits leaves no row to train on"
            + (f"; of the few there were, some were dropped: {drop_reasons(dropped)}" if dropped else "")
        )
    for name in ("validation", "test"):
        share = getattr(recipe.data.splits, name)
        if share > 0 and not pieces[name]:
            raise DataError(f"data.splits.{name}: {share} of so few rows is no row at all; raise it, or set it to 0")


def _take_out_known(pieces: dict[str, dict[str, Dataset]], dropped: Counter[str], own_sets: bool) -> bool:
    """Take rows out of training that are nearly the same as a held-out one, which would be judged by heart.

    Args:
        own_sets: the recipe names files that are held out; without them held-out rows are drawn from these same rows.

    Returns:
        Whether all are alike, and none was taken out: then no other choice of held-out rows would be a better one.
    """
    held = [tokens_of(rows) for name in ("validation", "test") for rows in pieces[name].values()]
    if not held:
        return False
    look = Known(held)
    found = {label: look.among(tokens_of(rows)) for label, rows in pieces["train"].items()}
    if all(known.all() for known in found.values()):
        if not own_sets:
            return True
        raise DataError(
            "data: every training row is nearly the same as a held-out one, so nothing is left to train on; hold "
            "other rows out (data.validation, data.test, data.splits)"
        )
    for label, known in found.items():
        if known.all():
            del pieces["train"][label]
        elif known.any():
            pieces["train"][label] = pieces["train"][label].select(np.flatnonzero(~known))
        dropped["near_duplicate_of_held_out"] += int(known.sum())
    dropped += Counter()  # without a count of 0
    return False


def _repeat(pieces: dict[str, Dataset], repeats: dict[str, float], seed: int, dropped: Counter[str]) -> None:
    """Rows of each data set as often as the recipe wants them: whole rounds, and a part of one drawn by the seed."""
    for i, (label, rows) in enumerate(pieces.items()):
        if repeats[label] == 1:
            continue
        whole, part = divmod(repeats[label], 1)
        some = np.random.default_rng([seed, i, 3]).permutation(len(rows))[: round(part * len(rows))]
        numbers = np.concatenate([np.tile(np.arange(len(rows)), int(whole)), np.sort(some)])
        if not len(numbers):
            raise DataError(f"data.datasets: repeat: {repeats[label]:g} of the {len(rows):,} rows of {label} is no row")
        pieces[label] = rows.select(numbers)
        if whole == 0:
            dropped["left_out_by_repeat"] += len(rows) - len(numbers)


def _weigh(pieces: dict[str, Dataset], weights: dict[str, float], recipe: Recipe, dropped: Counter[str]) -> None:
    """Give each data set its share of the training rows, or of their tokens: no more is taken of one than there is, so
    the scarcest sets the size of the mix."""
    if len({weights[label] for label in pieces}) == 1 and (recipe.data.mix_by == "rows" or len(pieces) == 1):
        return
    sizes = {label: np.ones(len(rows), dtype=np.int64) for label, rows in pieces.items()}
    if recipe.data.mix_by == "tokens":
        sizes = {label: tokens_of(rows).lengths for label, rows in pieces.items()}
    total = min(sizes[label].sum() / weights[label] for label in pieces)
    for i, (label, rows) in enumerate(pieces.items()):
        order = np.random.default_rng([recipe.data.seed, i, 2]).permutation(len(rows))
        filled = np.cumsum(sizes[label][order])
        share = float(total * weights[label])
        wanted = round(share) if recipe.data.mix_by == "rows" else int(np.argmin(np.abs(filled - share))) + 1
        wanted = max(1, wanted)
        if wanted < len(rows):
            pieces[label] = rows.select(np.sort(order[:wanted]))
            dropped["left_out_by_weight"] += len(rows) - wanted
