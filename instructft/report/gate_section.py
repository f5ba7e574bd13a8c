"""What a gate found, in words and tables: for a run's card, its report and the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from instructft.formatting import FORMS, name_of
from instructft.report.card_results import plain

_CARD = re.compile(r"\n## Gate\n.*?(?=\n## |\Z)", re.S)


def on_card(text: str, found: Mapping[str, Any]) -> str:
    """A card with the gate's section before `## Use`, or at its end."""
    text = _CARD.sub("", text)
    section = card_section(found)
    if "\n## Use\n" in text:
        return text.replace("\n## Use\n", f"{section}\n## Use\n", 1)
    return text.rstrip("\n") + "\n" + section


def gate_on_card(found: Mapping[str, Any] | None) -> str:
    """The section of a card; "" where there is no gate, or none of this version."""
    try:
        return card_section(found) if found else ""
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""


def card_section(found: Mapping[str, Any]) -> str:
    """The section in Markdown.

    Example::

        card_section(json.loads(Path("runs/support/gate.json").read_text()))
        # '\\n## Gate\\n\\n**Passed** against `start`: …'
    """
    lines = ["", "## Gate", "", f"**{found['verdict'].capitalize()}**, against {plain(found['against'])}:", ""]
    lines += [f"- {plain(reason)}" for reason in found["reasons"]]
    for head, rows in tables(found):
        lines += ["", f"| {' | '.join(map(plain, head))} |", "| --- |" + " ---: |" * (len(head) - 1)]
        lines += [f"| {plain(row[0])} | {' | '.join(row[1:])} |" for row in rows]
    return "\n".join([*lines, ""])


def tables(found: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """The two tables of a gate, the task and the rest: head and rows of cells."""
    task, rest = found["task"], found["rest"]
    head = ["before", "after", "difference", "interval"]
    figures = []
    for name in ("loss", task["metric"]):
        if one := task.get(name):
            form = FORMS[name]
            signed = form.replace("{:", "{:+")
            ends = " to ".join(signed.format(end) for end in one["interval"]) if one["interval"] else "too few rows"
            shown = [form.format(one["before"]), form.format(one["after"]), signed.format(one["difference"])]
            figures.append([name_of(name), *shown, f"{ends}, {one['state']}"])
    parts = [(name, one, "down" if name in rest["lost"] else "") for name, one in rest["suites"].items()]
    if "interval" in rest:
        parts.append(("all", rest, rest["state"]))
    questions = []
    for name, one, state in parts:
        ends = " to ".join(f"{end:+.1%}" for end in one["interval"])
        shares = [f"{one['before']:.1%}", f"{one['after']:.1%}", f"{one['difference']:+.1%}"]
        questions.append([name, f"{one['questions']:,}", *shares, f"{ends}, {state}" if state else ends])
    title = f"{task['rows']:,} held-out rows"
    found_tables = [([title, *head], figures)]
    return [*found_tables, (["the rest", "questions", *head], questions)] if questions else found_tables
