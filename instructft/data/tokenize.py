"""Conversations to rows of `input_ids` and `labels`, a batch at a time, and all that shapes them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.data.account import notes_of
from instructft.data.load import Part
from instructft.errors import DataError, TemplateError
from instructft.prompt.conversation import Conversation
from instructft.prompt.ledger import Unread, Unusable
from instructft.prompt.loss_mask import IGNORE_INDEX, Rows, encoder

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe.schema import CheckSection, Recipe

UNREAD, REFUSED = "unread", "refused_by_template"  # verdicts on rows
_MANY = 5_000  # rows; for fewer of them a faster tokenizer is not worth its proof


@lru_cache(maxsize=1)
def schema() -> pa.Schema:
    """The columns of encoded rows: one for each raw row, with the tokens of each of its turns in `turns`."""
    import pyarrow as pa

    numbers = {"input_ids": pa.int32(), "labels": pa.int32(), "turns": pa.int64()}
    lists = {name: pa.list_(kind) for name, kind in numbers.items()}
    return pa.schema({**lists, "dropped": pa.string(), "cut_tokens": pa.int32(), "note": pa.string()})


class Batches:
    """Encodes batches of raw rows. Holds no more than that takes, since it is sent to other processes."""

    def __init__(self, part: Part, data: Any, tokenizer: PreTrainedTokenizerBase):
        # the rows come as batches, so the part goes along without them
        self.part = replace(part, raw=None, rows={})
        self.train_on, self.turns = data.train_on, data.turns
        self.max_length, self.on_too_long = data.max_length, data.on_too_long
        self.tokenizer = tokenizer
        self.many = part.raw is None or len(part.raw) >= _MANY  # a stream has no number of rows

    def __call__(self, table: pa.Table, numbers: Sequence[int]) -> pa.RecordBatch:
        import pyarrow as pa

        ids, labels, sizes, of_row, lost, verdicts, notes = self.encode(table.to_pylist(), numbers)
        tokens = np.bincount(of_row, weights=sizes, minlength=len(verdicts))
        each = np.bincount(of_row, minlength=len(verdicts))  # rows that a raw row is trained as
        columns = {
            name: pa.ListArray.from_arrays(pa.array(np.concatenate(([0], np.cumsum(n))), type=pa.int32()), pa.array(x))
            for name, x, n in (("input_ids", ids, tokens), ("labels", labels, tokens), ("turns", sizes, each))
        }
        columns |= {"dropped": pa.array(verdicts, type=pa.string()), "cut_tokens": pa.array(lost, type=pa.int32())}
        columns |= {"note": pa.array(notes, type=pa.string())}
        return pa.record_batch(list(columns.values()), schema=schema())

    def encode(
        self, batch: Sequence[dict[str, Any]], numbers: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str], list[str]]:
        """Encode raw rows with these row numbers.

        Returns ids and labels end to end; for each row that is trained its tokens and the place of its raw row, of
        which a template that rewrites history makes several; for each raw row the tokens cut off, why it is dropped
        ("" when it is not), and more about that: what was found, for `UNREAD` the findings as JSON, or of a row that is
        trained what `notes_of` says.
        """
        verdicts, notes = [""] * len(batch), [""] * len(batch)
        usable: list[Conversation] = []
        places: list[int] = []  # of the usable rows in the batch
        for i, raw in enumerate(batch):
            try:
                usable.append(self.part.conversation(raw))
                places.append(i)
            except Unusable as unusable:
                verdicts[i], notes[i] = unusable.reason, unusable.detail
            except Unread as unread:
                verdicts[i], notes[i] = UNREAD, json.dumps(unread.found)
        lost = np.zeros(len(verdicts), dtype=np.int64)
        ids = labels = np.zeros(0, dtype=np.int32)
        sizes = of_row = np.zeros(0, dtype=np.int64)
        if usable:
            ids, labels, sizes, of_usable, lost[places] = self._rows(usable, places, numbers, verdicts, notes)
            of_row = np.array(places)[of_usable]
        return ids, labels, sizes, of_row, lost, verdicts, notes

    def _rows(
        self,
        usable: list[Conversation],
        places: list[int],
        numbers: Sequence[int],
        verdicts: list[str],
        notes: list[str],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids and labels end to end, tokens and conversation of each row that is kept, and the lost tokens of each
        conversation; verdicts on those of which no row fits."""
        documents = np.array([conversation[0]["role"] == "text" for conversation in usable])
        rows = self._encoded(usable, documents, places, verdicts, notes)
        of = rows.conversation
        most = np.where(documents[of], np.iinfo(np.int64).max, self.max_length)  # documents are divided, not cut
        over = np.maximum(rows.lengths - most, 0)
        if self.on_too_long == "error" and over.any():
            first = int(np.flatnonzero(over)[0])
            raise DataError(
                f"{self.part.describe(numbers[places[of[first]]])} has {rows.lengths[first]} tokens, more than "
                f"data.max_length ({self.max_length}); raise it, or set data.on_too_long to truncate or drop"
            )
        row_of = np.repeat(np.arange(len(rows.lengths)), rows.lengths)  # of each token
        position = np.arange(len(row_of)) - np.repeat(np.cumsum(rows.lengths) - rows.lengths, rows.lengths)
        fits = position < most[row_of]
        trains = fits & (position > 0) & (rows.labels != IGNORE_INDEX)
        has_loss = np.bincount(row_of[trains], minlength=len(rows.lengths)) > 0
        too_long = (over > 0) & (self.on_too_long == "drop")
        keep = has_loss & ~too_long
        kept_rows, over_rows, long_rows = (
            np.bincount(of[some], minlength=len(usable)) for some in (keep, over > 0, too_long)
        )
        for i in np.flatnonzero(kept_rows == 0):
            if not verdicts[places[i]]:  # not refused
                verdicts[places[i]] = "too_long" if long_rows[i] else "answer_cut_away" if over_rows[i] else "no_loss"
        for at, note in notes_of(rows).items():
            if not verdicts[places[at]]:
                notes[places[at]] = note
        lost = np.bincount(of, weights=np.where(keep, over, 0), minlength=len(usable)).astype(np.int64)
        kept = fits & keep[row_of]
        return rows.input_ids[kept], rows.labels[kept], np.minimum(rows.lengths, most)[keep], of[keep], lost

    def _encoded(
        self,
        usable: list[Conversation],
        documents: np.ndarray,
        places: list[int],
        verdicts: list[str],
        notes: list[str],
    ) -> Rows:
        """The rows of all usable conversations in order; one that the template refuses has none, and a verdict."""
        chats = np.flatnonzero(~documents).tolist()
        refused: dict[int, TemplateError] = {}
        rows = encoder(self.tokenizer).encode([usable[i] for i in chats], self.train_on, self.many, self.turns, refused)
        for at, error in refused.items():
            verdicts[places[chats[at]]], notes[places[chats[at]]] = REFUSED, str(error)
        if len(chats) == len(usable):
            return rows
        pieces = [(chats[at], row) for at, row in zip(rows.conversation.tolist(), rows.lists(), strict=True)]
        for i in np.flatnonzero(documents).tolist():
            document = self._document(usable[i][0]["content"])
            pieces.append((i, {"input_ids": document, "labels": document}))
        pieces.sort(key=itemgetter(0))
        ids, labels = (
            np.fromiter((t for _, row in pieces for t in row[name]), dtype=np.int32) for name in ("input_ids", "labels")
        )
        lengths, of = np.array([(len(row["input_ids"]), i) for i, row in pieces], dtype=np.int64).reshape(-1, 2).T
        left_out = [(chats[at], what) for at, what in rows.left_out]
        return Rows(ids, labels, lengths, of, left_out, [(chats[at], many) for at, many in rows.only_read])

    def _document(self, text: str) -> list[int]:
        """A text without speakers: every token carries loss, up to the token that ends it."""
        known, tokenizer = encoder(self.tokenizer), self.tokenizer
        ids = known.tokenize([text])[0]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if known.renderer.adds_bos and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


