"""From a YAML file, or the name of a shipped recipe, to a frozen `Recipe`; all its problems come out at once.

Relative paths: `data.datasets.N.path`, a `.jinja` template, and a model or tokenizer that begins with `.`, `~` or `/`
are looked up from the current directory, and if nothing is there, beside the recipe file. `output_dir` is relative to
the current directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instructft.errors import RecipeError, UsageError
from instructft.formatting import nearest
from instructft.recipe import conflicts, validate
from instructft.recipe.schema import Recipe, freeze, train_defaults
from instructft.recipe.yaml_reader import Document, apply_override, read_document


def load_recipe(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the path of a YAML file or the bare name of a shipped recipe, then `KEY=VALUE` overrides.

    >>> recipe = load_recipe("quickstart", overrides=["train.learning_rate=1e-4", "data.packing=true"])
    >>> recipe.train["learning_rate"], recipe.data.packing
    (0.0001, True)

    Raises:
        RecipeError: with every problem of the recipe, each with its line, key, what was found and what was expected.
    """
    path, name = _find(source)
    document = read_document(path)
    if document.values is None:
        raise RecipeError(os.fspath(source), document.lines())
    spell_out(document)
    for override in overrides:
        apply_override(document, override)
        spell_out(document)
    return _build(document, name, path, shown=os.fspath(source), strict=True)


def load_run_recipe(folder: str | os.PathLike[str]) -> Recipe:
    """Read the `recipe.yaml` of a run folder, for the commands that take the folder alone.

    Fields of `train:` and `adapter:` that this version no longer knows are dropped, and data files need not be there
    any more: an old run stays usable after an upgrade and on another machine.

        load_run_recipe("runs/quickstart").data.template  # 'instruction'
    """
    path = Path(folder) / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(str(path), [f"there is no recipe.yaml in {folder}; expected a run folder of instructft"])
    document = read_document(path)
    if document.values is None:
        raise RecipeError(str(path), document.lines())
    spell_out(document)
    return _build(document, Path(folder).resolve().name, path, shown=str(path), strict=False)


def spell_out(document: Document) -> None:
    """Write the short forms of a recipe out, in place: `datasets: NAME`, `adapter: lora`, an empty section."""
    values: dict[str, Any] = document.values
    for section in ("model", "data", "adapter", "train", "hub", "check"):
        if values.get(section) is None:
            values[section] = {}
    if values.get("samples") is None:
        values.pop("samples", None)
    if isinstance(values["adapter"], str):
        values["adapter"] = {"type": values["adapter"]}
    data = values["data"]
    if isinstance(data, dict):
        if isinstance(data.get("datasets"), str | dict):
            data["datasets"] = [data["datasets"]]
            document.move(("data", "datasets"), ("data", "datasets", 0))
        if isinstance(data.get("datasets"), list):
            data["datasets"] = [{"name": entry} if isinstance(entry, str) else entry for entry in data["datasets"]]
        if data.get("splits", "") is None:
            del data["splits"]
        for split in ("validation", "test"):
            if isinstance(data.get(split), str | dict):
                data[split] = [data[split]]
                document.move(("data", split), ("data", split, 0))
            if isinstance(data.get(split), list):
                data[split] = [{"name": entry} if isinstance(entry, str) else entry for entry in data[split]]
                shares = data.setdefault("splits", {})  # a set of its own stands in place of a share
                if isinstance(shares, dict):
                    shares.setdefault(split, 0.0)


def _build(document: Document, name: str, path: Path, *, shown: str, strict: bool) -> Recipe:
    document.values.setdefault("output_dir", f"runs/{name}")
    recipe = validate.check(document, path.parent, strict=strict)
    defaults = train_defaults(recipe.train, validation=recipe.data.holds_out("validation"))
    about = {"name": name, "source": str(path), "train_written": frozenset(recipe.train)}
    recipe = recipe.model_copy(update={**about, "train": freeze({**defaults, **recipe.train})})
    if strict:
        conflicts.find(document, recipe)
    if document.problems:
        raise RecipeError(shown, document.lines())
    return recipe


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of each recipe that comes with instructft.

    >>> shipped_recipes()["quickstart"].name
    'quickstart.yaml'
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):  # an installed wheel, a checkout
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {}


def write_shipped(name: str, target: Path) -> None:
    """Write a shipped recipe to a file, which must not be there; its folder is made."""
    found = shipped_recipes()
    if name not in found:
        raise UsageError(f"there is no shipped recipe {name}; there is {', '.join(sorted(found))}")
    if target.exists():
        raise UsageError(f"{target} exists already; name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(found[name].read_text(encoding="utf-8"), encoding="utf-8")


def recipe_purpose(path: str | os.PathLike[str]) -> str:
    """The first comment line of a recipe file, which says what it is for; "" where there is none."""
    with open(path, encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")


def _find(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """The file of a recipe, and the recipe's name."""
    text = os.fspath(source)
    shipped = shipped_recipes()
    path = Path(text).expanduser()
    if text in shipped and isinstance(source, str):
        return shipped[text], text
    if path.is_file():
        return path, path.stem
    if path.is_dir():
        inside = f"; did you mean {path / 'recipe.yaml'}?" if (path / "recipe.yaml").is_file() else ""
        raise RecipeError(text, [f"found a folder, expected a YAML file or the name of a shipped recipe{inside}"])
    if path.exists():
        raise RecipeError(text, ["found a device or a pipe, expected a YAML file"])
    near = nearest(path.stem, shipped)
    names = ", ".join(shipped) or "none"
    raise RecipeError(text, [f"there is no such file{near}; shipped recipes: {names}"])
