"""`instructft evaluate`: a model on held-out rows, beside the one that it was made from or another one, in tables.

What judges a model in another way (`instructft.extras`) puts the same question to both of them with `ask_both`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from instructft.checkpoints.as_saved import require_as_saved
from instructft.checkpoints.manifest import folders, verify
from instructft.checkpoints.resume import fixed_keys
from instructft.data.files.kinds import SUFFIXES, suffix_of
from instructft.data.files.locate import as_pattern
from instructft.data.load import Shape, conversations, file_conversations, shape_of
from instructft.data.prepare import SPLITS
from instructft.errors import CheckpointError, UsageError
from instructft.evaluation.answers import Own, own_figures
from instructft.evaluation.confidence import FEWEST, differences, mean_of
from instructft.evaluation.metrics import evaluate
from instructft.formatting import FORMS, SHARES, name_of, plain_table, short
from instructft.inference.generator import MAX_NEW_TOKENS, Generator
from instructft.inference.reference_model import START, ReferenceModel, check_base, recipe_of
from instructft.models.load_for_inference import load_for_inference, locate
from instructft.prompt.token_view import visible
from instructft.recipe.load import load_recipe
from instructft.recipe.schema import DatasetEntry, Recipe
from instructft.report.card_results import EVALUATION
from instructft.report.judged import join_report
from instructft.weights import remote_code

EVERYWHERE = ("exact_match", "rougeL", "stops")  # figures of answers that every evaluation has
_IN_GROUPS = ("loss", "exact_match", "rougeL", "bleu", "stopped")
Found = TypeVar("Found")


def compare(
    model: str,
    base: str | None = None,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    show: int = 10,
    json_file: Path | None = None,
    columns: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Evaluate, print a table of answers and a table of metrics, write `json_file`.

    The file holds `tuned`, and with `base` also `base` and `difference`: what `instructft.evaluate` returns, and of
    each figure tuned less base with its paired interval (`instructft.evaluation.confidence.differences`). Between two
    runs that differ in their seed alone every difference is noise, where it is not that of the rows `because` of
    the `seed`.

    Example::

        compare("runs/quickstart", base="start", show=1)
        # 720 rows: the test split of quickstart
        # …

    Raises:
        UsageError: no such model, no data to evaluate on, or a base that cannot be told; before weights are loaded.
    """
    from rich.console import Console

    check_models(model, base)
    run_recipe = recipe_of(model)
    base_recipe = recipe_of(base) if base and base != START else None
    seeds_alone = only_seeds_differ(run_recipe, base_recipe)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: found {limit}, expected 1 or more rows")
    check_json(json_file)
    rows, described, recipe = rows_of(run_recipe, data, split, limit, columns)
    train_on = train_on_of(run_recipe or recipe)
    figures, own, left_out = further_figures(run_recipe, recipe if data else None)

    tokens: list[dict[str, int]] = []  # each model's vocabulary
    contexts: list[int] = []

    def judge(generator: Generator) -> dict[str, Any]:
        tokens.append(generator.tokenizer.get_vocab())
        contexts.append(generator.context)
        return evaluate(
            generator,
            rows,
            train_on=train_on,
            progress=True,
            max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
            figures=figures,
            own=own,
        )

    results: dict[str, Any] = ask_both(model, base, judge)
    same_tokens = tokens[0] == tokens[-1]
    if base:
        difference = differences(results["tuned"]["rows"], results["base"]["rows"])
        difference |= further_differences(results["tuned"], results["base"])
        per_token = () if same_tokens else ("loss", "perplexity", "answer_tokens")
        results["difference"] = {name: found for name, found in difference.items() if name not in per_token}
        if seeds_alone:
            results["difference"] = {name: by_seed(found) for name, found in results["difference"].items()}
    write_json(json_file, results)
    console = Console(highlight=False)
    console.print(f"\n{len(rows)} rows: {described}", markup=False)
    if show > 0:
        _print_rows(console, results, show)
    _print_metrics(console, results)
    for line in (left_out, *(one["failed"] for one in results["tuned"]["metrics"].values() if "failed" in one)):
        if line:
            console.print(line, markup=False)
    if base_recipe and not seeds_alone:
        console.print(
            "The intervals cover the choice of rows, not the seed of training: how far that goes, a second run with "
            "another train.seed shows."
        )
    _print_groups(console, results["tuned"]["groups"])
    if cut := results["tuned"]["cut"]:
        console.print(
            f"{cut} of {len(rows)} rows are longer than the model's context of {contexts[0]} tokens: their loss is "
            "that of the part that fits, and a question that fills the context has no answer."
        )
    if not same_tokens:
        console.print(
            "The two models cut text into different tokens: loss and perplexity, which are per token, do not compare."
        )


