"""What a template does to rows besides encoding them: turns that become rows, answers that it does not show whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.data.batches.branches import WORTH
from instructft.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

    from instructft.prompt.loss_mask import Rows
    from instructft.recipe.schema import Recipe

WhyNot = Callable[[], str]  # asked where turns could be folded: why this model cannot be trained on that; "" if it can


@dataclass
class Hidden:
    """Of rows that are trained, what their number and their tokens do not tell.

    Args:
        unrolled: conversations that are trained as several rows, one for each turn as it is served.
        turns: the rows that these conversations are.
        tokens: of these rows.
        last_tokens: of the last row of each, which holds the conversation as the template shows it at its end.
        folded_rows: rows that these conversations are where their turns are folded, in place of `turns`; else 0.
        folded_tokens: of these.
        not_folded: why they are not, where somebody may expect it.
        left_out: part of an answer (content, reasoning, arguments), or of what stands before it (tools, a role, name)
            -> conversations where the template leaves it out.
        only_read: answers that carry no loss, since no server would ask for them.
    """

    unrolled: int = 0
    turns: int = 0
    tokens: int = 0
    last_tokens: int = 0
    folded_rows: int = 0
    folded_tokens: int = 0
    not_folded: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    only_read: int = 0

    def add(self, encoded: Dataset, numbers: np.ndarray, folded: Dataset | None = None) -> None:
        """Count in these rows (rising numbers) of an encoded part: its columns `turns` and `note`.

        Args:
            folded: the same with their turns folded (`instructft.data.arrow.encoded.fold_part`).
        """
        start = 0
        for table in encoded.select_columns(["turns", "note"]).with_format("arrow").iter(batch_size=4096):
            first, last = np.searchsorted(numbers, [start, start + table.num_rows])
            some, start = numbers[first:last] - start, start + table.num_rows
            turns = table.column("turns").combine_chunks()
            each = turns.value_lengths().to_numpy().astype(np.int64)
            self._add_turns(turns.flatten().to_numpy(), each, some)
            if folded is not None and len(several := some[each[some] > 1]):
                rows = folded.with_format("arrow")[start - table.num_rows : start].column("turns").combine_chunks()
                ends = np.cumsum(rows.value_lengths().to_numpy().astype(np.int64))
                self._add_folded(rows.flatten().to_numpy(), ends, several)
            self.add_notes(table.column("note").take(some).to_pylist())

    def _add_turns(self, sizes: np.ndarray, each: np.ndarray, some: np.ndarray) -> None:
        ends = np.cumsum(each)
        several = some[each[some] > 1]
        before = np.concatenate(([0], np.cumsum(sizes)))
        self.unrolled += len(several)
        self.turns += int(each[several].sum())
        self.tokens += int((before[ends[several]] - before[ends[several] - each[several]]).sum())
        self.last_tokens += int(sizes[ends[several] - 1].sum())

    def _add_folded(self, sizes: np.ndarray, ends: np.ndarray, several: np.ndarray) -> None:
        before, ends = np.concatenate(([0], np.cumsum(sizes))), np.concatenate(([0], ends))
        tokens = before[ends[several + 1]] - before[ends[several]]
        self.add_folded(int((ends[several + 1] - ends[several]).sum()), int(tokens.sum()))

    def add_turns(self, turns: int, tokens: int, last_tokens: int) -> None:
        """Count in one conversation of several turns."""
        self.unrolled, self.turns = self.unrolled + 1, self.turns + turns
        self.tokens, self.last_tokens = self.tokens + tokens, self.last_tokens + last_tokens

    def add_folded(self, rows: int, tokens: int) -> None:
        """Count in the rows of conversations of several turns, folded where that is worth it."""
        self.folded_rows, self.folded_tokens = self.folded_rows + rows, self.folded_tokens + tokens

    def add_notes(self, notes: Iterable[str]) -> None:
        """Count in the notes of rows that are trained (`notes_of`)."""
        for note in filter(None, notes):
            found = json.loads(note)
            self.left_out.update(found["left_out"])
            self.only_read += found["only_read"]

    def facts(self) -> dict[str, Any]:
        """The same as JSON takes it."""
        fields = (
            "unrolled",
            "turns",
            "tokens",
            "last_tokens",
            "folded_rows",
            "folded_tokens",
            "not_folded",
            "only_read",
        )
        return {**{name: getattr(self, name) for name in fields}, "left_out": dict(self.left_out)}


def notes_of(rows: Rows) -> dict[int, str]:
    """Place of a conversation -> what the template does not show of it and what is only read, for the column `note`.

    A row that is dropped has the reason in its note; one that is trained has this, or nothing.
    """
    left_out: dict[int, set[str]] = {}
    for place, what in rows.left_out:
        left_out.setdefault(place, set()).add(what)
    only_read = dict(rows.only_read)
    return {
        place: json.dumps({"left_out": sorted(left_out.get(place, ())), "only_read": only_read.get(place, 0)})
        for place in sorted({*left_out, *only_read})
    }


def folding(recipe: Recipe, why_not: WhyNot | None) -> tuple[float | None, str]:
    """Of the tokens of rows of their own, less than which share folded turns must have; None: none is folded, and why.

    Raises:
        UsageError: the recipe asks for what this model cannot be trained on.
    """
    asked = recipe.data.fold_turns
    if not asked or (asked == "auto" and why_not is None):
        return None, ""
    if reason := why_not() if why_not else "":
        if asked != "auto":
            raise UsageError(f"data.fold_turns: true cannot be had: {reason}; or write data.fold_turns=auto")
        return None, reason
    return (WORTH if asked == "auto" else 1.0), ""


_ANSWERED = ("content", "reasoning", "arguments")
_ASKED = ("system", "developer", "user", "tool", "tools", "name")
_LEFT_OUT = (
    ("not shown", _ANSWERED, "leaves it out of the answer, so it is not trained"),
    ("not read", _ASKED, "has no place for it, in training as on a server"),
)


def said_of_hidden(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`Hidden.facts` line by line, (what, how much); what did not happen has no line.

    >>> said_of_hidden(Hidden(only_read=2).facts())
    [('only read', '2 answers before any question: no server would ask for them')]
    """
    lines = []
    if facts["folded_tokens"] and facts["folded_tokens"] < facts["tokens"]:
        folded, last = facts["folded_tokens"], facts["last_tokens"]
        lines.append((
            "turns",
            f"{facts['unrolled']:,} conversations have {facts['turns']:,} turns, each as it is served, folded into "
            f"{facts['folded_rows']:,} rows: {folded:,} tokens, {folded / max(last, 1):.1f} × those of their last "
            f"turns ({last:,}); as rows of their own {facts['tokens']:,} ({facts['tokens'] / max(last, 1):.1f} ×)",
        ))  # fmt: skip
    elif facts["unrolled"]:
        cost = f"{facts['tokens']:,} tokens in place of {facts['last_tokens']:,}"
        lines.append((
            "turns",
            f"{facts['unrolled']:,} conversations are {facts['turns']:,} rows, each turn as it is served: {cost} "
            f"({facts['tokens'] / max(facts['last_tokens'], 1):.1f} ×); data.turns: last trains the last turn alone",
        ))  # fmt: skip
        if facts["not_folded"]:
            lines.append(("not folded", facts["not_folded"]))
    for name, parts, why in _LEFT_OUT:
        found = [f"{what} of {count:,} rows" for what, count in sorted(facts["left_out"].items()) if what in parts]
        if found:
            lines.append((name, f"{', '.join(found)}: the template {why}"))
    if facts["only_read"]:
        lines.append(("only read", f"{facts['only_read']:,} answers before any question: no server would ask for them"))
    return lines
