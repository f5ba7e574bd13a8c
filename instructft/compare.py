"""`instructft evaluate`: a model on held-out rows, and beside it the one that it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instructft.adapter_files import AdapterFolder, is_adapter, leaves_base_as_it_is
from instructft.data import SPLITS, conversations, file_conversations
from instructft.errors import UsageError
from instructft.evaluate import METRICS, evaluate
from instructft.files import SUFFIXES, suffix_of
from instructft.generate import Generator, find_adapter, load_bare, load_base, load_for_inference, locate
from instructft.models import _fit_embeddings, load_model
from instructft.recipe import Recipe, load_recipe, load_run_recipe

START = "start"  # --base start: the model that the run began from


def compare(
    model: str,
    base: str | None = None,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    show: int = 10,
    json_file: Path | None = None,
) -> None:
    """Evaluate, print a table of answers and a table of metrics, write `json_file`.

    >>> compare("runs/quickstart", base="start", show=1)
    720 rows: the test split of quickstart
    …

    Raises:
        UsageError: no such model, no data to evaluate on, or a base that cannot be told; before weights are loaded.
    """
    from rich.console import Console

    locate(model)
    run_recipe = _recipe_of(model)
    adapter = find_adapter(model)
    if base == START:
        if run_recipe is None and adapter is None:
            raise UsageError("--base start needs a run folder, whose recipe.yaml says what the run began from")
    elif base:
        locate(base)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: found {limit}, expected 1 or more rows")
    if json_file:
        if json_file.is_dir():
            raise UsageError(f"--json: {json_file} is a folder; name a file")
        json_file.parent.mkdir(parents=True, exist_ok=True)
    rows, described, recipe = _rows(run_recipe, data, split, limit)
    made_by = run_recipe or recipe
    train_on = made_by.data.train_on if made_by else "responses"

    tuned = Generator(*load_for_inference(model))
    results = {"tuned": evaluate(tuned, rows, train_on=train_on)}
    other = None
    if base:
        with _beside(base, run_recipe, tuned, adapter) as other:
            results["base"] = evaluate(other, rows, train_on=train_on)
    if json_file:
        json_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    console.print(f"\n{len(rows)} rows: {described}", markup=False)
    if show > 0:
        _print_rows(console, results, show)
    _print_metrics(console, results)
    if cut := results["tuned"]["cut"]:
        console.print(
            f"{cut} of {len(rows)} rows are longer than the model's context of {tuned.context} tokens: their loss is "
            "that of the part that fits, and a question that fills the context has no answer."
        )
    if other and other.tokenizer.get_vocab() != tuned.tokenizer.get_vocab():
        console.print(
            "The two models cut text into different tokens: loss and perplexity, which are per token, do not compare."
        )


def _recipe_of(model: str) -> Recipe | None:
    """The recipe in a run folder, also when a checkpoint in it was named."""
    folder = Path(model).expanduser()
    for place in (folder, folder.resolve().parent):
        if (place / "recipe.yaml").is_file():
            return load_run_recipe(place)
    return None


def _rows(
    recipe: Recipe | None, data: str | None, split: str | None, limit: int | None
) -> tuple[list[Any], str, Recipe | None]:
    """The rows, what they are called, and the recipe that they come from."""
    if data and suffix_of(data) in SUFFIXES:
        if split:
            raise UsageError("--split goes with a recipe; a file is evaluated whole")
        return file_conversations(data, limit), data, None
    if data:
        recipe = load_recipe(data)
    if recipe is None:
        raise UsageError("there is no recipe.yaml beside this model; say on what to evaluate it: --data FILE or RECIPE")
    splits = recipe.data.splits
    if split is None:
        if not (splits.test or splits.validation):
            raise UsageError(f"{recipe.name} holds no rows out (data.splits); give --data FILE, or --split train")
        split = "test" if splits.test else "validation"
    if split not in SPLITS:
        raise UsageError(f"--split: found {split}, expected {', '.join(SPLITS)}")
    rows = conversations(recipe, split, limit)
    if not rows:
        raise UsageError(f"the {split} split of {recipe.name} is empty; choose another with --split")
    return rows, f"the {split} split of {recipe.name}", recipe


@contextmanager
def _beside(base: str, recipe: Recipe | None, tuned: Generator, adapter: AdapterFolder | None) -> Iterator[Generator]:
    """The model to compare with, while it is compared.

    What an adapter began from is the tuned model itself with the adapter switched off: its base is in memory once.
    Where that is not exact, the base is loaded anew.
    """
    began = Path(recipe.model.name_or_path or "") / (recipe.model.subfolder or "") if recipe else Path()
    if base != START or adapter is None or is_adapter(began):  # what was trained may have been an adapter already
        yield _base(base, recipe, tuned)
    elif leaves_base_as_it_is(adapter):
        with tuned.model.disable_adapter():
            yield Generator(tuned.model, tuned.tokenizer)
    else:
        model = load_base(adapter)
        _fit_embeddings(model, adapter.base.vocab_size)
        yield Generator(model, tuned.tokenizer)


def _base(base: str, recipe: Recipe | None, tuned: Generator) -> Generator:
    """The model to compare with. One of the same family is asked exactly as the tuned one is, another in its own way.

    Of the same family is one whose vocabulary is that of the tuned model, perhaps without tokens that training added;
    their embeddings start as they did in training.
    """
    if base == START:
        assert recipe is not None
        start = load_model(recipe, tuned.tokenizer)
        placed = start if recipe.model.quantization != "none" else start.to(tuned.model.device)
        return Generator(placed.eval(), tuned.tokenizer)
    model, tokenizer = load_bare(base)
    if tokenizer.get_vocab().items() <= tuned.tokenizer.get_vocab().items():
        if find_adapter(base) is None:  # an adapter brings its own rows
            _fit_embeddings(model, len(tuned.tokenizer))
        return Generator(model, tuned.tokenizer)
    return Generator(*load_for_inference(base))


def _print_metrics(console: Any, results: Mapping[str, Any]) -> None:
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


def _print_rows(console: Any, results: Mapping[str, Any], show: int) -> None:
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
        cells = [Text(_short(row["prompt"], 120)), Text(_short(row["reference"], 100))]
        if base:
            cells.append(Text(_short(base[i]["prediction"], min(60, console.width // 2)) or "(nothing)"))
        mark = Text("✓", style="green") if right else Text("✗", style="red")
        table.add_row(*cells, mark, Text(_short(row["prediction"], 100) or "(nothing)"))
    console.print(table)


def _short(text: str, limit: int) -> str:
    """One line of at most `limit` characters.

    >>> _short("one\\n  two three", 9)
    'one two …'
    """
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