def ask_both(model: str, base: str | None, judge: Callable[[Generator], Found]) -> dict[str, Found]:
    """What `judge` finds of a model, as `tuned`, and where there is a base of that, as `base`."""
    require_as_saved(model, whole=True)
    if base:
        require_as_saved(base, whole=True)
    tuned = Generator(*load_for_inference(model))
    found = {"tuned": judge(tuned)}
    if base:
        with ReferenceModel.of(model, base, tuned).answering() as other:
            found["base"] = judge(other)
    return found


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


# --------------------------------------------------------------------------------------------------------------------
# What is asked for
# --------------------------------------------------------------------------------------------------------------------


def check_models(model: str, base: str | None, option: str = "--base") -> None:
    """Refuse a model that is not there, or a base that cannot be told, before weights are loaded."""
    locate(model)
    if base:
        check_base(model, base, option)


def check_json(json_file: Path | None) -> None:
    """Make the folder that `--json` writes into; a `UsageError` where it names a folder."""
    if json_file:
        if json_file.is_dir():
            raise UsageError(f"--json: {json_file} is a folder; name a file")
        json_file.parent.mkdir(parents=True, exist_ok=True)


def write_json(json_file: Path | None, results: Mapping[str, Any]) -> None:
    """Write what `--json` asks for; as `evaluation.json` in a run folder it joins the run's page."""
    if json_file:  # `str`: a public benchmark's figures may hold objects of its own
        text = json.dumps(results, indent=2, ensure_ascii=False, default=str)
        json_file.write_text(text + "\n", encoding="utf-8")
        if json_file.name == EVALUATION:
            join_report(json_file.parent)


def train_on_of(recipe: Recipe | None) -> str:
    """Which tokens a recipe supervises."""
    return recipe.data.train_on if recipe else "responses"


def rows_of(
    recipe: Recipe | None,
    data: str | None,
    split: str | None,
    limit: int | None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Any], str, Recipe | None]:
    """The rows, what they are called, and the recipe that they come from."""
    if data and _holds_rows(data):
        if split:
            raise UsageError("--split goes with a recipe; a file is evaluated whole")
        shapes: list[Shape] = [(None, columns)] if columns else _shapes(recipe, data)
        return file_conversations(data, limit, shapes, recipe, strict=bool(columns)), data, None
    if columns:
        raise UsageError("--columns goes with --data FILE; a recipe says itself how its rows are read")
    if data:
        recipe = load_recipe(data)
    if recipe is None:
        raise UsageError("there is no recipe.yaml beside this model; say on what to evaluate it: --data FILE or RECIPE")
    if split is None:
        split = next((name for name in ("test", "validation") if recipe.data.holds_out(name)), None)
        if split is None:
            raise UsageError(f"{recipe.name} holds no rows out (data.splits); give --data FILE, or --split train")
    if split not in SPLITS:
        raise UsageError(f"--split: found {split}, expected {', '.join(SPLITS)}")
    rows = conversations(recipe, split, limit)
    if not rows:
        raise UsageError(f"the {split} split of {recipe.name} is empty; choose another with --split")
    return rows, f"the {split} split of {recipe.name}", recipe


def further_figures(run: Recipe | None, given: Recipe | None) -> tuple[list[str], dict[str, Own], str]:
    """The figures of a recipe that not every evaluation has, those of the user's own, and what is said of any left out.

    A function of the user's is code. The recipe that was given on the command line says which may be run; the one in a
    run folder, which may have come with it from elsewhere, does not.
    """
    recipe = given or run
    if recipe is None:
        return [], {}, ""
    section = recipe.evaluation
    ours = [name for name in section.figures() if name not in EVERYWHERE]
    functions = section.functions()
    if functions and given is None and not remote_code.allowed():
        named = ", ".join(f"{file}:{name}" for file, name in functions.values())
        asked = f"read it, then add {remote_code.FLAG}, or give the recipe: --data RECIPE"
        return ours, {}, f"not judged: {named}, code that the run's own recipe names. To run it, {asked}"
    return ours, dict(own_figures(functions)), ""


