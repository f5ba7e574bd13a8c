"""What is taken by `check` runs: each value of each setting is refused before anything is loaded, or trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.errors import RecipeError, UsageError
from instructft.recipe.fields import legal_lora_fields, legal_train_fields
from instructft.recipe.installed import check_against_installed, missing_packages, precision_and_kernels
from tests.helpers.recipes import GOOD

TINY = """
model: {config: {model_type: gpt2, n_layer: 1, n_head: 1, n_embd: 16, n_positions: 64}, tokenizer: quickstart}
data: {datasets: [{name: quickstart, rows: 20}], template: instruction, max_length: 64, splits: {validation: 0.2}}
train: {max_steps: 2, eval_steps: 1, per_device_train_batch_size: 2, use_cpu: true, report_to: none}
"""
BY_KIND: dict[str, list[Any]] = {
    "bool": [True, False],
    "int": [0, 1, 2],
    "float": [0, 1, 0.5],
    "str": ["foo"],
    "list": [["foo"]],
    "dict": [{}, {"foo": 1}],
    "null": [None],
}
LOADING = ("optim", "lr_scheduler_type", "report_to")  # their choices need packages and arguments of their own


def values(fields: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, row in fields.items():
        for value in row.get("choices", [v for kind in row["kinds"] for v in BY_KIND[kind]]):
            yield name, value


def attempt(key: str, value: Any, write_recipe: Callable[..., Path], tmp_path: Path, text: str = TINY) -> str:
    """Whether a value is refused in time, or trains; any other error is the test's."""
    run = tmp_path / "runs" / str(len(list(tmp_path.glob("runs/*"))))
    path = write_recipe(f"{text}output_dir: {run}\n")
    try:
        recipe = instructft.load_recipe(path, [f"{key}={json.dumps(value)}"])
        check_against_installed(recipe, "cpu")
    except UsageError as error:
        return "refused" if key in str(error) else f"refused without its name: {error}"
    try:  # a refusal by the architecture comes later, and still before any weight
        instructft.train(recipe, console=Console(quiet=True))
    except UsageError as error:
        return "refused" if key in str(error) else f"refused without its name: {error}"
    return "trains"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "report_to" else [pytest.mark.battery]) for name in LOADING]
)
def test_each_choice_is_refused_in_time_or_trains(name: str, write_recipe: Any, tmp_path: Path) -> None:
    found = {
        value: attempt(f"train.{name}", value, write_recipe, tmp_path)
        for value in legal_train_fields()[name]["choices"]
        if value not in ("all",)
    }
    assert set(found.values()) == {"refused", "trains"}


@pytest.mark.battery
@pytest.mark.parametrize("name", sorted(set(legal_train_fields()) - set(LOADING)))
def test_each_value_of_train_is_refused_in_time_or_trains(name: str, write_recipe: Any, tmp_path: Path) -> None:
    for _, value in values({name: legal_train_fields()[name]}):
        assert attempt(f"train.{name}", value, write_recipe, tmp_path) in ("refused", "trains"), value


def test_each_value_is_made_or_refused_without_a_raw_error(write_recipe: Any) -> None:
    """Every field, without training: nothing but errors of ours comes out, and what is refused is named."""
    path = write_recipe(TINY)
    refused = []
    for name, value in values(legal_train_fields()):
        try:
            check_against_installed(instructft.load_recipe(path, [f"train.{name}={json.dumps(value)}"]), "cpu")
        except UsageError as error:
            refused.append((name, str(error)))
    assert len(refused) > 50
    assert [error for name, error in refused if f"train.{name}" not in error] == []


