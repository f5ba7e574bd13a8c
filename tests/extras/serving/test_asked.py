"""What a server is asked: rows held out and our own, of every kind that a template takes, the same at every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instructft.extras.serving.asked import choose, held_out
from instructft.inference.reference_model import recipe_of
from instructft.prompt.loss_mask import encoder
from instructft.prompt.templates import TEMPLATES
from tests.helpers.quickstart import tokenizer as bundled


def test_every_kind_that_the_template_takes() -> None:
    made: Any = bundled()
    made.chat_template = TEMPLATES["chatml"].text()
    made.add_special_tokens({"additional_special_tokens": list(TEMPLATES["chatml"].tokens)})
    asked, said = choose(None, encoder(made), 50, 1 << 20)
    kinds = {one.kind for one in asked}
    assert kinds == {"one turn", "system", "many turns", "tools", "thinking"}
    assert len({tuple(one.ids) for one in asked}) == len(asked) == 50
    assert "10 tools" in said
    again, _ = choose(None, encoder(made), 50, 1 << 20)
    assert [one.ids for one in again] == [one.ids for one in asked]


def test_rows_that_were_held_out_and_fit(run: Path, tokenizer: Any) -> None:
    recipe = recipe_of(str(run))
    asked, said = choose(recipe, encoder(tokenizer), 10, 60)
    assert [one.kind for one in asked].count("held out") == 5
    assert "with input or context left out" in said
    assert all(len(one.ids) < 59 for one in asked)
    assert all(one[-1]["role"] == "assistant" for one in held_out(recipe, answered=True))
    assert all(one[-1]["role"] == "user" for one in held_out(recipe))


def test_held_out_rows_that_are_not_here_are_told(
    run: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import instructft

    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text('{"prompt": "Hi", "completion": "Hello"}\n' * 40)
    recipe.write_text((run / "recipe.yaml").read_text().replace("name: quickstart", f"path: {rows}", 1))
    loaded = instructft.load_recipe(recipe)
    rows.unlink()
    asked, said = choose(loaded, encoder(tokenizer), 4, 1 << 20)
    assert len(asked) == 4
    assert "of rows that the run held out none is here" in said
