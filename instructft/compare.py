"""`instructft evaluate`: a model on held-out rows, and beside it the one that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instructft.data import conversations, file_conversations
from instructft.errors import UsageError
from instructft.evaluate import METRICS, evaluate
from instructft.generate import Generator, load_for_inference
from instructft.recipe import Recipe, load_recipe, load_run_recipe

START = "start"  # --base start: the model that the run began from


def compare(
    model: str,
    base: str | None,
    data: str | None,
    split: str | None,
    limit: int | None,
    show: int,
    json_file: Path | None,
) -> None:
    """Evaluate, print a table of metrics and a table of answers, write `json_file`.

    Raises:
        UsageError: no data to evaluate on, or a base that cannot be told.
    """
    from rich.console import Console

    run_recipe = _recipe_of(model)
    rows, described = _rows(run_recipe, data, split, limit)
    tuned = Generator(*load_for_inference(model))
    results = {"tuned": evaluate(tuned, rows)}
    if base:
        results["base"] = evaluate(_base(base, run_recipe, tuned), rows)
    if json_file:
        json_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console = Console()
    console.print(f"\n{len(rows)} rows: {described}", markup=False, highlight=False)
    if show:
        _print_rows(console, results, show)
    _print_metrics(console, results)


def _recipe_of(model: str) -> Recipe | None:
    """The recipe in a run folder, also when a checkpoint in it was named."""
    for folder in (Path(model), Path(model).parent):
        if (folder / "recipe.yaml").is_file():
            return load_run_recipe(folder)
    return None


def _rows(recipe: Recipe | None, data: str | None, split: str | None, limit: int | None) -> tuple[list[Any], str]:
    if data and Path(data).suffix not in (".yaml", ".yml") and Path(data).is_file():
        if split:
            raise UsageError("--split goes with a recipe; a file is evaluated whole")
        return file_conversations(data, limit), data
    if data:
        recipe = load_recipe(data)
    if recipe is None:
        raise UsageError("there is no recipe.yaml beside this model; say on what to evaluate it: --data FILE or RECIPE")
    splits = recipe.data.splits
    split = split or ("test" if splits.test else "validation" if splits.validation else None)
    if split not in ("train", "validation", "test"):
        raise UsageError(
            "this recipe holds no rows out (data.splits); give --data FILE"
            if split is None
            else f"--split: found {split}, expected train, validation or test"
        )
    rows = conversations(recipe, split, limit)
    if not rows:
        raise UsageError(f"the {split} split of {recipe.name} is empty; choose another with --split")
    return rows, f"the {split} split of {recipe.name}"


def _base(base: str, recipe: Recipe | None, tuned: Generator) -> Generator:
    """The model to compare with, asked with the tuned model's template."""
    if base != START:
        model, tokenizer = load_for_inference(base)
        tokenizer.chat_template = tuned.tokenizer.chat_template
        if model.get_input_embeddings().weight.shape[0] < len(tuned.tokenizer):
            return Generator(model, tokenizer)
        return Generator(model, tuned.tokenizer)
    if recipe is None:
        raise UsageError("--base start needs a run folder, whose recipe.yaml says what the run began from")
    from instructft.models import load_model

    start = load_model(recipe, tuned.tokenizer)
    return Generator(start.to(tuned.model.device).eval(), tuned.tokenizer)


def _print_metrics(console: Any, results: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("")
    names = [name for name in ("base", "tuned") if name in results]
    for name in names:
        table.add_column({"base": "before", "tuned": "after"}[name] if len(names) > 1 else name, justify="right")
    for metric in ("loss", "perplexity", *METRICS):
        form = "{:.1%}" if metric == "exact_match" else "{:,.3f}" if metric != "bleu" else "{:.1f}"
        table.add_row(metric.replace("_", " "), *(form.format(results[name][metric]) for name in names))
    console.print(table)


def _print_rows(console: Any, results: dict[str, Any], show: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    tuned, base = results["tuned"]["rows"], results.get("base", {}).get("rows")
    table = Table(box=SIMPLE_HEAD, show_lines=False, header_style="bold", pad_edge=False)
    for title in ("question", "expected", *(["before"] if base else []), "after" if base else "answer"):
        table.add_column(title, overflow="fold", ratio=3 if title == "question" else 2)
    step = max(1, len(tuned) // show)  # spread over all rows, not the first few of one kind
    for i in list(range(0, len(tuned), step))[:show]:
        row = tuned[i]
        right = row["prediction"] == row["reference"]
        cells = [escape(row["prompt"]), escape(row["reference"])]
        if base:
            cells.append("[dim]" + escape(_short(base[i]["prediction"])) + "[/]")
        mark = "[green]✓[/] " if right else "[red]✗[/] "
        table.add_row(*cells, mark + escape(_short(row["prediction"])))
    console.print(table)


def _short(text: str, limit: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
