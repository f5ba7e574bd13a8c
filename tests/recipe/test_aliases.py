"""Names of other tools lead to ours."""

from __future__ import annotations

import pytest

from instructft.recipe import aliases, fields
from instructft.recipe.schema import TRAIN_DEFAULTS, Recipe
from tests.helpers.recipes import GOOD

# names of other tools, at the top level and in a section, and what they are called here
NAMES = {
    "micro_batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules (`true` is `all-linear`)",
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "datasets": "data.datasets",
    "dataset": "data.datasets",
    "val_set_size": "data.splits.validation (a share of the rows",
    "val_size": "data.splits.validation",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "train_on_inputs": "data.train_on (`true` is `everything`, `false` is `responses`)",
    "load_in_4bit": "model.quantization (`true` is `4bit`)",
    "load_in_8bit": "model.quantization",
    "quantization_bit": "model.quantization",
    "finetuning_type": "adapter.type (`full` is `none`",
    "chat_template": "data.template",
    "template": "data.template",
    "hub_model_id": "hub.repo_id",
    "flash_attention": "model.attn_implementation (`true` is `flash_attention_2`)",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "deepspeed": "an accelerate file that says zero2|zero3",
    "logging_dir": "TENSORBOARD_LOGGING_DIR",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_tools_lead_to_ours(problems, name):
    found = problems(GOOD + f"{name}: 1\n")
    assert len(found) == 1
    assert found[0].startswith(f"line 3: {name}: ")
    assert NAMES[name] in found[0]


@pytest.mark.parametrize("name", aliases.TRAIN_HOMES)
def test_a_field_of_sftconfig_with_another_home_is_refused(problems, name):
    found = problems(GOOD + f"train:\n  {name}: 1\n")
    assert len(found) == 1
    assert found[0] == f"line 4: train.{name}: has another home; {aliases.TRAIN_HOMES[name]}"


def test_tables_lead_only_to_legal_keys():
    legal = {path for paths in fields.leaves(Recipe).values() for path in paths} | {"train", "adapter"}
    names = {path.rpartition(".")[2] for path in legal}
    assert {target for target, _ in aliases.ALIASES.values() if target} <= legal
    assert not set(aliases.ALIASES) & names  # else the alias would hide the key
    assert set(aliases.TRAIN_BOUNDS) <= set(fields.legal_train_fields())
    assert set(TRAIN_DEFAULTS) <= set(fields.legal_train_fields())
    assert not set(aliases.TRAIN_HOMES) & set(fields.legal_train_fields())
