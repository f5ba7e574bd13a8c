"""The tables of `instructft evaluate`: figures with their intervals, groups of rows, answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from instructft.formatting import FORMS, name_of, short

_IN_GROUPS = ("loss", "exact_match", "rougeL", "bleu", "stopped")


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def span(form: str, interval: Sequence[float] | None) -> str:
    """An interval as it stands beside its figure.

    >>> span("{:.1%}", [0.9, 0.95])
    '90.0% to 95.0%'
    """
    return "" if interval is None else " to ".join(form.format(value) for value in interval)


def print_metrics(console: Any, results: Mapping[str, Any]) -> None:
    """Print one model's figures with their intervals; of two models the difference, and whether it is noise."""
    tuned, base, difference = results["tuned"], results.get("base"), results.get("difference", {})
    if base is None:
        table = _table("", "tuned", "95% interval")
    else:
        table = _table("", "before", "after", "difference, 95% interval", "")
    for figure, form in FORMS.items():
        value = form.format(tuned[figure])
        if base is None:
            table.add_row(name_of(figure), value, span(form, tuned["intervals"].get(figure)))
        else:
            found = difference.get(figure, {"interval": None, "noise": None})
            verdict = "noise (seed)" if "because" in found else {True: "noise", False: "", None: "?"}[found["noise"]]
            row = (form.format(base[figure]), value, span(form.replace("{:", "{:+"), found["interval"]), verdict)
            table.add_row(name_of(figure), *row)
    console.print(table)
    if any(found["noise"] and "because" not in found for found in difference.values()):
        console.print("noise: the interval holds 0; other rows of the same kind might have turned it round.")
    if any("because" in found for found in difference.values()):
        console.print(
            "noise (seed): beyond the choice of rows, but the two runs differ in their seed alone. This is how far "
            "training itself scatters; what an experiment gains should be more."
        )


def print_groups(console: Any, results: Mapping[str, Any]) -> None:
    """Print the tuned model's figures for each data set and each category, where there are several."""
    for column, groups in results["tuned"]["groups"].items():
        table = _table(column.replace("dataset", "data set"), "rows", *(name_of(figure) for figure in _IN_GROUPS))
        for name, found in groups.items():
            table.add_row(_plain(name), f"{found['count']:,}", *(FORMS[f].format(found[f]) for f in _IN_GROUPS))
        console.print()
        console.print(table)


def print_rows(console: Any, results: Mapping[str, Any], show: int) -> None:
    """Print some rows: question, expected answer, the answers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    tuned, base = results["tuned"]["rows"], results.get("base", {}).get("rows")
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    table.add_column("question", ratio=3, overflow="fold")
    table.add_column("expected", ratio=2, overflow="fold")
    if base:
        table.add_column("before", ratio=2, overflow="fold", style="dim")
    table.add_column("", width=1)
    table.add_column("after" if base else "answer", ratio=2, overflow="fold")
    # spread over all rows, not the first few of one kind
    chosen = [i * len(tuned) // min(show, len(tuned)) for i in range(min(show, len(tuned)))]
    for i in chosen:
        row = tuned[i]
        right = row["prediction"] == row["reference"]
        cells = [Text(short(row["prompt"], 120)), Text(short(row["reference"], 100))]
        if base:
            cells.append(Text(short(base[i]["prediction"], min(60, console.width // 2)) or "(nothing)"))
        mark = Text("✓", style="green") if right else Text("✗", style="red")
        table.add_row(*cells, mark, Text(short(row["prediction"], 100) or "(nothing)"))
    console.print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(short(text, 40))  # not taken for markup
