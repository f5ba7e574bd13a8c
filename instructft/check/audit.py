"""What is in the data: every row of every data set is read, and what is odd is counted, with rows to look at.

A finding is no verdict: a one-word answer may be just right, two answers to one question may both be. Rows are counted
from 1 in the order of their file. Two texts are nearly the same when they differ in case, white space and punctuation
only; signs that carry meaning (`+ - * / % < = >` and their like, the point in 3.5) count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.check.text_checks import ANY_CHARACTER, CHARACTERS, markers, normal, one_word
from instructft.data.arrow.encoded import encode_part, notes, verdicts
from instructft.data.arrow.token_rows import TokenRows, tokens_of
from instructft.data.deduplicate import Known
from instructft.data.files.row_ids import read_excluded
from instructft.data.formats import FORMATS, to_conversation
from instructft.data.load import load_parts
from instructft.data.tokenize import REFUSED, refuse_unread
from instructft.formatting import quantiles
from instructft.progress import Progress
from instructft.prompt.conversation import Message
from instructft.prompt.ledger import Unread, Unusable
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from instructft.data.load import Part
    from instructft.recipe.schema import Recipe

EXAMPLES = 3  # row numbers shown of each finding
FINDINGS = {
    "exact_duplicates": "rows that repeat an earlier row of their data set",
    "near_duplicates": "rows that repeat one but for case, space, punctuation",
    "contradictions": "rows that answer one prompt in different ways",
    "leaks": "training rows that are held out too",
    "empty_answers": "rows with an empty answer",
    "one_word_answers": "rows with an answer of one word",
    "markers_in_answers": "answers that hold a marker of the template",
    "markers_in_prompts": "prompts that hold a marker of the template",
    "outer_space": "rows with white space before or after a text",
    "control_characters": "rows with control characters",
    "windows_line_ends": "rows with line ends of Windows (CR)",
    "zero_width_characters": "rows with characters of no width",
    "bidi_characters": "rows with marks of writing direction",
    "replacement_characters": "rows with U+FFFD, text once read wrongly",
    "lone_surrogates": "rows with half a surrogate pair",
}
_NOT_TRAINED = ("rejected", "category")  # columns that are read, but whose text no model sees


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1  # 0 stands for a row that is no conversation


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


class _Texts:
    """What is found by reading the rows of a data set as text."""

    def __init__(self, part: Part, marker: re.Pattern[str]):
        self.part, self.marker = part, marker
        self.found: dict[str, list[tuple[int, str]]] = {name: [] for name in FINDINGS}  # (row in `raw`, note)
        self.turns = 0
        self.hashes = np.zeros((4, len(part.raw)), dtype=np.uint64)  # exact, normal, prompt, answer
        fmt = FORMATS[part.format]
        self.columns = sorted(fmt.known.difference(_NOT_TRAINED))
        number = 0
        with Progress(f"reading {part.label}", len(part.raw)) as progress:
            for table in part.raw.with_format("arrow").iter(batch_size=1000):
                for raw in table.to_pylist():
                    self._read(number, part.row(raw))
                    number += 1
                progress.add(len(table))

    def _read(self, number: int, row: dict[str, Any]) -> None:
        text = "\n".join(_strings([row.get(name) for name in self.columns]))
        if ANY_CHARACTER.search(text):
            for name, pattern in CHARACTERS.items():
                if seen := sorted(set(pattern.findall(text))):
                    self.found[name].append((number, " ".join(f"U+{ord(c):04X}" for c in seen[:4])))
        try:
            messages = to_conversation(row, self.part.format, self.part.rules)
        except Unread:  # told by the account of tokens, all of them at once
            return
        except Unusable as unusable:
            if unusable.reason == "empty_answer":
                self.found["empty_answers"].append((number, ""))
            return
        self.turns += sum(m["role"] != "system" for m in messages)
        self._mark(number, messages)
        parts = [[str(m.get(key, "")) for key in ("role", "content", "input", "context")] for m in messages]
        exact = [text for part in parts for text in part]
        alike = [normal(text) for text in exact]
        self.hashes[:, number] = _hash(*exact), _hash(*alike), _hash(*alike[:-4]), _hash(*alike[-4:])

    def _mark(self, number: int, messages: list[Message]) -> None:
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if words := [text for text in answers if one_word(text)]:
            self.found["one_word_answers"].append((number, words[0][:20]))
        prompts = [
            str(m.get(k, "")) for m in messages if m["role"] != "assistant" for k in ("content", "input", "context")
        ]
        if spaced := [text for text in (*prompts, *answers) if text != text.strip()]:
            self.found["outer_space"].append((number, repr(spaced[0][:8] + "…" + spaced[0][-8:])))
        for name, texts in (("markers_in_answers", answers), ("markers_in_prompts", prompts)):
            if hit := next(filter(None, map(self.marker.search, texts)), None):
                self.found[name].append((number, hit.group().strip()[:30]))

    def compare(self) -> None:
        """Rows that are there twice, and prompts with more than one answer."""
        exact, alike, prompt, answer = self.hashes
        for name, values in (("exact_duplicates", exact), ("near_duplicates", alike)):
            known = {number for number, _ in self.found["exact_duplicates"]}
            for number, first in _repeats(values):
                if number not in known:
                    self.found[name].append((number, f"as row {self.place(first)}"))
        asked: dict[int, list[int]] = {}  # prompt -> its rows
        for number in np.flatnonzero(prompt).tolist():
            asked.setdefault(int(prompt[number]), []).append(number)
        for rows in asked.values():
            if len(rows) > 1 and len({int(answer[number]) for number in rows}) > 1:
                like = f"asks as row {self.place(rows[0])}"
                self.found["contradictions"] += [(number, like if number != rows[0] else "") for number in rows]

    def place(self, number: int) -> int:
        """The number of a row in its file, from 1."""
        return (number if self.part.drawn is None else int(self.part.drawn[number])) + 1

    def findings(self) -> dict[str, Any]:
        return {name: self._finding(rows) for name, rows in self.found.items()}

    def _finding(self, rows: list[tuple[int, str]]) -> dict[str, Any]:
        examples = [{"row": self.place(number), "note": note} for number, note in rows[:EXAMPLES]]
        return {"rows": len(rows), "share": len(rows) / len(self.part.raw), "examples": examples}


def _repeats(values: np.ndarray) -> list[tuple[int, int]]:
    """(row, the first row with its value) for each row whose value stood earlier; 0 is no value."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    earlier = first[inverse.reshape(-1)]
    return [(int(i), int(earlier[i])) for i in np.flatnonzero((earlier != np.arange(len(values))) & (values != 0))]