def further_differences(tuned: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tuned less base in each further figure, over the rows that both have it of."""
    found = {}
    for name in tuned["metrics"]:
        both = [(a["metrics"][name], b["metrics"][name]) for a, b in zip(tuned["rows"], base["rows"], strict=True)]
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        if not pairs or name in FORMS:
            continue
        ours, theirs = (mean_of(scores) for scores in zip(*pairs, strict=True))
        interval = ours.interval_over(theirs) if len(pairs) >= FEWEST else None
        noise = None if interval is None else interval[0] <= 0 <= interval[1]
        found[name] = {"value": ours.whole() - theirs.whole(), "interval": interval, "noise": noise}
    return found


def _shapes(recipe: Recipe | None, data: str) -> list[Shape]:
    """How a recipe has its rows read, the entry of this very file first."""

    def is_it(entry: DatasetEntry) -> bool:
        there = entry.path and Path(entry.path).expanduser().resolve() == Path(data).expanduser().resolve()
        return bool(there) or data == entry.url

    held_out = (recipe.data.validation or (), recipe.data.test or ()) if recipe else ()
    entries = [*(recipe.data.datasets if recipe else ()), *chain.from_iterable(held_out)]
    entries.sort(key=lambda entry: not is_it(entry))
    return [shape_of(entry) for entry in entries if entry.columns or (entry.format and is_it(entry))]


def _holds_rows(data: str) -> bool:
    """Whether `--data` names rows, not a recipe: by its ending, or as a folder or a pattern of files."""
    path = Path(data).expanduser()
    folder = path.is_dir() and not (path / "recipe.yaml").is_file()
    return suffix_of(data) in SUFFIXES or folder or as_pattern(data, Path()) is not None


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def _print_metrics(console: Any, results: Mapping[str, Any]) -> None:
    """One model's figures with their intervals; of two models the difference, and whether it is noise."""
    tuned, base, difference = results["tuned"], results.get("base"), results.get("difference", {})
    if base is None:
        table = plain_table("", "tuned", "95% interval")
    else:
        table = plain_table("", "before", "after", "difference, 95% interval", "")
    further = {name: one for name, one in tuned["metrics"].items() if one["rows"] and name not in FORMS}
    for figure in (*FORMS, *further):
        form = FORMS.get(figure) or ("{:.1%}" if figure in SHARES else "{:.3f}")
        if figure in further:
            value, interval = form.format(further[figure]["value"]), further[figure]["interval"]
        else:
            value, interval = form.format(tuned[figure]), tuned["intervals"].get(figure)
        if base is None:
            table.add_row(_cell(name_of(figure), 40), value, _span(form, interval))
        else:
            found = difference.get(figure, {"interval": None, "noise": False})
            verdict = "noise (seed)" if "because" in found else {True: "noise", False: "", None: "?"}[found["noise"]]
            theirs = base["metrics"].get(figure, {}).get("value") if figure in further else base[figure]
            row = (
                "" if theirs is None else form.format(theirs),
                value,
                _span(form.replace("{:", "{:+"), found["interval"]),
                verdict,
            )
            table.add_row(_cell(name_of(figure), 40), *row)
    console.print(table)
    if any(found["noise"] and "because" not in found for found in difference.values()):
        console.print("noise: the interval holds 0; other rows of the same kind might have turned it round.")
    if any(found["noise"] is None for found in difference.values()):
        count = len(tuned["rows"])
        console.print(
            f"?: {count} {'row is' if count == 1 else 'rows are'} too few, or too much alike, to tell a difference "
            "from chance; evaluate on more (a larger --limit, or --data)."
        )
    if any("because" in found for found in difference.values()):
        console.print(
            "noise (seed): beyond the choice of rows, but the two runs differ in their seed alone. This is how far "
            "training itself scatters; what an experiment gains should be more."
        )


def _span(form: str, interval: Sequence[float] | None) -> str:
    return "" if interval is None else " to ".join(form.format(value) for value in interval)


def _print_groups(console: Any, groups: Mapping[str, Any]) -> None:
    """Figures for each data set and each category, where there are several."""

    for column, parts in groups.items():
        table = plain_table(column.replace("dataset", "data set"), "rows", *(name_of(figure) for figure in _IN_GROUPS))
        for name, found in parts.items():
            figures = (FORMS[figure].format(found[figure]) for figure in _IN_GROUPS)
            table.add_row(_cell(name, 40), f"{found['count']:,}", *figures)  # Text: not taken for markup
        console.print()
        console.print(table)


def _print_rows(console: Any, results: Mapping[str, Any], show: int) -> None:
    """Some rows, spread over all of them: question, expected answer, the answers."""
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
    shown = min(show, len(tuned))
    for i in (place * len(tuned) // shown for place in range(shown)):
        row = tuned[i]
        cells = [_cell(row["prompt"], 120), _cell(row["reference"], 100)]
        if base:
            cells.append(_cell(base[i]["prediction"], min(60, console.width // 2)))
        right = row["prediction"] == row["reference"]
        mark = Text("✓", style="green") if right else Text("✗", style="red")
        table.add_row(*cells, mark, _cell(row["prediction"], 100))
    console.print(table)


def _cell(text: str, limit: int) -> Any:
    """What a row or a model says, on one line: shown, never obeyed, neither as markup nor by the terminal."""
    from rich.text import Text

    return Text(visible(short(text, limit)) or "(nothing)")


FINAL = "final"
_SHOWN = ("loss", "exact_match", "rougeL", "bleu", "stopped", "repeated")


def compare_checkpoints(
    run: str,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    json_file: Path | None = None,
    columns: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Evaluate every checkpoint that verifies and the final model; print a table, write `json_file`.

    The best is the one of the lowest loss. Rows that choose a model no longer judge it, so the default split is
    `validation`, and `test` stays untouched. The file holds `tuned` (the final model, or the newest checkpoint where
    the run is unfinished), `checkpoints` (name -> figures) and `best`.

    Example::

        compare_checkpoints("runs/gpt2-dolly", limit=200)
        # 200 rows: the validation split of gpt2-dolly
        # …

    Raises:
        UsageError: the folder holds no checkpoint, or there is nothing to evaluate on; before weights are loaded.
    """
    from rich.console import Console

    console = Console(highlight=False)
    folder = Path(run).expanduser()
    models, broken = _models(folder)
    if not models:
        raise UsageError(f"--checkpoints: {run} holds no checkpoint that verifies" + "".join(f"; {b}" for b in broken))
    check_json(json_file)
    recipe = recipe_of(str(folder))
    if split is None and recipe is not None and not data and recipe.data.holds_out("validation"):
        split = "validation"
    rows, described, made_from = rows_of(recipe, data, split, limit, columns)
    train_on = train_on_of(recipe or made_from)

    found: dict[str, Any] = {}
    for name, place in models.items():
        generator = Generator(*load_for_inference(str(place)))
        found[name] = evaluate(generator, rows, train_on=train_on, max_new_tokens=max_new_tokens or MAX_NEW_TOKENS)
        console.print(f"{name}: loss {found[name]['loss']:.4f}", markup=False)
        del generator  # one model in memory at a time
    best = min(found, key=lambda name: found[name]["loss"])
    tuned = found[FINAL] if FINAL in found else found[list(found)[-1]]
    write_json(json_file, {"tuned": tuned, "checkpoints": found, "best": best})
    console.print(f"\n{len(rows)} rows: {described}", markup=False)
    for line in broken:
        console.print(f"skipped: {line}", markup=False)
    table = plain_table("", *(name_of(figure) for figure in _SHOWN), "")
    for name, figures in found.items():
        noise = differences(found[best]["rows"], figures["rows"])["loss"]["noise"]
        mark = "best" if name == best else "as good, within noise" if noise else ""
        table.add_row(name, *(FORMS[figure].format(figures[figure]) for figure in _SHOWN), mark)
    console.print(table)


def _models(run: Path) -> tuple[dict[str, Path], list[str]]:
    """Name -> folder of the checkpoints that verify, the oldest first, then the final model; and why others do not."""
    models, broken = {}, []
    for folder in reversed(folders(run) if run.is_dir() else []):
        try:
            verify(folder)
        except CheckpointError as error:
            broken.append(str(error))
        else:
            models[folder.name] = folder
    if models and any((run / name).is_file() for name in ("config.json", "adapter_config.json")):
        models[FINAL] = run
    return models, broken
