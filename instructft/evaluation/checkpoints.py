"""`instructft evaluate RUN --checkpoints`: all checkpoints of a run on the same rows in one table, the best marked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructft.checkpoints.manifest import folders, verify
from instructft.errors import CheckpointError, UsageError
from instructft.evaluation.compare import json_place, rows_of
from instructft.evaluation.confidence import differences
from instructft.evaluation.metrics import evaluate
from instructft.formatting import FORMS, name_of
from instructft.inference.chat import Generator, load_for_inference
from instructft.inference.reference_model import recipe_of

FINAL = "final"
_SHOWN = ("loss", "exact_match", "rougeL", "bleu", "stopped", "repeated")


def compare_checkpoints(
    run: str,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    json_file: Path | None = None,
) -> None:
    """Evaluate every checkpoint that verifies and the final model; print a table, write `json_file`.

    The best is the one of the lowest loss. Rows that choose a model no longer judge it, so the default split is
    `validation`, and `test` stays untouched. The file holds `tuned` (the final model, or the newest checkpoint where
    the run is unfinished), `checkpoints` (name -> figures) and `best`.

    >>> compare_checkpoints("runs/gpt2-dolly", limit=200)
    200 rows: the validation split of gpt2-dolly
    …

    Raises:
        UsageError: the folder holds no checkpoint, or there is nothing to evaluate on; before weights are loaded.
    """
    from rich.console import Console

    console = Console(highlight=False)
    folder = Path(run).expanduser()
    models, broken = _models(folder)
    if not models:
        raise UsageError(f"--checkpoints: {run} holds no checkpoint that verifies" + "".join(f"; {b}" for b in broken))
    json_place(json_file)
    recipe = recipe_of(str(folder))
    if split is None and recipe is not None and not data and recipe.data.splits.validation:
        split = "validation"
    rows, described, made_from = rows_of(recipe, data, split, limit)
    used = recipe or made_from
    train_on = used.data.train_on if used else "responses"

    found: dict[str, Any] = {}
    for name, place in models.items():
        generator = Generator(*load_for_inference(str(place)))
        found[name] = evaluate(generator, rows, train_on=train_on)
        console.print(f"{name}: loss {found[name]['loss']:.4f}", markup=False)
        del generator  # one model in memory at a time
    best = min(found, key=lambda name: found[name]["loss"])
    apart = {name: differences(found[best]["rows"], found[name]["rows"])["loss"]["noise"] for name in found}
    tuned = found[FINAL] if FINAL in found else found[list(found)[-1]]
    results = {"tuned": tuned, "checkpoints": found, "best": best}
    if json_file:
        json_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"\n{len(rows)} rows: {described}", markup=False)
    for line in broken:
        console.print(f"passed over: {line}", markup=False)
    _print(console, found, best, apart)


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


def _print(console: Any, found: Mapping[str, Any], best: str, noise: Mapping[str, bool | None]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for figure in _SHOWN:
        table.add_column(name_of(figure), justify="right")
    table.add_column("")
    for name, figures in found.items():
        mark = "best" if name == best else "as good, within noise" if noise[name] else ""
        table.add_row(name, *(FORMS[figure].format(figures[figure]) for figure in _SHOWN), mark)
    console.print(table)
