"""The recipes that come with instructft: where they lie, and what each is for."""

from __future__ import annotations

import os
from pathlib import Path

from instructft.errors import UsageError


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
    """Write a shipped recipe to a file, which must not be there; its folder is made.

    Raises:
        UsageError: there is no such recipe, or the file cannot be written.
    """
    found = shipped_recipes()
    if name not in found:
        raise UsageError(f"there is no shipped recipe {name}; there is {', '.join(sorted(found))}")
    if target.exists():
        raise UsageError(f"{target} exists already; name another file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{target}: its folder cannot be made ({error.strerror}); name another file") from error
    target.write_text(found[name].read_text(encoding="utf-8"), encoding="utf-8")


def recipe_purpose(path: str | os.PathLike[str]) -> str:
    """The first comment line of a recipe file, which says what it is for; "" where there is none."""
    with open(path, encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")