@pytest.fixture
def lora(tmp_path: Path, tokenizer: Any) -> str:
    """A recipe of an adapter on a tiny base."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 16, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    random_weights = TINY[TINY.index("model:") : TINY.index("data:")]
    return TINY.replace(random_weights, f"model: {{name_or_path: {tmp_path / 'base'}}}\nadapter: {{type: lora}}\n")


# Fields that take names, and not any value of a kind.
WORDS = {
    "bias": ["none", "all", "lora_only", "foo"],
    "init_lora_weights": [True, False, "gaussian", "pissa", "olora", "eva", "loftq", "orthogonal", "corda", "foo"],
    "target_modules": ["c_attn", ["c_attn", "wte"], ".*c_fc", ["lm_head"], ["foo"], []],
    "modules_to_save": [["wte", "lm_head"], ["ln_f"], ["foo"]],
    "trainable_token_indices": [[5, 6], [99_999], {"wte": [5]}, {"foo": [5]}],
}


def adapter_values() -> Iterator[tuple[str, Any]]:
    others = {name: row for name, row in legal_lora_fields().items() if name not in WORDS}
    yield from values(others)
    yield from ((name, value) for name, found in WORDS.items() for value in found)


def test_each_value_of_adapter_is_made_or_refused_without_a_raw_error(lora: str, write_recipe: Any) -> None:
    """By its shapes alone, as `check` does: nothing but errors of ours comes out, and what is refused is named."""
    from instructft.adapters.lora import check
    from instructft.models.starting_point import starting_point

    path = write_recipe(lora)
    plain = instructft.load_recipe(path)
    config = starting_point(plain, instructft.load_tokenizer(plain)).config
    made, refused = [], []
    for name, value in adapter_values():
        try:
            check(instructft.load_recipe(path, [f"adapter.{name}={json.dumps(value)}"]), config)
            made.append(name)
        except UsageError as error:
            refused.append((name, str(error)))
    assert len(made) > 25
    assert len(refused) > 20
    assert [error for name, error in refused if "adapter" not in error] == []


@pytest.mark.battery
def test_each_value_of_adapter_is_refused_in_time_or_trains(lora: str, write_recipe: Any, tmp_path: Path) -> None:
    moves = lora.replace("train: {", "train: {learning_rate: 1e-2, ")
    for name, value in adapter_values():
        assert attempt(f"adapter.{name}", value, write_recipe, tmp_path, moves) in ("refused", "trains"), (name, value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "train.lr_scheduler_type=warmup_stable_decay",
            "needs num_decay_steps, such as train.lr_scheduler_kwargs={num_decay_steps: 100}",
        ),
        ("train.lr_scheduler_type=cosine_with_min_lr", "it takes num_cycles, min_lr, min_lr_rate"),
        ("train.lr_scheduler_kwargs={foo: 1}", "linear has no argument foo; it takes none"),
        ("train.optim=galore_adamw", "pip install git+https://github.com/jiaweizzhao/GaLore"),
        ("train.optim=grokadamw", "train.optim: grokadamw cannot be used here: Please install grokadamw"),
        ("train.gradient_checkpointing_kwargs={foo: 1}", "foo is no argument of it; it takes context_fn"),
        ('train.optim_args="betas=(0.9,0.95)"', "betas are train.adam_beta1 and train.adam_beta2"),
        (
            'train.optim_args="lr=3"',
            "lr changes nothing in adamw_torch_fused, which takes no such argument; take it out",
        ),
        ("train.report_to=[wandb]", "pip install 'instructft[wandb]'"),
        ("train.torch_compile_backend=inducter", 'did you mean "inductor"?'),
        ("train.torch_compile_mode=fast", 'train.torch_compile_mode: found "fast" (text), which cannot be used here'),
        ("train.fp16=true", "train.fp16: this run is on the CPU (train.use_cpu)"),
        ("train.tf32=true", "train.tf32: this run is on the CPU"),
        ("train.activation_offloading=true", "train.activation_offloading: this run is on the CPU"),
    ],
)
def test_the_way_out_is_said(override: str, words: str, write_recipe: Any) -> None:
    recipe = instructft.load_recipe(write_recipe(TINY), [override])
    with pytest.raises(UsageError) as caught:
        check_against_installed(recipe, "cpu")
    assert words in str(caught.value)
    with pytest.raises(UsageError) as again:  # and training says the same, with nothing loaded
        instructft.train(recipe, console=Console(quiet=True))
    assert str(again.value) == str(caught.value)


def test_of_an_optimizers_arguments_those_alone_are_refused_that_it_passes_over(write_recipe: Any) -> None:
    recipe = instructft.load_recipe(write_recipe(TINY), ["train.optim=sgd", "train.optim_args='momentum=0.9,foo=1'"])
    with pytest.raises(UsageError) as caught:
        check_against_installed(recipe, "cpu")
    assert str(caught.value).startswith("train.optim_args: foo changes nothing in sgd")
    assert "momentum" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "capability", "torchao", "says"),
    [
        ("cuda", (8, 0), True, "train.fp8: A100 has compute capability 8.0, and 8-bit floats need 8.9 or more"),
        ("cuda", (8, 9), True, ""),
        ("cuda", (9, 0), False, "train.fp8: torchao is not installed; pip install 'instructft[fp8]'"),
        ("mps", None, True, "train.fp8: mps has no products of 8-bit floats"),
        ("cpu", None, True, ""),  # emulated
        ("cpu", None, False, "pip install 'instructft[fp8]'"),
    ],
)
def test_where_fp8_cannot_be(
    device: str, capability: Any, torchao: bool, says: str, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    here = {"torchao": find("torch") if torchao else None}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: here[name] if name in here else find(name, *more)
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "A100")
    recipe = instructft.load_recipe(write_recipe(TINY), ["train.fp8=true"])
    found = "".join([*missing_packages(recipe), *precision_and_kernels(recipe, device)])
    assert says in found
    assert bool(found) is bool(says)


def test_all_that_is_wrong_is_said_at_once_and_for_another_machine_what_is_wrong_there_too(write_recipe: Any) -> None:
    overrides = ["train.optim=galore_adamw", "train.report_to=[wandb]", "train.lr_scheduler_kwargs={foo: 1}"]
    recipe = instructft.load_recipe(write_recipe(TINY), [*overrides, "train.fp16=true"])
    with pytest.raises(UsageError) as caught:
        check_against_installed(recipe, "cpu")
    assert len(str(caught.value).splitlines()) == 4
    with pytest.raises(UsageError) as caught:
        check_against_installed(recipe, None)
    assert str(caught.value) == "train.lr_scheduler_kwargs: linear has no argument foo; it takes none"


@pytest.mark.parametrize("metric", ["eval_perplexity", "entropy", "eval_loss", "mean_token_accuracy"])
def test_the_best_checkpoint_is_that_of_the_lower_loss(metric: str, write_recipe: Any) -> None:
    recipe = instructft.load_recipe(write_recipe(TINY), [f"train.metric_for_best_model={metric}"])
    lower = {"eval_perplexity": False, "entropy": False}.get(metric)  # of the others upstream knows it
    assert recipe.train.get("greater_is_better") is lower


def test_a_field_that_trl_has_lost_is_named(write_recipe: Any) -> None:
    recipe = instructft.load_recipe(write_recipe(GOOD), ["train.max_steps=3"])
    check_against_installed(recipe)
    strange = recipe.model_copy(update={"train": {**recipe.train, "gone_since": 1}})
    with pytest.raises(RecipeError, match=r"train\.gone_since: trl .* has no such field"):
        check_against_installed(strange)


def test_a_whole_number_is_taken_where_a_number_is_meant(write_recipe: Any) -> None:
    fields = instructft.load_recipe(write_recipe(TINY), ["train.router_aux_loss_coef=0", "train.weight_decay=1"])
    assert [type(fields.sft_kwargs()[key]) for key in ("router_aux_loss_coef", "weight_decay")] == [float, float]
    assert type(fields.sft_kwargs()["max_steps"]) is int
