"""Where recipes are found, and the recipe of an old run."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from instructft.errors import RecipeError
from instructft.recipe.load import load_recipe, load_run_recipe
from instructft.recipe.shipped import recipe_purpose, shipped_recipes
from tests.helpers.recipes import FULL, GOOD, MODEL


def test_files_are_found_from_here_and_beside_the_recipe(write, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}")
    (folder / "mine.jinja").write_text("")
    (folder / "r.yaml").write_text(MODEL + "data: {datasets: {path: rows.jsonl}, template: mine.jinja}\n")
    write("", "nothing.yaml")  # the current directory is tmp_path
    recipe = load_recipe("elsewhere/r.yaml")
    assert Path(recipe.data.datasets[0].path) == Path("elsewhere/rows.jsonl")
    assert Path(recipe.data.template) == Path("elsewhere/mine.jinja")
    (tmp_path / "rows.jsonl").write_text("{}")
    assert load_recipe("elsewhere/r.yaml").data.datasets[0].path == "rows.jsonl"


def test_a_recipe_that_is_not_there(write, tmp_path):
    write("")
    for source, fragment in {
        "quikstart": '"quickstart"?',
        "quickstart.yaml": '"quickstart"?',
        "zzz/zzz.yaml": "shipped recipes: ",
        str(tmp_path): "found a folder",
        "/dev/null": "found a device",
    }.items():
        with pytest.raises(RecipeError, match="1 problem") as caught:
            load_recipe(source)
        assert fragment in caught.value.problems[0]


def test_recipe_of_an_old_run(load, write):
    text = (
        load(FULL).to_yaml().replace("train:\n", "train:\n  gone_since: 1\n").replace("optim: adamw_", "optim: gone_")
    )
    text = text.replace("adapter:\n", "adapter:\n  gone_too: 1\n").replace("name: alpaca", "path: gone.jsonl")
    Path("runs/old").mkdir(parents=True)
    write(text, "runs/old/recipe.yaml")
    recipe = load_run_recipe("runs/old")
    assert recipe.name == "old"
    assert recipe.output_dir == "runs/mine"
    assert recipe.data.datasets[0].path == "gone.jsonl"
    assert "gone_since" not in recipe.train
    assert "optim" not in recipe.train
    assert recipe.adapter.more["rank_pattern"] == {"q": 4}
    with pytest.raises(RecipeError, match=r"there is no recipe\.yaml"):
        load_run_recipe("runs")
    write(text.replace("max_length: 1024", "max_length: x"), "runs/old/recipe.yaml")
    with pytest.raises(RecipeError, match=r"data\.max_length"):
        load_run_recipe("runs/old")


def test_shipped_recipes_load_and_say_their_purpose():
    recipes = shipped_recipes()
    assert "quickstart" in recipes
    for name, path in recipes.items():
        assert path.stem == name
        assert len(recipe_purpose(path)) > 10, path
        recipe = load_recipe(name)
        assert (recipe.name, recipe.source) == (name, str(path))


def test_no_torch_is_imported(write):
    write(GOOD)
    write(GOOD + "trian: 1\n", "bad.yaml")
    code = """
        import sys
        from instructft.recipe.load import load_recipe
        from instructft.recipe.shipped import shipped_recipes
        from instructft.recipe.json_schema import json_schema
        from instructft.errors import RecipeError
        load_recipe("mine.yaml", ["train.max_steps=1"]).to_yaml()
        try:
            load_recipe("bad.yaml")
        except RecipeError as error:
            print(error)
        json_schema(), shipped_recipes()
        heavy = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "numpy"} & set(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else 0)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'line 3: trian: unknown key; did you mean "train"?' in done.stdout
