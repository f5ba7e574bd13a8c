"""What a gate found, on a run's card and on its report: written into both where they stand, when it has been found.

Neither is written anew: a card may have been edited, and a report shows rows of data that are no longer at hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructft.formatting import FORMS, name_of
from instructft.report.model_card import plain

GATE = "gate.json"  # in the run folder, as `instructft gate` writes it
BEGIN, END = "<!-- gate -->", "<!-- /gate -->"  # around its section of report.html
_CARD = re.compile(r"\n## Gate\n.*?(?=\n## |\Z)", re.S)
_PAGE = Path(__file__).parent / "html" / "gate.html.jinja"


def show_gate(run: Path) -> None:
    """Put the contents of `gate.json` onto the card and the report of a run, in place of those of an earlier gate.

    A card or a report that cannot be written is said on stderr: the verdict stands all the same.
    """
    found = json.loads((run / GATE).read_text(encoding="utf-8"))
    for name, put in (("README.md", on_card), ("report.html", on_page)):
        path = run / name
        try:
            if path.is_file():
                partial = path.with_name(f"{name}.partial")
                partial.write_text(put(path.read_text(encoding="utf-8"), found), encoding="utf-8")
                partial.replace(path)
        except (OSError, UnicodeDecodeError) as error:
            print(f"{path} does not show the gate ({error})", file=sys.stderr)


def on_card(text: str, found: Mapping[str, Any]) -> str:
    """A card with the gate's section before `## Use`, or at its end."""
    text = _CARD.sub("", text)
    section = card_section(found)
    if "\n## Use\n" in text:
        return text.replace("\n## Use\n", f"{section}\n## Use\n", 1)
    return text.rstrip("\n") + "\n" + section


def on_page(text: str, found: Mapping[str, Any]) -> str:
    """A report with the gate's section between its marks; one of an older version has none, and stays as it is."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    return head + begin + page_section(found) + end + tail if begin and end else text


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


def page_section(found: Mapping[str, Any]) -> str:
    """The section in HTML, in which text of others is text."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_PAGE.read_text(encoding="utf-8"))
    return template.render(found=found, tables=tables(found))


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
