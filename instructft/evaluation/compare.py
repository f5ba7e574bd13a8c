"""`instructft evaluate`: a model on held-out rows, and beside it the one that it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructft.checkpoints.resume import fixed_keys
from instructft.data.prepare import SPLITS, conversations, file_conversations
from instructft.data.readers import SUFFIXES, suffix_of
from instructft.errors import UsageError
from instructft.evaluation.compare_tables import print_groups, print_metrics, print_rows
from instructft.evaluation.confidence import differences
from instructft.evaluation.metrics import evaluate
from instructft.inference.chat import Generator, load_for_inference, locate
from instructft.inference.reference_model import START, ReferenceModel, check_base, recipe_of
from instructft.recipe.schema import Recipe, load_recipe


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

    The file holds `tuned`, and with `base` also `base` and `difference`: what `instructft.evaluate` returns, and of
    each figure tuned less base with its paired interval (`instructft.evaluation.confidence.differences`). Between two
    runs that differ in their seed alone every difference is noise, where it is not that of the rows `because` of
    the `seed`.

    >>> compare("runs/quickstart", base="start", show=1)
    720 rows: the test split of quickstart
    …

    Raises:
        UsageError: no such model, no data to evaluate on, or a base that cannot be told; before weights are loaded.
    """
    from rich.console import Console

    locate(model)
    if base:
        check_base(model, base)
    run_recipe = recipe_of(model)
    base_recipe = recipe_of(base) if base and base != START else None
    seeds_alone = only_seeds_differ(run_recipe, base_recipe)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: found {limit}, expected 1 or more rows")
    json_place(json_file)
    rows, described, recipe = rows_of(run_recipe, data, split, limit)
    made_by = run_recipe or recipe
    train_on = made_by.data.train_on if made_by else "responses"

    tuned = Generator(*load_for_inference(model))
    results: dict[str, Any] = {"tuned": evaluate(tuned, rows, train_on=train_on)}
    same_tokens = True
    if base:
        with ReferenceModel.of(model, base, tuned).answering() as other:
            results["base"] = evaluate(other, rows, train_on=train_on)
            same_tokens = other.tokenizer.get_vocab() == tuned.tokenizer.get_vocab()
        difference = differences(results["tuned"]["rows"], results["base"]["rows"])
        per_token = () if same_tokens else ("loss", "perplexity", "answer_tokens")
        results["difference"] = {name: found for name, found in difference.items() if name not in per_token}
        if seeds_alone:
            results["difference"] = {name: by_seed(found) for name, found in results["difference"].items()}
    if json_file:
        json_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    console.print(f"\n{len(rows)} rows: {described}", markup=False)
    if show > 0:
        print_rows(console, results, show)
    print_metrics(console, results)
    if base_recipe and not seeds_alone:
        console.print(
            "The intervals cover the choice of rows, not the seed of training: how far that goes, a second run with "
            "another train.seed shows."
        )
    print_groups(console, results)
    if cut := results["tuned"]["cut"]:
        console.print(
            f"{cut} of {len(rows)} rows are longer than the model's context of {tuned.context} tokens: their loss is "
            "that of the part that fits, and a question that fills the context has no answer."
        )
    if not same_tokens:
        console.print(
            "The two models cut text into different tokens: loss and perplexity, which are per token, do not compare."
        )


def only_seeds_differ(one: Recipe | None, other: Recipe | None) -> bool:
    """Whether two runs are of the same recipe, with another seed."""
    if one is None or other is None:
        return False
    ours, theirs = fixed_keys(one), fixed_keys(other)
    changed = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    return bool(changed) and changed <= {"train.seed", "train.data_seed"}


def by_seed(found: Mapping[str, Any]) -> dict[str, Any]:
    """A difference of two seeds: what lies beyond the choice of rows is chance too, that of training.

    >>> by_seed({"value": 0.1, "interval": [0.05, 0.2], "noise": False})
    {'value': 0.1, 'interval': [0.05, 0.2], 'noise': True, 'because': 'seed'}
    """
    return {**found, "noise": True, "because": "seed"} if found["noise"] is False else dict(found)


def json_place(json_file: Path | None) -> None:
    """Make the folder that `--json` writes into; a `UsageError` where it names a folder."""
    if json_file:
        if json_file.is_dir():
            raise UsageError(f"--json: {json_file} is a folder; name a file")
        json_file.parent.mkdir(parents=True, exist_ok=True)


def rows_of(
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
