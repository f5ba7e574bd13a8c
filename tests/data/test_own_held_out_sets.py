"""Validation and test sets of their own: by file, several and named, beside files and beside streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.data.load import conversations
from instructft.data.prepare import prepare, prepare_held_out
from instructft.data.streaming import prepare_stream
from instructft.errors import RecipeError
from instructft.evaluation.compare import rows_of


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"instruction": f"{name} {i * 7919}?", "output": f"{name[::-1]} {i * 104729}."} for i in range(count)]


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """Name -> file of rows."""
    found = {}
    for name, count in (("train", 40), ("one", 6), ("two", 9), ("last", 5)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(name, count)), encoding="utf-8")
        found[name] = str(path)
    return found


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], sets: dict[str, str]) -> Callable[..., Any]:
    def load(*overrides: str, streaming: bool = False) -> Any:
        held = [{"path": sets["one"], "label": "medical"}, {"path": sets["two"], "label": "legal"}]
        text = write_recipe().read_text(encoding="utf-8").replace("  splits: {validation: 0.1, test: 0.1}\n", "")
        entry = {"path": sets["train"], "streaming": streaming}
        values = {"datasets": [entry], "validation": held, "test": [{"path": sets["last"]}]}
        base = [f"data.{key}={json.dumps(value)}" for key, value in values.items()]
        return instructft.load_recipe(write_recipe(text), [*base, *overrides])

    return load


def test_the_sets_are_held_out_whole_and_shares_are_zero(recipe: Any) -> None:
    mine = recipe()
    assert (mine.data.splits.validation, mine.data.splits.test) == (0, 0)
    made = prepare(mine, instructft.load_tokenizer(mine))
    assert made.rows == {"train": 40, "validation": 15, "test": 5}
    assert made.groups == {"medical": 6, "legal": 9}
    asked = [row["messages"][0]["content"] for row in conversations(mine, "test")]
    assert asked == [row["instruction"] for row in rows("last", 5)]
    assert rows_of(mine, None, None, None)[1].startswith("the test split")
    again = instructft.load_recipe(_saved(mine))
    assert again.data == mine.data


def _saved(recipe: Any) -> Path:
    path = Path(recipe.source).with_name("saved.yaml")
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path


def test_a_share_beside_a_set_is_refused_and_one_split_may_keep_its_share(recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"data\.validation: has data sets of its own and a share of the rows"):
        recipe("data.splits.validation=0.1")
    mine = recipe("data.test=null", "data.splits.test=0.25")
    assert prepare(mine, instructft.load_tokenizer(mine)).rows == {"train": 30, "validation": 15, "test": 10}
    with pytest.raises(RecipeError, match=r"data\.validation\.0\.streaming: held-out rows are read whole"):
        recipe("data.validation.0.streaming=true")


def test_a_stream_has_held_out_rows_and_leaves_copies_of_them_out(recipe: Any, sets: dict[str, str]) -> None:
    with Path(sets["train"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(rows("one", 6)[3]) + "\n")
    mine = recipe(streaming=True)
    tokenizer = instructft.load_tokenizer(mine)
    made = prepare_stream(mine, tokenizer, prepare_held_out(mine, tokenizer))
    assert len(list(made.splits["train"])) == 40
    assert made.dropped == {"near_duplicate_of_held_out": 1}
    assert made.rows == {"train": 40, "validation": 15, "test": 5}
    assert len(instructft.prepare_dataset(mine, tokenizer)["validation"]) == 15
    assert len(conversations(mine, "validation")) == 15
    assert made.fingerprint != prepare_stream(mine, tokenizer).fingerprint


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", ["false", "true"])
def test_each_named_set_has_its_loss_in_a_run(recipe: Any, tmp_path: Path, streaming: bool, packing: str) -> None:
    mine = recipe(
        f"data.packing={packing}", "train.load_best_model_at_end=true", "train.save_steps=2", streaming=streaming
    )
    instructft.train(mine, console=Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert evaluated
    for line in evaluated:
        parts = (line["eval_medical_loss"], line["eval_legal_loss"])
        assert min(parts) <= line["eval_loss"] <= max(parts)
