"""A recipe: what loads, what it becomes, and that every mistake is said with line, key and the nearest right name."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jsonschema
import pytest

from instructft.errors import RecipeError
from instructft.recipe import aliases, fields
from instructft.recipe.json_schema import json_schema
from instructft.recipe.load import (
    check_against_installed,
    load_recipe,
    load_run_recipe,
    recipe_purpose,
    shipped_recipes,
)
from instructft.recipe.schema import TRAIN_DEFAULTS, Recipe

MODEL = "model: {name_or_path: gpt2}\n"
DATA = "data: {datasets: dolly-15k}\n"
GOOD = MODEL + DATA  # a case that adds to it begins on line 3


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe into an empty current directory; its path comes back."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "mine.yaml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


@pytest.fixture
def load(write):
    return lambda text=GOOD, *overrides: load_recipe(write(text), overrides)


@pytest.fixture
def problems(load):
    """The problem lines of a recipe that must not load."""

    def problems(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        assert str(caught.value).startswith("mine.yaml: ")
        return caught.value.problems

    return problems


# --------------------------------------------------------------------------------------------------------------------
# Bad recipes: text, how the one problem line begins (place and key path), what else it must hold
# --------------------------------------------------------------------------------------------------------------------

BAD = {
    # unknown values
    "dataset name": (
        MODEL + "data:\n  datasets: doly-15k\n",
        'line 3: data.datasets: "doly-15k" is unknown',
        '"dolly-15k"?',
    ),
    "dataset in a list": (
        MODEL + "data:\n  datasets:\n  - alpaca\n  - {name: slimorca}\n",
        'line 5: data.datasets.1.name: "slimorca" is unknown',
        'did you mean "slim-orca"?',
    ),
    "file as a name": (MODEL + "data: {datasets: a/b.jsonl}\n", "line 2: data.datasets:", "{path: a/b.jsonl}"),
    "hub id as a name": (MODEL + "data: {datasets: org/set}\n", "line 2: data.datasets:", "{hub: org/set}"),
    "format": (
        MODEL + "data:\n  datasets:\n    hub: a/b\n    format: share_gpt\n",
        "line 5: data.datasets.0.format:",
        '"sharegpt"?',
    ),
    "template": (MODEL + "data:\n  datasets: alpaca\n  template: chatlm\n", "line 4: data.template:", '"chatml"?'),
    "attention": (
        "model:\n  name_or_path: a\n  attn_implementation: sdp\n" + DATA,
        "line 3: model.attn_impl",
        '"sdpa"?',
    ),
    "dtype of other tools": (
        "model:\n  name_or_path: a\n  dtype: bf16\n" + DATA,
        'line 3: model.dtype: found "bf16" (text), expected one of auto, float32, bfloat16, float16',
        "write bfloat16",
    ),
    "train_on": (MODEL + "data: {datasets: alpaca, train_on: response}\n", "line 2: data.train_on:", '"responses"?'),
    "optimizer": (GOOD + "train:\n  optim: adamw_torch_fusd\n", "line 4: train.optim:", '"adamw_torch_fused"?'),
    "scheduler": (GOOD + "train:\n  lr_scheduler_type: cosin\n", "line 4: train.lr_scheduler_type:", '"cosine"?'),
    "report_to in a list": (GOOD + "train: {report_to: [wandbb]}\n", "line 3: train.report_to:", '"wandb"?'),
    "qlora": (GOOD + "adapter: qlora\n", "line 3: adapter:", "adapter.type: lora and model.quantization: 4bit"),
    # wrong types and bounds
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
    # missing
    "no data": (MODEL, "data.datasets: missing; expected a name", ""),
    "no model": (DATA, "model.name_or_path: missing;", "model.config"),
    "no tokenizer": ("model:\n  config: {model_type: gpt2}\n" + DATA, "line 1: model.tokenizer: missing;", "random"),
    "no model type": (
        "model:\n  tokenizer: gpt2\n  config: {n_layer: 2}\n" + DATA,
        "line 3: model.config: has no model_type",
        "gpt2",
    ),
    "no repo": (GOOD + "hub: {push: end}\n", "line 3: hub.push: end needs hub.repo_id", ""),
    "no source": (
        MODEL + "data: {datasets: [{rows: 5}]}\n",
        "line 2: data.datasets.0: found none of them,",
        "exactly one",
    ),
    # files, folders, addresses
    "no data file": (
        MODEL + "data: {datasets: {path: a.jsonl}}\n",
        'line 2: data.datasets.0.path: there is no "a.jsonl"',
        "",
    ),
    "folder as a file": (MODEL + "data: {datasets: [{path: .}]}\n", "line 2: data.datasets.0.path:", "is a folder"),
    "ending": (MODEL + "data: {datasets: [{path: mine.yaml}]}\n", "line 2: data.datasets.0.path:", ".parquet"),
    "no template file": (
        MODEL + "data: {datasets: alpaca, template: a.jinja}\n",
        "line 2: data.template: there is no",
        "",
    ),
    "no model folder": (
        "model: {name_or_path: ./nope}\n" + DATA,
        'line 1: model.name_or_path: there is no "./nope"',
        "",
    ),
    "up and out": (
        GOOD + "hub: {repo_id: a/b, path_in_repo: a/../../b}\n",
        "line 3: hub.path_in_repo:",
        "inside the repo",
    ),
    "absolute": ("model: {name_or_path: a, subfolder: /etc}\n" + DATA, "line 1: model.subfolder:", "inside the repo"),
    "repo id": (GOOD + "hub: {repo_id: a/b/c}\n", "line 3: hub.repo_id:", "org/name"),
    "address": (MODEL + "data: {datasets: [{url: 'ftp://a/b'}]}\n", "line 2: data.datasets.0.url:", "http(s)"),
    # unknown keys
    "section": (GOOD + "trian:\n  seed: 1\n", "line 3: trian: unknown key", 'did you mean "train"?'),
    "key of train": (
        GOOD + "train: {learning_rat: 1}\n",
        "line 3: train.learning_rat: unknown key",
        '"train.learning_rate"?',
    ),
    "key of a data set": (
        MODEL + "data:\n  datasets:\n  - {name: alpaca, wieght: 2}\n",
        "line 4: data.datasets.0.wieght: unknown key",
        '"data.datasets.0.weight"?',
    ),
    "key of splits": (
        MODEL + "data: {datasets: alpaca, splits: {valid: 0.1}}\n",
        "line 2: data.splits.valid: unknown key",
        '"data.splits.validation"?',
    ),
    "key of peft": (GOOD + "adapter: {type: lora, rank_patern: {}}\n", "line 3: adapter.rank_patern:", "rank_pattern"),
    "nothing near": (GOOD + "zzz: 1\n", "line 3: zzz: unknown key", "expected one of model, data,"),
    "field gone from SFTConfig": (
        GOOD + "train: {warmup_ratio: 0.1}\n",
        "line 3: train.warmup_ratio:",
        "warmup_steps: 0.03",
    ),
    "wrong section": (GOOD + "learning_rate: 1\n", "line 3: learning_rate:", "write it as train.learning_rate"),
    "wrong section, two homes": (GOOD + "seed: 1\n", "line 3: seed:", "data.seed or train.seed"),
    "dotted key in a file": (GOOD + "train.seed: 1\n", "line 3: train.seed:", "train: {seed: …}"),
    "lora_alpha": (GOOD + "adapter: {type: lora, lora_alpha: 8}\n", "line 3: adapter.lora_alpha:", "use adapter.alpha"),
    # contradictions
    "two models": (
        "model:\n  name_or_path: a\n  config: {model_type: gpt2}\n  tokenizer: gpt2\n" + DATA,
        "line 3: model.config: found name_or_path and config",
        "keep one",
    ),
    "quantized, no adapter": (
        "model: {name_or_path: a, quantization: 4bit}\n" + DATA,
        "line 1: model.quantization:",
        "lora",
    ),
    "adapter, random weights": (
        "model:\n  config: {model_type: gpt2}\n  tokenizer: gpt2\nadapter: lora\n" + DATA,
        "line 4: adapter.type:",
        "random weights (model.config)",
    ),
    "rank, no adapter": (GOOD + "adapter: {r: 4}\n", "line 3: adapter.r:", "write adapter.type: lora"),
    "two sources": (
        MODEL + "data: {datasets: [{name: alpaca, hub: a/b}]}\n",
        "line 2: data.datasets.0:",
        "name and hub",
    ),
    "splits": (
        MODEL + "data: {datasets: alpaca, splits: {validation: 0.5, test: 0.5}}\n",
        "line 2: data.splits:",
        "below 1",
    ),
    "accumulation": (
        GOOD + "train:\n  tokens_per_step: 9999\n  gradient_accumulation_steps: 2\n",
        "line 5: train.gradient_accumulation_steps: contradicts train.tokens_per_step",
        "keep one",
    ),
    "precision": (GOOD + "train: {bf16: true, fp16: true}\n", "line 3: train.bf16: contradicts train.fp16", "keep one"),
    "nothing to evaluate": (
        MODEL + "data: {datasets: alpaca, splits: {validation: 0}}\ntrain: {eval_strategy: epoch}\n",
        "line 3: train.eval_strategy: epoch, but there is nothing to evaluate on",
        "data.splits.validation",
    ),
    "best without evaluation": (
        GOOD + "train: {load_best_model_at_end: true, eval_strategy: 'no'}\n",
        "line 3: train.load_best_model_at_end:",
        "eval_strategy no",
    ),
    "best between evaluations": (
        GOOD + "train: {load_best_model_at_end: true, save_steps: 100, eval_steps: 30}\n",
        "line 3: train.load_best_model_at_end:",
        "found 100 and 30",
    ),
    "two names of one thing": (
        GOOD + "train: {activation_checkpointing: true, gradient_checkpointing: false}\n",
        "line 3: train.gradient_checkpointing: contradicts train.activation_checkpointing",
        "",
    ),
    "prefetch": (GOOD + "train: {dataloader_prefetch_factor: 2}\n", "line 3: train.dataloader_prefetch", "num_workers"),
    # the text itself
    "empty": ("", "the file is empty", "`model` and `data`"),
    "only a comment": ("# nothing\n", "the file is empty", ""),
    "a list": ("- a\n", "line 1: found a list", "`model:`"),
    "a tab": ("model:\n\tname_or_path: a\n", "line 2, column 1: not valid YAML", "spaces, not with tabs"),
    "a colon": (GOOD + "output_dir: a: b\n", "line 3, column 14: not valid YAML", "needs quotes"),
    "never closed": (GOOD + "samples: [a\n", "line 4, column 1: not valid YAML", ""),
    "two documents": (GOOD + "---\na: 1\n", "line 3, column 1: not valid YAML", "another document"),
    "not UTF-8": (GOOD.encode() + b"output_dir: \xff\n", "the file is not UTF-8 text", "UTF-8"),
    "python tag": (
        GOOD + "output_dir: !!python/object/apply:os.getcwd []\n",
        "line 3: output_dir: the YAML tag",
        "refused",
    ),
    "own tag": (GOOD + "output_dir: !env HOME\n", "line 3: output_dir: the YAML tag `!env` is refused", ""),
    "alias of itself": (GOOD + "samples: &a [*a]\n", "line 3: samples.0: the alias *a contains itself", ""),
    "unknown alias": (GOOD + "samples: *a\n", "line 3, column 10: not valid YAML: found undefined alias 'a'", ""),
    "old YAML": ("%YAML 1.1\n---\n" + GOOD, "line 1: `%YAML 1.1`", "1.2"),
    "given twice": (GOOD + "train:\n  seed: 1\n  seed: 2\n", "line 5: train.seed: given twice (line 4 and line 5)", ""),
    "key of keys": (GOOD + "? [a]\n: 1\n", "line 3: found a key that is not a word", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe_has_one_clear_message(problems, case):
    text, start, fragment = BAD[case]
    found = problems(text)
    assert len(found) == 1, found
    assert found[0].startswith(start)
    assert fragment in found[0]


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


def test_all_problems_come_out_at_once_in_the_order_of_the_file(problems):
    text = textwrap.dedent("""\
        model:
          name_or_path: gpt2
          quantization: 4bit
        data:
          datasets: doly-15k
          max_length: long
          max_length: 12
        train:
          micro_batch_size: 4
          bf16: true
          fp16: true
          max_length: 512
        hub: {push: end}
        oops: !!python/none x
        """)
    found = problems(text, "train.max_steps=ten", "data.seed=-1")
    assert [line.split(": ")[:2] for line in found] == [
        ["line 3", "model.quantization"],
        ["line 5", "data.datasets"],
        ["line 6", "data.max_length"],
        ["line 7", "data.max_length"],
        ["line 9", "train.micro_batch_size"],
        ["line 10", "train.bf16"],
        ["line 12", "train.max_length"],
        ["line 13", "hub.push"],
        ["line 14", "oops"],
        ["line 14", "oops"],
        ['override "train.max_steps=ten"', "train.max_steps"],
        ['override "data.seed=-1"', "data.seed"],
    ]


def test_a_wrong_key_that_stands_for_a_required_one_is_said_once(problems):
    found = problems("base_model: gpt2\ndatasets: dolly-15k\n")
    assert [line.split(": ")[1] for line in found] == ["base_model", "datasets"]


# --------------------------------------------------------------------------------------------------------------------
# Secrets
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("train: {hub_token: S3CRET}\n", ""),
        ("train: {push_to_hub_token: S3CRET}\n", ""),
        ("hub: {repo_id: a/b, token: S3CRET}\n", ""),
        ("hf_token: S3CRET\n", ""),
        ("wandb_api_key: S3CRET\n", ""),
        ("", "hub.token=S3CRET"),
        ("", "model.token=S3CRET"),
        ("", "hub={repo_id: a/b, token: S3CRET}"),
        ("", "hub.token=[S3CRET"),
        ("", "hub_token S3CRET"),
        ("train: {run_name: [hf_S3CRETS3CRET]}\n", ""),
        ("samples: hf_S3CRETS3CRET\n", ""),
        ("", "train.max_steps=hf_S3CRETS3CRET"),
        ("nonsense: {token: S3CRET}\n", ""),
        ("samples: [{token: S3CRET}]\n", ""),
    ],
)
def test_a_token_is_refused_and_never_echoed(problems, text, override):
    found = problems(GOOD + text, *[override] * bool(override))
    assert "S3CRET" not in "\n".join(found)
    assert any("HF_TOKEN" in line for line in found) or "hf_" in text + override or "[" in override or " " in override


def test_a_password_in_an_address_is_refused_and_not_shown(problems):
    found = problems(MODEL + "data: {datasets: [{url: 'https://me:S3CRET@host/a.json'}]}\n")
    assert found[0].startswith("line 2: data.datasets.0.url: holds a password")
    assert "S3CRET" not in found[0]


# --------------------------------------------------------------------------------------------------------------------
# What loads
# --------------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_contract(load):
    recipe = load()
    plain = recipe.to_dict()
    plain["data"]["datasets"] = "…"
    plain["train"] = "…"
    assert plain == {
        "model": {
            "name_or_path": "gpt2",
            "tokenizer": None,
            "revision": None,
            "subfolder": None,
            "dtype": "auto",
            "attn_implementation": "auto",
            "quantization": "none",
        },
        "data": {
            "datasets": "…",
            "template": "auto",
            "system_prompt": None,
            "train_on": "responses",
            "max_length": 1024,
            "on_too_long": "truncate",
            "packing": False,
            "splits": {"validation": 0.05, "test": 0.0},
            "seed": 42,
        },
        "adapter": {
            "type": "none",
            "r": 16,
            "alpha": 32,
            "dropout": 0.05,
            "target_modules": "all-linear",
            "use_dora": False,
            "use_rslora": False,
        },
        "train": "…",
        "samples": [],
        "hub": {"repo_id": None, "private": True, "path_in_repo": None, "push": "never"},
        "check": {
            "max_dropped_share": None,
            "max_cut_share": None,
            "max_duplicate_share": None,
            "max_contradictions": None,
            "max_leaks": None,
            "max_markers": None,
            "max_memory_gib": None,
        },
        "output_dir": "runs/mine",
    }
    assert (recipe.name, recipe.source, recipe.train_written) == ("mine", "mine.yaml", frozenset())


def test_train_defaults(load):
    train = load().train
    assert train["seed"] == 42
    assert train["report_to"] == ("tensorboard",)
    assert train["logging_nan_inf_filter"] is False
    assert train["gradient_checkpointing"] is False
    assert (train["eval_strategy"], train["eval_steps"]) == ("steps", 0.1)
    assert (train["save_strategy"], train["save_steps"]) == ("steps", 0.25)
    assert load(GOOD, "data.splits.validation=0").train["eval_strategy"] == "no"
    assert load(GOOD, "train.per_device_train_batch_size=2").train["per_device_eval_batch_size"] == 2
    assert load(GOOD, "train.load_best_model_at_end=true").train["eval_steps"] == 0.25
    assert load(GOOD, "train.activation_checkpointing=true").train["gradient_checkpointing"] is True
    assert load(GOOD, "train.eval_steps=5").train_written == {"eval_steps"}


def test_sft_kwargs_are_plain_and_hold_no_key_of_ours(load):
    kwargs = load(
        GOOD + "train: {tokens_per_step: 4096, lr_scheduler_kwargs: {a: [1]}, optim_args: 'a=1'}\n"
    ).sft_kwargs()
    assert "tokens_per_step" not in kwargs
    assert type(kwargs["report_to"]) is list
    assert type(kwargs["lr_scheduler_kwargs"]) is dict
    assert kwargs["lr_scheduler_kwargs"] == {"a": [1]}


@pytest.mark.parametrize(
    "written",
    ["dolly-15k", "{name: dolly-15k}", "[dolly-15k]", "[{name: dolly-15k}]", "&a {name: dolly-15k}"],
)
def test_datasets_in_every_spelling(load, written):
    (entry,) = load(MODEL + f"data: {{datasets: {written}}}\n").data.datasets
    assert (entry.name, entry.weight, entry.rows, entry.streaming) == ("dolly-15k", 1.0, None, False)


def test_adapter_takes_fields_of_loraconfig_by_their_own_names(load):
    recipe = load(GOOD + "adapter: {type: lora, alpha: 8, modules_to_save: [lm_head], rank_pattern: {q: 4}}\n")
    kwargs = recipe.adapter.peft_kwargs()
    assert kwargs["lora_alpha"] == 8
    assert kwargs["modules_to_save"] == ["lm_head"]
    assert kwargs["rank_pattern"] == {"q": 4}
    assert load(GOOD + "adapter: lora\n").adapter.type == "lora"
    assert load(GOOD + "adapter: {type: none, r: 4}\n").adapter.r == 4  # switched off, not forgotten


def test_yaml_is_1_2(load):
    recipe = load(
        GOOD
        + "train:\n  learning_rate: 1e-5\n  run_name: no\n  warmup_steps: 010\n  adam_epsilon: 1E-8\n"
        + "samples: [yes, 2024-01-31, off, 'null', \"tab\\t\"]\n"
    )
    assert recipe.train["learning_rate"] == 1e-5
    assert recipe.train["run_name"] == "no"
    assert recipe.train["warmup_steps"] == 10
    assert recipe.samples == ("yes", "2024-01-31", "off", "null", "tab\t")


def test_anchors_and_merges(load):
    text = GOOD + "train:\n  lr_scheduler_kwargs: &a {x: 1, y: 2}\n  accelerator_config: {<<: *a, y: 3}\n"
    assert load(text).train["accelerator_config"] == {"x": 1, "y": 3}


def test_empty_sections_mean_their_defaults(load):
    assert load(GOOD + "adapter:\ntrain:\nhub:\nsamples:\n") == load()


def test_overrides(load):
    recipe = load(
        GOOD,
        "train.learning_rate=1e-4",
        "data.packing=true",
        "data.datasets=[{name: dolly-15k}, alpaca]",
        "data.datasets.1.rows=100",
        "hub.repo_id=a/b",
        "adapter=lora",
        "adapter.r=4",
        "train.run_name=a=b",
        "train.report_to=none",
        "samples=[Hello]",
        "data.system_prompt=",
        "train.max_steps=5",
        "train.max_steps=6",
    )
    assert recipe.train["learning_rate"] == 1e-4
    assert recipe.data.packing is True
    assert [entry.name for entry in recipe.data.datasets] == ["dolly-15k", "alpaca"]
    assert recipe.data.datasets[1].rows == 100
    assert (recipe.adapter.type, recipe.adapter.r) == ("lora", 4)
    assert recipe.train["run_name"] == "a=b"
    assert recipe.samples == ("Hello",)
    assert recipe.data.system_prompt is None
    assert recipe.train["max_steps"] == 6
    assert load(GOOD, "data.datasets.0.rows=7").data.datasets[0].rows == 7  # into a bare name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", 'override "train.max_steps": expected KEY=VALUE'),
        ("=5", 'override "": expected KEY=VALUE'),
        ("data.packing=no", 'override "data.packing=no": data.packing: found "no" (text), expected true or false'),
        ("data.datasets.3.rows=1", 'override "data.datasets.3.rows=1": data.datasets: has 1 entries'),
        (
            "data.datasets.rows=1",
            'override "data.datasets.rows=1": data.datasets: is a list; write data.datasets.0.rows',
        ),
        ("output_dir.x=1", 'override "output_dir.x=1": output_dir: is a single value'),
        ("train.seed=[", 'override "train.seed=…": not valid YAML'),
        ("trian.seed=1", 'override "trian.seed=1": trian: unknown key; did you mean "train"?'),
        ("lr=1", 'override "lr=1": lr: unknown key; here it is called train.learning_rate'),
        ("train={seed: x}", 'override "train={seed: x}": train.seed: found "x" (text)'),
        ("train.seed=!!python/none", 'override "train.seed=…": train.seed: the YAML tag'),
    ],
)
def test_bad_overrides(problems, override, message):
    assert problems(GOOD + "output_dir: x\n", override)[0].startswith(message)


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


def test_a_yaml_bomb_is_refused_at_once(problems):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    started = time.perf_counter()
    assert "once its aliases" in problems(bomb)[0]
    assert "nested too deeply" in problems("a: " + "[" * 50_000)[0]
    assert "a recipe has a few thousand" in problems("#" * 300_000)[0]
    assert time.perf_counter() - started < 2


# --------------------------------------------------------------------------------------------------------------------
# Frozen, copied, written out and read back
# --------------------------------------------------------------------------------------------------------------------

FULL = (
    GOOD.replace(
        "dolly-15k", "[{name: alpaca, columns: {output: answer}}, {hub: a/b, split: 'train[:10%]', weight: 2}]"
    )
    + "adapter: {type: lora, target_modules: [q, v], rank_pattern: {q: 4}, init_lora_weights: pissa}\n"
    + "train: {report_to: [wandb, mlflow], lr_scheduler_kwargs: {a: {b: [1]}}, run_name: '1e-5', optim_args: 'a: b'}\n"
    + 'samples: ["no", "1e-5", "Grüße 👋", "two\\nlines", "  spaces ", "null", "~", "- a", "#", "1:30", "0x10"]\n'
    + "hub: {repo_id: a/b, push: end, path_in_repo: instruct/}\n"
)


def test_a_recipe_cannot_be_changed(load):
    recipe = load(FULL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.output_dir = "x"
    with pytest.raises(ValueError, match="frozen"):
        recipe.data.splits.test = 0.5
    with pytest.raises(ValueError, match="frozen"):
        recipe.data.datasets[0].rows = 1
    for mapping in (recipe.train, recipe.train["lr_scheduler_kwargs"]["a"], recipe.adapter.more):
        for change in (
            lambda mapping: mapping.update(x=1),
            lambda mapping: mapping.pop("x", None),
            lambda mapping: mapping.setdefault("x", 1),
            lambda mapping: mapping.clear(),
            lambda mapping: mapping.__setitem__("x", 1),
            lambda mapping: mapping.__delitem__("x"),
            lambda mapping: mapping.__ior__({"x": 1}),
        ):
            with pytest.raises(TypeError, match="read-only"):
                change(mapping)
    assert type(recipe.train["lr_scheduler_kwargs"]["a"]["b"]) is tuple
    with pytest.raises(TypeError, match="read-only"):
        recipe.data.datasets[0].columns["x"] = "y"


def test_a_recipe_pickles_copies_and_hashes(load):
    recipe = load(FULL)
    for other in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe), copy.copy(recipe)):
        assert other == recipe
        assert hash(other) == hash(recipe)
        assert (other.name, other.train_written) == (recipe.name, recipe.train_written)
        with pytest.raises(TypeError):
            other.train["seed"] = 1
    assert recipe != load(FULL, "train.seed=1")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        FULL,
        MODEL + "data: {datasets: alpaca, splits: {validation: 0}}\ntrain: {tokens_per_step: 4096}\n",
        "model: {config: {model_type: gpt2, n_layer: 2, x: [1, {y: null}], z: .inf}, tokenizer: gpt2}\n" + DATA,
        GOOD + "train: {load_best_model_at_end: true, save_strategy: epoch, activation_checkpointing: true}\n",
    ],
)
def test_to_yaml_reads_back_as_an_equal_recipe(load, write, text):
    recipe = load(text)
    write(recipe.to_yaml(), "recipe.yaml")
    again = load_recipe("recipe.yaml")
    assert again == recipe
    assert again.to_yaml().partition("\n")[2] == recipe.to_yaml().partition("\n")[2]
    assert recipe.to_yaml().startswith("# mine: ")
    legal = set(fields.legal_train_fields())
    assert again.train_written == legal - (
        {"gradient_accumulation_steps"} if recipe.train["tokens_per_step"] else set()
    )


def test_to_yaml_means_the_same_to_a_reader_of_yaml_1_1(load):
    yaml = pytest.importorskip("yaml")
    recipe = load(FULL, "train.adam_epsilon=1e-9")
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


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


# --------------------------------------------------------------------------------------------------------------------
# Schema, shipped recipes, the installed library, imports
# --------------------------------------------------------------------------------------------------------------------


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
    assert properties["data"]["properties"]["max_length"]["description"] == "tokens per row"
    assert "cosine" in properties["train"]["properties"]["lr_scheduler_type"]["enum"]
    assert "$ref" not in json.dumps(schema)


def test_every_field_says_what_it_is():
    def declared(model):
        for key in fields.section_keys(model):
            yield f"{model.__name__}.{key}", model.model_fields[key]
            section = fields.section_of(model.model_fields[key].annotation)
            yield from declared(section) if section else ()

    found = dict(declared(Recipe))
    assert len(found) > 40
    assert [name for name, field in found.items() if not field.description] == []


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
        from instructft.recipe.load import load_recipe, shipped_recipes
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


def test_shipped_field_lists_are_those_of_the_installed_libraries(load):
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

    recipe = load(GOOD, "train.max_steps=3")
    check_against_installed(recipe)
    strange = recipe.model_copy(update={"train": {**recipe.train, "gone_since": 1}})
    with pytest.raises(RecipeError, match=r"train\.gone_since: trl .* has no such field"):
        check_against_installed(strange)
