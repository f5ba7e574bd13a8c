"""Whether a run has reached its end already, told without torch: by its folder, and by what has not changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from instructft.checkpoints.as_saved import require_as_saved
from instructft.checkpoints.manifest import folders, kind, step_of
from instructft.errors import InstructftError
from instructft.recipe.load import load_run_recipe
from instructft.weights.readable import read_object

if TYPE_CHECKING:
    from instructft.recipe.schema import Recipe


def finished_at_a_glance(recipe: Recipe) -> int | None:
    """Steps of a run that has reached its end, where that is plain without torch; None: whoever trains finds out.

    It is plain where the run's recipe says the same, nothing that the run was made of is younger than its `run.json`,
    and its model lies there as it was saved.
    """
    run = Path(recipe.output_dir)
    made = run / "run.json"
    if not made.is_file() or not (run / "recipe.yaml").is_file() or recipe.data.packing == "auto":
        return None
    try:
        before, steps = load_run_recipe(run), int(read_object(made)["train"]["steps"])
        newest_there = next((step_of(folder) for folder in folders(run) if kind(folder) == "sealed"), None)
        if newest_there != steps or not _as_before(recipe, before) or _is_younger(recipe, made.stat().st_mtime):
            return None
        require_as_saved(run, whole=False)
    except (InstructftError, OSError, KeyError, TypeError, ValueError):
        return None
    return steps


def _as_before(recipe: Recipe, before: Recipe) -> bool:
    """Whether a recipe asks for what a run was made from; what it leaves open was decided then."""
    now, then = recipe.to_dict(), before.to_dict()
    if "max_length" not in recipe.data.model_fields_set:
        del now["data"]["max_length"], then["data"]["max_length"]
    written = all(now["train"].get(key) == then["train"].get(key) for key in {*recipe.train_written, "seed"})
    return written and all(now[key] == then[key] for key in ("model", "data", "adapter", "samples"))


def _is_younger(recipe: Recipe, made: float) -> bool:
    """Whether rows, weights or a template have changed since, or lie where a look would not tell."""
    places = [recipe.data.template] if recipe.data.template.endswith(".jinja") else []
    for entry in (*recipe.data.datasets, *(recipe.data.validation or ()), *(recipe.data.test or ())):
        if entry.path is None:
            return True
        places.append(entry.path)
    places += [name for name in (recipe.model.name_or_path, recipe.model.tokenizer) if name and name != "quickstart"]
    for place in map(Path, places):
        if not place.exists():
            return True
        files = [place, *(place.iterdir() if place.is_dir() else ())]
        if any(file.stat().st_mtime > made for file in files):
            return True
    return False