@dataclass
class _Finding:
    """What nothing reads: its value and why in the first row that has it, how many rows do, and which are the first."""

    value: str
    why: str
    rows: int = 0
    first: list[int] = field(default_factory=list)
    last: int = -1

    def seen_in(self, number: int) -> None:
        if number != self.last:
            self.rows += 1
            self.first += [number] if len(self.first) < 3 else []
        self.last = number


def refuse_unread(part: Part, verdicts: Iterable[str], notes: Iterable[str], numbers: Iterable[int]) -> None:
    """Raise one error for all that the rows of a part say and nothing reads.

    Args:
        numbers: of the rows in `part.raw`.
    """
    found: dict[str, _Finding] = {}
    for verdict, note, number in zip(verdicts, notes, numbers, strict=True):
        if verdict == UNREAD:
            for what, value, why in json.loads(note):
                found.setdefault(what, _Finding(value, why)).seen_in(number)
    if not found:
        return
    lines, names = [], []
    for what, finding in sorted(found.items(), key=lambda item: -item[1].rows):
        rows = finding.rows
        first = ", ".join(map(part.place, finding.first)) + (", …" if rows > len(finding.first) else "")
        lines.append(
            f"  {what}, {rows:,} {'rows' if rows > 1 else 'row'} ({first}), such as {finding.value}: {finding.why}"
        )
        if what.startswith(("column", "key", "part")):
            name, role = what.split("`")[1], re.match(r"key `.*?` of an? (\w+)'s message", what)
            names.append(f"{role[1]}.{name}" if role else name)  # of another role's messages it is read
    ways = f"\nWhat does not matter: data.ignore: [{', '.join(dict.fromkeys(names))}]." if names else ""
    if any(what.startswith("column") for what in found):
        ways += " What does, under another name: data.datasets[].columns: {output: NAME}."
    raise DataError(
        f"{part.key}: {part.label} says what nothing here reads, and a model would be trained without it:\n"
        + "\n".join(lines)
        + ways
    )


