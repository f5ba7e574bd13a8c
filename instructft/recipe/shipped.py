"""The recipes that come with instructft: where they lie, and what each is for."""

from __future__ import annotations

import os
from pathlib import Path


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


def recipe_purpose(path: str | os.PathLike[str]) -> str:
    """The first comment line of a recipe file, which says what it is for; "" where there is none."""
    with open(path, encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")
