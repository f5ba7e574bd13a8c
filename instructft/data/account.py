"""What a template does to rows besides encoding them: turns that become rows, answers that it does not show whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

    from instructft.prompt.loss_mask import Rows


@dataclass
class Hidden:
    """Of rows that are trained, what their number and their tokens do not tell.

    Args:
        unrolled: conversations that are trained as several rows, one for each turn as it is served.
        turns: the rows that these conversations are.
        tokens: of these rows.
        last_tokens: of the last row of each, which holds the conversation as the template shows it at its end.
        left_out: part of an answer (content, reasoning, arguments) -> conversations where the template leaves it out.
        only_read: answers that carry no loss, since no server would ask for them.
    """

    unrolled: int = 0
    turns: int = 0
    tokens: int = 0
    last_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    only_read: int = 0

    def add(self, encoded: Dataset, numbers: np.ndarray) -> None:
        """Count in these rows (rising numbers) of an encoded part: its columns `turns` and `note`."""
        start = 0
        for table in encoded.select_columns(["turns", "note"]).with_format("arrow").iter(batch_size=4096):
            first, last = np.searchsorted(numbers, [start, start + table.num_rows])
            some, start = numbers[first:last] - start, start + table.num_rows
            turns = table.column("turns").combine_chunks()
            self._add_turns(turns.flatten().to_numpy(), turns.value_lengths().to_numpy().astype(np.int64), some)
            self.add_notes(table.column("note").take(some).to_pylist())

    def _add_turns(self, sizes: np.ndarray, each: np.ndarray, some: np.ndarray) -> None:
        ends = np.cumsum(each)
        several = some[each[some] > 1]
        before = np.concatenate(([0], np.cumsum(sizes)))
        self.unrolled += len(several)
        self.turns += int(each[several].sum())
        self.tokens += int((before[ends[several]] - before[ends[several] - each[several]]).sum())
        self.last_tokens += int(sizes[ends[several] - 1].sum())

    def add_notes(self, notes: Iterable[str]) -> None:
        """Count in the notes of rows that are trained (`notes_of`)."""
        for note in filter(None, notes):
            found = json.loads(note)
            self.left_out.update(found["left_out"])
            self.only_read += found["only_read"]

    def facts(self) -> dict[str, Any]:
        """The same as JSON takes it."""
        fields = ("unrolled", "turns", "tokens", "last_tokens", "only_read")
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


def said_of_hidden(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`Hidden.facts` line by line, (what, how much); what did not happen has no line.

    >>> said_of_hidden(Hidden(only_read=2).facts())
    [('only read', '2 answers before any question: no server would ask for them')]
    """
    lines = []
    if facts["unrolled"]:
        cost = f"{facts['tokens']:,} tokens in place of {facts['last_tokens']:,}"
        lines.append((
            "turns",
            f"{facts['unrolled']:,} conversations are {facts['turns']:,} rows, each turn as it is served: {cost} "
            f"({facts['tokens'] / max(facts['last_tokens'], 1):.1f} ×); data.turns: last trains the last turn alone",
        ))  # fmt: skip
    if facts["left_out"]:
        found = ", ".join(f"{what} of {count:,} rows" for what, count in sorted(facts["left_out"].items()))
        lines.append(("not shown", f"{found}: the template leaves it out of the answer, so it is not trained"))
    if facts["only_read"]:
        lines.append(("only read", f"{facts['only_read']:,} answers before any question: no server would ask for them"))
    return lines
