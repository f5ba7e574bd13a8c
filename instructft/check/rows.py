"""`instructft inspect`: rows as they are trained, after template, cut and packing, in the terminal or as a page.

The page is one file without scripts: hovering a token shows its id and label, two switches show ids and borders.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from instructft.errors import UsageError
from instructft.prompt.token_view import STYLES, RowView, Shown, no_colour, show, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from instructft.data.prepare import Prepared
    from instructft.recipe.schema import Recipe

_PAGE = Path(__file__).parent / "html" / "inspect.html.jinja"


def inspect_rows(
    recipe: Recipe,
    split: str = "train",
    limit: int = 3,
    numbers: Sequence[int] = (),
    ids: bool = False,
    page: Path | None = None,
    console: Console | None = None,
) -> None:
    """Show rows of a recipe's data; loads its tokenizer and data, and no weights.

    Args:
        split: train, validation or test.
        limit: rows to show, drawn by `data.seed`; more rows hold those of fewer.
        numbers: the rows to show instead, counted from 1.
        ids: show each token above its id.
        page: write an HTML page to this file instead.

    Raises:
        UsageError: a recipe or data that cannot be used, or a split or row that is not there.
    """
    from rich.console import Console

    from instructft.data.prepare import prepare
    from instructft.models.branches import why_not
    from instructft.models.starting_point import starting_point
    from instructft.models.tokenizer import load_tokenizer
    from instructft.training.arguments import follow_model

    if page is not None and (page.suffix.lower() not in (".html", ".htm") or not page.absolute().parent.is_dir()):
        raise UsageError(f"--html: {page}: expected a file name that ends in .html, in a folder that exists")
    with Console(stderr=True).status("Reading and encoding the data …"):
        tokenizer = load_tokenizer(recipe)
        if "max_length" not in recipe.data.model_fields_set:
            recipe, _ = follow_model(recipe, starting_point(recipe, tokenizer).config)
        data = prepare(recipe, tokenizer, lambda: why_not(recipe, starting_point(recipe, tokenizer).config))
    if split not in data.splits:
        raise UsageError(f"--split: the recipe makes no {split!r} rows; it makes {', '.join(data.splits)}")
    rows = data.splits[split]
    if wrong := [number for number in numbers if not 1 <= number <= len(rows)]:
        raise UsageError(f"--row: {wrong[0]} is not there; {split} holds rows 1 to {len(rows)}")
    chosen = [number - 1 for number in numbers] or draw(len(rows), limit, recipe.data.seed)
    shown = [show(rows[i], tokenizer, i + 1, len(rows), recipe.data.max_length) for i in chosen]
    about = summary(recipe, tokenizer, data, split)
    if page is None:
        if console is None and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # data is of any script; the encoding may know few
        _print(shown, about, ids, console or Console())
        return
    text = html_page(shown, tokenizer, f"{recipe.name} · {split}", about)
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html: {page} could not be written: {error.strerror}") from error
    print(f"Wrote {page}: {len(shown)} of {len(rows):,} {split} {'packs' if data.packed else 'rows'}")


def draw(total: int, limit: int, seed: int) -> list[int]:
    """`limit` row numbers of `total`, drawn by the seed, in order.

    >>> set(draw(100, 3, seed=42)) < set(draw(100, 5, seed=42))
    True
    """
    return np.sort(np.random.default_rng([seed, 3]).permutation(total)[:limit]).tolist()


def summary(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Prepared, split: str) -> dict[str, str]:
    """What the rows come from and what became of all of them, line by line."""
    from instructft.data.account import said_of_hidden
    from instructft.data.tokenize import drop_reasons
    from instructft.prompt.templates import TEMPLATES

    own = str(tokenizer.chat_template)
    built_in = next((name for name, template in TEMPLATES.items() if own.endswith(template.text())), "the tokenizer's")
    name = recipe.data.template
    tokens, supervised, packs = data.tokens[split], data.supervised_tokens[split], len(data.splits[split])
    lines = {
        "recipe": recipe.name,
        "template": f"{name} ({built_in})" if name == "auto" else name,
        "tokenizer": f"{recipe.model.tokenizer or recipe.model.name_or_path} · {len(tokenizer):,} tokens",
        "rows": " · ".join(f"{key} {value:,}" for key, value in data.rows.items() if value),
        "loss on": f"{recipe.data.train_on}: {supervised:,} of {tokens:,} {split} tokens ({supervised / tokens:.1%})",
    }
    if data.packed and split != "test":
        length = recipe.data.max_length
        lines["packed"] = f"{packs:,} {split} packs of {length:,} tokens, {tokens / (packs * length):.1%} full"
    if data.cut:
        lines["cut"] = f"{data.cut:,} rows longer than {recipe.data.max_length:,} lost {data.cut_tokens:,} tokens"
    if data.dropped:
        lines["dropped"] = drop_reasons(data.dropped)
    return lines | dict(said_of_hidden(data.hidden.facts()))


def _print(rows: Sequence[Shown], about: Mapping[str, str], ids: bool, console: Console) -> None:
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in about.items():
        table.add_row(key, Text(visible(value)))
    table.add_row("legend", _legend(no_colour(console), ids))
    console.print(table)
    for row in rows:
        tokens, loss = row.counts
        facts = [f"{tokens:,} tokens", f"{loss:,} with loss ({loss / tokens:.1%})"]
        facts += row.parts_in_words
        if row.cut:
            facts.append("cut: its end is missing")
        console.print()
        title = Text(f"row {row.number:,} of {row.of:,} · {' · '.join(facts)}", style="bold")
        console.print(Rule(title, align="left", characters="━", style="default"))
        # in a file nothing is wrapped: a line ends where the row has a new line
        console.print(RowView(row.documents, ids, row.starts), soft_wrap=not console.is_terminal and not ids)


def _legend(plain: bool, ids: bool) -> Text:
    from rich.text import Text

    loss, special = "carries loss", "special token"
    if plain:
        loss, special = "^ carries loss" if ids else f"⟦{loss}⟧", f"⟨{special}⟩"
    named = [(loss, STYLES[True, False]), ("no loss", STYLES[False, False]), (special, STYLES[False, True])]
    parts = [*named, ("⏎ new line", ""), *([("· space", "")] if ids else [])]
    return Text("   ").join(Text(*part) for part in parts)


def html_page(
    rows: Sequence[Shown | Mapping[str, Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    title: str = "rows",
    about: Mapping[str, str] | None = None,
) -> str:
    """Rows (of `prepare_dataset`, or as `show` makes them) as one self-contained HTML page."""
    import jinja2

    shown = [
        row if isinstance(row, Shown) else show(row, tokenizer, number, len(rows))
        for number, row in enumerate(rows, start=1)
    ]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = visible(str(tokenizer.chat_template or ""))
    return page.from_string(_PAGE.read_text(encoding="utf-8")).render(
        rows=shown,
        title=visible(title),
        about={visible(k): visible(v) for k, v in (about or {}).items()},
        template=template,
    )