def _leaks(texts: list[_Texts], tokens: list[TokenRows]) -> None:
    """Training rows that are held out as well: in the same words, or nearly so, as `train` takes them out."""
    held: dict[int, str] = {}
    places: list[str] = []
    rows: list[TokenRows] = []
    for text in texts:
        for split in ("validation", "test"):
            for number in text.part.rows.get(split, ()):
                if value := int(text.hashes[1, number]):
                    held.setdefault(value, f"{split}: row {text.place(int(number))} of {text.part.label}")
    for text, found in zip(texts, tokens, strict=True):
        for split in ("validation", "test"):
            numbers = _usable(text, split, found)
            if len(numbers):
                rows.append(found.some(numbers))
                places += [f"{split}: row {text.place(int(number))} of {text.part.label}" for number in numbers]
    known = Known(rows) if rows else None
    for text, found in zip(texts, tokens, strict=True):
        numbers = _usable(text, "train", found)
        matches = known.matches(found.some(numbers)).tolist() if known and len(numbers) else []
        near = {number: places[match] for number, match in zip(numbers.tolist(), matches, strict=False) if match >= 0}
        for number in text.part.rows["train"].tolist():
            if where := held.get(int(text.hashes[1, number])) or near.get(number):
                text.found["leaks"].append((number, where))


def _usable(text: _Texts, split: str, tokens: TokenRows) -> np.ndarray:
    """The rows of a split that are not dropped."""
    numbers = np.asarray(text.part.rows.get(split, ()), dtype=np.int64)
    return numbers[tokens.lengths[numbers] > 0]


# --------------------------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------------------------


