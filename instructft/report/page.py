"""`report.html`: a run on one self-contained page, for somebody who was not there.

What was trained on what, how it went, what became of the data, one row with its mask, the answers before and after,
and how to load what came out. The page is `html/report.html.jinja`; it holds no script, loads nothing, and names no
folder of this machine. Text of data and models is shown, never obeyed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.formatting import clock, yaml_text
from instructft.prompt.token_view import visible
from instructft.redaction import last_name, without_places, without_roots
from instructft.report.curves import Chart, chart, finite, number, read_metrics, series_of
from instructft.report.model_card import read_evaluation
from instructft.report.sections import (
    before_and_after,
    evaluation_table,
    lengths,
    loading,
    notes,
    starting_point,
    training_row,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from instructft.data.prepare import Prepared
    from instructft.data.streaming import Streamed
    from instructft.recipe.schema import Recipe

PAGE = Path(__file__).parent / "html" / "report.html.jinja"

_CURVES = (  # title, unit, (name, key in metrics.jsonl, marked with dots)
    ("Loss", "nats per supervised token", (("training", "loss", False), ("validation", "eval_loss", True))),
    ("Learning rate", "", (("learning rate", "learning_rate", False),)),
    ("Speed", "tokens per second", (("training", "tokens_per_second", False),)),
    (
        "Tokens guessed right",
        "share of supervised tokens",
        (("training", "mean_token_accuracy", False), ("validation", "eval_mean_token_accuracy", True)),
    ),
)
_WORDS = {
    "train_loss": "training loss, mean over the run",
    "loss": "training loss, at the end",
    "eval_loss": "validation loss",
    "eval_perplexity": "validation perplexity",
    "mean_token_accuracy": "training, share of tokens guessed right",
    "eval_mean_token_accuracy": "validation, share of tokens guessed right",
    "entropy": "training, entropy of the predictions (nats)",
    "eval_entropy": "validation, entropy of the predictions (nats)",
    "grad_norm": "gradient norm, at the end",
    "learning_rate": "learning rate, at the end",
}


def draw_report(
    run: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Prepared | Streamed | None = None,
) -> Path | None:
    """`write_report` that loses no finished run: a page that cannot be drawn is said on stderr, and None comes back."""
    try:
        return write_report(run, recipe, facts, tokenizer, data)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        print(f"report.html was not drawn ({why}); the run is whole all the same", file=sys.stderr)
        return None


def write_report(
    run: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Prepared | Streamed | None = None,
) -> Path:
    """Write `report.html` into a run folder, from what lies there and the contents of `run.json`.

    Args:
        tokenizer: with `data`, shows a training row token by token.
        data: with it the page has the lengths of the rows, and one row.

    >>> write_report(Path("runs/quickstart"), recipe, facts)
    PosixPath('runs/quickstart/report.html')
    """
    text = page(run, recipe, facts, tokenizer, data)
    partial = run / "report.html.partial"
    partial.write_text(text, encoding="utf-8")
    return partial.replace(run / "report.html")


def page(
    run: Path,
    recipe: Recipe,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Prepared | Streamed | None = None,
) -> str:
    """The text of `report.html`."""
    import jinja2
    from markupsafe import Markup

    records = read_metrics(run)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # control characters, and those that turn the direction of writing around, become signs
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["number"] = lambda value: number(value) if finite(value) else str(value)
    environment.filters["clock"] = clock
    folders = [run, run.parent, Path(recipe.output_dir)]
    resolved = without_places(recipe.to_dict(), folders)
    text = environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        name=recipe.name,
        start=starting_point(recipe),
        sets=[last_name(entry.name or entry.hub or entry.path or entry.url or "") for entry in recipe.data.datasets],
        lora=recipe.adapter.type == "lora",
        recipe=recipe,
        template=last_name(recipe.data.template),
        facts=facts,
        charts=list(_charts(records)),
        samples=before_and_after(run),
        evaluation=evaluation_table(read_evaluation(run)),
        lengths=lengths(recipe, data),
        row=training_row(recipe, tokenizer, data),
        metrics={key: (_WORDS.get(key, key), value) for key, value in _in_order(facts["metrics"]).items()},
        notes=notes(facts, records),
        load=loading(recipe),
        resolved=yaml_text(resolved).strip(),
    )
    return without_roots(text, folders)


def _charts(records: list[dict[str, Any]]) -> Iterable[Chart]:
    for title, unit, lines in _CURVES:
        zero = lines[0][1] in ("learning_rate", "tokens_per_second")
        series = [series_of(records, key, name, dots=dots, from_zero=zero) for name, key, dots in lines]
        if drawn := chart(title, series, unit):
            yield drawn


def _in_order(metrics: Mapping[str, Any]) -> dict[str, Any]:
    first = {key: metrics[key] for key in _WORDS if key in metrics}
    return {**first, **{key: value for key, value in sorted(metrics.items()) if key not in first}}