def refuse_losses(
    part: Part, reasons: Counter[str], rows: int, check: CheckSection, examples: str, which: str = ""
) -> None:
    """Refuse a data set that loses more of its rows than the recipe allows; `which` of them were looked at."""
    refused = reasons[REFUSED] / rows
    dropped = (sum(reasons.values()) - reasons["too_long"]) / rows  # those of `on_too_long: drop` were asked for
    for key, share, what in (
        ("max_refused_share", refused, "are refused by the chat template"),
        ("max_dropped_share", dropped, "cannot be trained on"),
    ):
        allowed = getattr(check, key)
        if allowed is not None and share > allowed:
            error = TemplateError if key == "max_refused_share" else DataError
            raise error(
                f"{part.key}: {share:.1%} of the {which}{rows:,} rows of {part.label} {what}, and check.{key} allows "
                f"{allowed:.1%}: {drop_reasons(reasons)}{examples}\nMend the rows, map their columns "
                f"(data.datasets[].columns), or allow it: check.{key}: {min(1.0, round(share + 0.005, 2))}"
            )


_SAID = {
    "not_a_dialogue": "with no conversation where one is expected",
    "no_assistant_turn": "without an answer",
    "empty_answer": "with an empty answer",
    "empty_prompt": "with an empty question",
    "empty_text": "with an empty text",
    "not_text": "with half a character, or bytes",
    "too_long": "longer than data.max_length",
    "answer_cut_away": "whose answer begins behind data.max_length",
    "no_loss": "of which no token carries loss",
    REFUSED: "that the chat template refuses",
    "excluded": "left out by data.exclude",
    "near_duplicate_of_held_out": "nearly the same as a held-out one",
    "left_out_by_weight": "left out by weight",
    "left_out_by_repeat": "left out by a repeat below 1",
}


def drop_reasons(dropped: Counter[str]) -> str:
    """How many rows were dropped for which reason, the most frequent first.

    >>> drop_reasons(Counter(empty_answer=2, empty_prompt=1200))
    '1,200 with an empty question, 2 with an empty answer'
    """
    said = (f"{count:,} {said_of(reason)}" for reason, count in dropped.most_common())
    return ", ".join(said) or "none given"


def said_of(reason: str) -> str:
    """A reason of the account in words that follow "rows"."""
    return _SAID.get(reason, reason.replace("_", " "))


def drop_examples(part: Part, verdicts: Iterable[str], notes: Iterable[str], numbers: Iterable[int]) -> str:
    """One row for each reason, with what was found there."""
    first: dict[str, str] = {}
    for verdict, note, number in zip(verdicts, notes, numbers, strict=True):
        if verdict and note and verdict not in first:
            first[verdict] = f"  row {part.place(number)}: {note}"
    return "".join(f"\n{line}" for line in first.values())


def written(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that a tokenizer is, as a text."""
    whole: str = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else repr(tokenizer)
    return whole


def shaped_by(raw: Any, part: Part, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, whole: str) -> str:
    """A hash of everything that shapes the encoded rows: a cache of one template is never used with another.

    Args:
        raw: what the raw rows are known by.
        whole: `written(tokenizer)`, which takes a while.
    """
    everything: Sequence[Any] = (
        _code(),
        raw,
        part.format,
        sorted(part.columns.items()),
        tokenizer.chat_template,
        sha256(whole.encode()).hexdigest(),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        recipe.data.train_on,
        recipe.data.turns,
        recipe.data.max_length,
        recipe.data.on_too_long,
        sorted(part.rules.ignore),
        part.rules.strip,
        part.rules.options,
    )
    return sha256(json.dumps(everything, default=str).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _code(package: Path = Path(__file__).parents[1]) -> str:
    """A hash of all that makes a row, ours and upstream's: an upgrade that changes it never meets rows of the old one.

    `prompt` and `data` are hashed whole, since a list of names is forgotten when a module is added.
    """
    digest = sha256()
    for path in sorted(path for room in ("prompt", "data") for path in (package / room).rglob("*") if path.is_file()):
        if path.suffix != ".pyc":
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    for library in ("tokenizers", "tiktoken", "jinja2", "transformers"):
        digest.update(f"{library} {version(library)}\0".encode())
    return digest.hexdigest()[:16]
