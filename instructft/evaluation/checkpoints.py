"""`instructft evaluate RUN --checkpoints`: all checkpoints of a run on the same rows in one table, the best marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instructft.checkpoints.manifest import folders, verify
from instructft.errors import CheckpointError, UsageError
from instructft.evaluation.compare import check_json, plain_table, rows_of, train_on_of, write_json
from instructft.evaluation.confidence import differences
from instructft.evaluation.metrics import evaluate
from instructft.formatting import FORMS, name_of
from instructft.inference.generator import Generator
from instructft.inference.reference_model import recipe_of
from instructft.models.load_for_inference import load_for_inference

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
    check_json(json_file)
    recipe = recipe_of(str(folder))
    if split is None and recipe is not None and not data and recipe.data.splits.validation:
        split = "validation"
    rows, described, made_from = rows_of(recipe, data, split, limit)
    train_on = train_on_of(recipe or made_from)

    found: dict[str, Any] = {}
    for name, place in models.items():
        generator = Generator(*load_for_inference(str(place)))
        found[name] = evaluate(generator, rows, train_on=train_on)
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
