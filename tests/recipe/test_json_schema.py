"""The JSON schema takes what the loader takes, and refuses what it refuses."""

from __future__ import annotations

import json

import jsonschema

from instructft.recipe.json_schema import json_schema
from instructft.recipe.load import (
    shipped_recipes,
)
from tests.helpers.recipes import FULL, GOOD


def test_json_schema(load):
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)

    def valid(recipe: dict) -> bool:
        return validator.is_valid(recipe)

    good = {"model": {"name_or_path": "gpt2"}, "data": {"datasets": "dolly-15k"}}
    for more in (
        {},
        {"adapter": "lora", "train": {"learning_rate": 1e-4, "report_to": ["wandb"], "save_total_limit": None}},
        {"data": {"datasets": ["alpaca", {"hub": "a/b", "rows": 5}], "template": "x.jinja"}, "samples": ["Hi"]},
        {
            "adapter": {"type": "lora", "rank_pattern": {"q": 2}},
            "train": None,
            "hub": {"push": "end", "repo_id": "a/b"},
            "check": {"max_leaks": 0, "max_cut_share": 0.5},
        },
        {"evaluation": {"rows": 50, "metrics": ["exact_match", "my_metrics.py:score"]}},
        {"evaluation": {"rows": "auto", "metrics": "my_metrics.py:score"}},
    ):
        assert valid(good | more), more
    for more in (
        {"trian": {}},
        {"train": {"learning_rat": 1}},
        {"train": {"max_length": 1}},
        {"train": {"hub_token": "x"}},
        {"train": {"optim": "adamw_torc"}},
        {"train": {"max_steps": "ten"}},
        {"train": {"per_device_train_batch_size": 0}},
        {"data": {"datasets": "doly-15k"}},
        {"data": {"datasets": []}},
        {"data": {"datasets": {"name": "alpaca", "hub": "a/b"}}},
        {"data": {"datasets": "alpaca", "template": "chatlm"}},
        {"data": {"datasets": "alpaca", "max_length": 0}},
        {"adapter": "qlora"},
        {"check": {"max_leak": 0}},
        {"evaluation": {"rows": -1}},
        {"evaluation": {"metrics": ["exact_mach"]}},
        {"check": {"max_cut_share": 2}},
        {"adapter": {"more": {}}},
        {"name": "x"},
        {"train_written": []},
    ):
        assert not valid(good | more), more
    for text in (GOOD, FULL):
        validator.validate(load(text).to_dict())
    for path in shipped_recipes().values():
        from ruamel.yaml import YAML

        validator.validate(YAML(typ="safe", pure=True).load(path))
    properties = schema["properties"]
    assert properties["data"]["properties"]["max_length"]["default"] == 1024
    assert properties["data"]["properties"]["max_length"]["description"].startswith("tokens per row; ")
    assert "cosine" in properties["train"]["properties"]["lr_scheduler_type"]["enum"]
    assert "$ref" not in json.dumps(schema)