def _tokens(
    part: Part, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, texts: _Texts
) -> tuple[dict[str, Any], Any, TokenRows]:
    """The account of a data set in tokens, the length of each usable row before it is cut, and all rows as tokens."""
    encoded = encode_part(part, recipe, tokenizer)
    verdict, lost = verdicts(encoded)
    out = np.flatnonzero(verdict != "")
    refuse_unread(part, verdict[out].tolist(), notes(encoded, out), out.tolist())
    found = tokens_of(encoded)
    lengths = found.lengths
    whole = lengths + lost
    long = np.flatnonzero(np.isin(verdict, ["too_long", "answer_cut_away"]))
    if len(long):  # these are kept nowhere, so their length is found by encoding them once more
        again = encode_part(dataclasses.replace(part, raw=part.raw.select(long)), _uncut(recipe), tokenizer)
        whole[long] = tokens_of(again).lengths
    rows = len(verdict)
    reasons = {}
    for reason in sorted({str(v) for v in verdict if v}):
        reasons[reason] = texts._finding([(int(i), "") for i in np.flatnonzero(verdict == reason)])
    dropped = len(out)
    cut = texts._finding([(int(i), f"{lost[i]} tokens") for i in np.flatnonzero(lost > 0)])
    supervised = 0
    for block in found.blocks():
        columns, starts, sizes = block.flat(("labels",))
        carries = columns["labels"] != IGNORE_INDEX
        carries[starts[sizes > 0]] = False  # nothing stands before a first token that could predict it
        supervised += int(carries.sum())
    tokens = int(lengths.sum())
    account = {
        "name": part.label,
        "format": part.format,
        "rows": rows,
        "splits": {name: len(numbers) for name, numbers in part.rows.items()},
        "turns": texts.turns,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / max(tokens, 1),
        "lengths": quantiles(whole[whole > 0]),
        "cut": {**cut, "tokens": int(lost.sum())},
        "dropped": {"rows": dropped, "share": dropped / rows, "reasons": reasons},
    }
    return account, whole[whole > 0], found


def _uncut(recipe: Recipe) -> Recipe:
    data = recipe.data.model_copy(update={"max_length": 1 << 30, "on_too_long": "truncate"})
    return recipe.model_copy(update={"data": data})


def audit(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Read all rows of a recipe's data sets, held-out ones too, and report on each set and on all together.

    A finding: `{"rows": 1, "share": 0.01, "examples": [{"row": 17, "note": "test: row 4 of rows.json"}]}`.

    Raises:
        DataError: data that cannot be read.
        TemplateError: a template under which a row has no honest mask.
    """
    if recipe.data.on_too_long == "error":  # `check` says how many there are instead of stopping at the first
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_too_long": "truncate"})})
    marker = markers(tokenizer)
    accounts, lengths, texts, tokens = [], [], [], []
    excluded = read_excluded(recipe.data.exclude)
    for part in load_parts(recipe):
        kept, left_out = part.without(excluded)
        text = _Texts(kept, marker)
        text.compare()
        account, whole, rows = _tokens(kept, recipe, tokenizer, text)
        account["excluded"] = left_out
        texts.append(text)
        accounts.append(account)
        lengths.append(whole)
        tokens.append(rows)
    _leaks(texts, tokens)
    for account, text in zip(accounts, texts, strict=True):
        account["findings"] = text.findings()
    worst = {
        "dropped": max(_dropped(account) for account in accounts),
        "refused": max(_dropped(account, (REFUSED,)) for account in accounts),
    }
    found = {"datasets": accounts, "total": _total(accounts, np.concatenate(lengths)), "worst": worst}
    return found | ({"exclude": excluded.unmatched()} if excluded.ids else {})


def _dropped(account: dict[str, Any], reasons: Collection[str] = ()) -> float:
    """The share of a data set's rows that are dropped for these reasons; default: for any but a length asked for."""
    found = account["dropped"]["reasons"]
    counted = [finding for reason, finding in found.items() if (reason in reasons if reasons else reason != "too_long")]
    return sum(finding["rows"] for finding in counted) / account["rows"]


def _total(accounts: list[dict[str, Any]], lengths: np.ndarray) -> dict[str, Any]:
    def add(*path: str) -> int:
        total = 0
        for account in accounts:
            value: Any = account
            for key in path:
                value = value.get(key, {}) if isinstance(value, dict) else value
            total += value or 0
        return total

    rows, tokens, supervised = add("rows"), add("tokens"), add("supervised_tokens")
    reasons = sorted({reason for account in accounts for reason in account["dropped"]["reasons"]})
    findings = {name: add("findings", name, "rows") for name in FINDINGS}
    return {
        "rows": rows,
        "splits": {name: add("splits", name) for name in ("train", "validation", "test")},
        "excluded": add("excluded"),
        "turns": add("turns"),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / max(tokens, 1),
        "lengths": quantiles(lengths),
        "cut": {"rows": add("cut", "rows"), "share": add("cut", "rows") / rows, "tokens": add("cut", "tokens")},
        "dropped": {
            "rows": add("dropped", "rows"),
            "share": add("dropped", "rows") / rows,
            "reasons": {reason: {"rows": add("dropped", "reasons", reason, "rows")} for reason in reasons},
        },
        "findings": {name: {"rows": count, "share": count / rows} for name, count in findings.items()},
    }
