"""Values of the wrong type or beyond their bounds, and the shipped lists of the fields of SFTConfig and LoraConfig."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instructft.recipe import fields
from instructft.recipe.schema import Recipe
from tests.helpers.recipes import DATA, GOOD, MODEL

# text of the recipe, how its one problem begins (place and key path), what else that must hold
BAD = {
    "text for a number": (
        MODEL + "data:\n  datasets: alpaca\n  max_length: long\n",
        'line 4: data.max_length: found "long" (text), expected a whole number above 1 (tokens per row)',
        "",
    ),
    "no is a word": (
        MODEL + "data: {datasets: alpaca, packing: no}\n",
        'line 2: data.packing: found "no" (text), expected true or false',
        "write false",
    ),
    "number in quotes": (
        GOOD + 'train: {learning_rate: "1e-4"}\n',
        "line 3: train.learning_rate:",
        "take the quotes off",
    ),
    "true for a number": (
        GOOD + "adapter: {type: lora, r: true}\n",
        "line 3: adapter.r: found true,",
        "a whole number",
    ),
    "fraction for a whole number": (
        GOOD + "train: {max_steps: 1e3}\n",
        "line 3: train.max_steps: found 1000.0,",
        "whole",
    ),
    "zero rows": (
        MODEL + "data:\n  datasets:\n    name: alpaca\n    rows: 0\n",
        "line 5: data.datasets.0.rows: found 0,",
        "above 0",
    ),
    "dropout of one": (GOOD + "adapter: {type: lora, dropout: 1}\n", "line 3: adapter.dropout: found 1,", "below 1"),
    "not a number": (
        GOOD + "train: {weight_decay: .nan}\n",
        "line 3: train.weight_decay: found nan,",
        "a number from 0",
    ),
    "steps of a half": (
        GOOD + "train: {save_steps: 1.5}\n",
        "line 3: train.save_steps: found 1.5,",
        "share of all steps",
    ),
    "batch of none": (GOOD + "train: {per_device_train_batch_size: 0}\n", "line 3: train.per_device_train", "above 0"),
    "null where none is": (GOOD + "train: {seed: null}\n", "line 3: train.seed: found nothing (null),", "whole number"),
    "section is a list": (GOOD + "hub: [x]\n", "line 3: hub: found a list, expected a mapping", "repo_id"),
    "train is a list": (GOOD + "train: [1]\n", "line 3: train: found a list, expected a mapping", ""),
    "data is a number": (MODEL + "data: 5\n", "line 2: data: found 5, expected a mapping", "datasets"),
    "sample is a number": (GOOD + "samples:\n- Hello\n- 5\n", "line 5: samples.1: found 5, expected text", ""),
    "no data set": (MODEL + "data: {datasets: []}\n", "line 2: data.datasets: empty, expected a name", ""),
    "empty name": ("model: {name_or_path: ''}\n" + DATA, "line 1: model.name_or_path: empty, expected text", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_value_is_said_with_what_was_expected(problems, case):
    text, start, fragment = BAD[case]
    (found,) = problems(text)
    assert found.startswith(start)
    assert fragment in found


def test_every_field_says_what_it_is():
    def declared(model):
        for key in fields.section_keys(model):
            yield f"{model.__name__}.{key}", model.model_fields[key]
            section = fields.section_of(model.model_fields[key].annotation)
            yield from declared(section) if section else ()

    found = dict(declared(Recipe))
    assert len(found) > 40
    assert [name for name, field in found.items() if not field.description] == []


def test_shipped_field_lists_are_those_of_the_installed_libraries():
    script = Path(__file__).parents[2] / "scripts" / "sft_config_fields.py"
    scope: dict = {"__name__": "sft_config_fields", "__file__": str(script)}
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), scope)
    shipped = fields._shipped_fields()
    installed = json.loads(json.dumps(scope["table"]()))
    hint = "run `python scripts/sft_config_fields.py` and look at what changed"
    for section in ("sft_config", "lora_config"):
        assert set(shipped[section]) == set(installed[section]), hint
        for name, row in installed[section].items():
            assert shipped[section][name]["default"] == row["default"], f"{name}: {hint}"
            # sorted: typing caches unions, so that their order depends on what was imported before
            assert sorted(shipped[section][name]["kinds"]) == sorted(row["kinds"]), f"{name}: {hint}"
            assert shipped[section][name].get("choices") == row.get("choices"), f"{name}: {hint}"
