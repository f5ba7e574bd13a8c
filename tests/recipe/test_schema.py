"""What a recipe becomes: its defaults, frozen, copied, written out and read back."""

from __future__ import annotations

import copy
import pickle

import pytest

from instructft.formatting import yaml_text
from instructft.recipe import fields
from instructft.recipe.load import load_recipe, shipped_recipes
from tests.helpers.recipes import DATA, FULL, GOOD, MODEL


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
            "overrides": None,
            "freeze": None,
            "new_tokens": None,
            "quantization": "none",
        },
        "data": {
            "datasets": "…",
            "mix_by": "rows",
            "template": "auto",
            "system_prompt": None,
            "template_options": {},
            "template_adds": [],
            "template_date": "2024-07-26",
            "train_on": "responses",
            "turns": "all",
            "fold_turns": "auto",
            "ignore": [],
            "strip": False,
            "exclude": None,
            "max_length": 1024,
            "on_too_long": "truncate",
            "packing": False,
            "splits": {"validation": 0.05, "test": 0.0},
            "validation": None,
            "test": None,
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
            "lora_plus_ratio": None,
            "experts": "auto",
            "stack": False,
        },
        "train": "…",
        "evaluation": {"rows": "auto", "metrics": []},
        "samples": [],
        "hub": {"repo_id": None, "private": True, "path_in_repo": None, "push": "never"},
        "check": {
            "max_dropped_share": 0.2,
            "max_refused_share": 0.0,
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


def test_empty_sections_mean_their_defaults(load):
    assert load(GOOD + "adapter:\ntrain:\nhub:\nsamples:\n") == load()


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


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_what_is_told_of_a_recipe_makes_the_same_one(name, tmp_path):
    """And is short: no line of it says a default that nobody would look for."""
    recipe = load_recipe(name)
    (tmp_path / f"{name}.yaml").write_text(yaml_text(recipe.told()), encoding="utf-8")
    assert load_recipe(tmp_path / f"{name}.yaml") == recipe
    assert len(yaml_text(recipe.told()).splitlines()) < 60 < len(recipe.to_yaml().splitlines())
    assert "null" not in yaml_text(recipe.told())


def test_what_is_signed_in_an_address_is_not_written() -> None:
    """The recipe goes into run.json, manifests and cards, and up to the Hub; the run itself needs the query."""
    url = "https://host.example/rows.jsonl?api_key=K3y&sig=S"
    sets = [f"data.{key}=[{{url: '{url}'}}]" for key in ("datasets", "validation", "test")]
    recipe = load_recipe("quickstart", [*sets, "data.splits={validation: 0, test: 0}"])
    assert recipe.data.datasets[0].url == url
    assert "K3y" not in str(recipe.to_dict())
    assert str(recipe.to_dict()).count("https://host.example/rows.jsonl") == 3
