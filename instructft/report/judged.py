"""What judged a run after its end, on its page: `evaluation.json` and `gate.json` join `report.html` when they come.

The page is written when training ends. Later only the part between two comments is written anew, so that what needed
the data and the tokenizer stays as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.formatting import FORMS, clock, first_line, name_of, perplexity
from instructft.prompt.token_view import visible
from instructft.redaction import without_roots
from instructft.report.card_results import read_evaluation, read_gate
from instructft.report.curves import finite, number
from instructft.report.gate_section import on_card, tables
from instructft.whole_file import write_whole

if TYPE_CHECKING:
    import jinja2

PAGES = Path(__file__).parent / "html"
PARTS = ("verdict", "judged")  # between comments of these names, which escaped text of data and models cannot hold
EVALUATED = 12  # rows of an evaluation that are shown
TEXT = 2_000  # characters of any text of data or models


def join_report(run: Path) -> bool:
    """Bring what judged a run into its `report.html`, where there is one; whether it is there now.

    What fails is said on stderr: the figures stand in their own files.
    """
    path = run / "report.html"
    try:
        text = path.read_text(encoding="utf-8")
        shown = judged(run)
        for name in PARTS:
            before, begin, rest = text.partition(f"<!-- {name} -->")
            _, end, after = rest.partition(f"<!-- /{name} -->")
            if not begin or not end:  # a page of an older version
                return False
            part = template(PAGES / f"{name}.html.jinja").render(**shown)
            text = before + without_roots(part, [run, run.parent]).strip() + after
        write_whole(path, text)
    except FileNotFoundError:
        return False
    except Exception as error:
        print(f"{path} does not show the new figures: {first_line(error)}", file=sys.stderr)
        return False
    return True


def judged(run: Path) -> dict[str, Any]:
    """What the parts show of a run folder."""
    return {"evaluation": evaluation_table(read_evaluation(run)), "gate": gate_table(read_gate(run))}


@functools.cache
def template(path: Path) -> jinja2.Template:
    """A page with the filters of all, compiled once. What it shows is escaped, and its control characters are signs."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # control characters, and those that turn the direction of writing around, become signs
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["number"] = lambda value: number(value) if finite(value) else str(value)
    environment.filters["clock"] = clock
    environment.filters["perplexity"] = perplexity
    return environment.from_string(path.read_text(encoding="utf-8"))


def show_gate(run: Path) -> None:
    """Put the contents of `gate.json` onto the card and the report of a run, in place of those of an earlier gate.

    The card is not written anew, since it may have been edited. What fails is said on stderr: the verdict stands.
    """
    card, found = run / "README.md", read_gate(run)
    try:
        if found and card.is_file():
            write_whole(card, on_card(card.read_text(encoding="utf-8"), found))
    except (OSError, ValueError) as error:
        print(f"{card} does not show the gate: {first_line(error)}", file=sys.stderr)
    join_report(run)


def gate_table(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `instructft gate` wrote: verdict, reasons and tables; None where it is not of this version."""
    if not found:
        return None
    try:
        shown = {name: found[name] for name in ("passed", "verdict", "against", "reasons")}
        return {**shown, "tables": tables(found)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def evaluation_table(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `instructft evaluate --json` wrote, as a table, and some of its rows."""
    if not found:
        return None
    sides = [name for name in ("base", "tuned") if isinstance(found.get(name), dict)]
    table = []
    for figure, form in FORMS.items():
        values = [found[side].get(figure) for side in sides]
        if any(finite(value) for value in values):
            table.append((name_of(figure), [form.format(value) if finite(value) else "" for value in values]))
    tuned = found["tuned"].get("rows") or []
    base = (found.get("base") or {}).get("rows") or []
    rows = [
        {
            "prompt": cut_short(tuned[i]["prompt"]),
            "reference": cut_short(tuned[i]["reference"]),
            "answers": [cut_short(side[i]["prediction"]) for side in (base, tuned) if len(side) == len(tuned)],
        }
        for i in spread(range(len(tuned)), EVALUATED)
    ]
    names = [{"base": "before", "tuned": "after"}[side] if len(sides) > 1 else "answer" for side in sides]
    return {"sides": names, "answers": names if base else names[-1:], "table": table, "rows": rows, "count": len(tuned)}


def spread(items: Any, most: int) -> list[Any]:
    """At most `most` of them, spread over all."""
    return [items[i * len(items) // min(most, len(items))] for i in range(min(most, len(items)))]


def cut_short(text: Any) -> str:
    """A text of data or models, at most `TEXT` characters of it."""
    text = str(text)
    return text if len(text) <= TEXT else text[:TEXT] + "…"
