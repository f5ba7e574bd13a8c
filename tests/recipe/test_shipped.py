"""The shipped recipes are found, and each says what it is for."""

from __future__ import annotations

from pathlib import Path

from instructft.recipe.shipped import recipe_purpose, shipped_recipes


def test_they_are_those_of_the_folder() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    assert set(shipped_recipes()) == {path.stem for path in folder.glob("*.yaml")} != set()
    assert all(recipe_purpose(path) for path in shipped_recipes().values())


def test_a_recipe_without_a_word_has_no_purpose(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {}\n", encoding="utf-8")
    assert recipe_purpose(tmp_path / "a.yaml") == ""
