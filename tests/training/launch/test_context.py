"""Rows divided among processes: who may ask for it, and what is said of a recipe or a model that cannot have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.errors import UsageError
from instructft.training.launch import context

SHARED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_CP_SIZE": "2",
}


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate's launcher says to each process."""
    for name, value in SHARED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., instructft.Recipe]:
    return lambda *overrides: instructft.load_recipe(write_recipe(), list(overrides))


def test_the_launcher_says_how_many_share_a_row(shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (context.context_size(), context.batches_at_once(8)) == (2, 4)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "false")
    assert (context.context_size(), context.batches_at_once(8)) == (1, 8)


@pytest.mark.parametrize(
    ("size", "processes", "strategy", "said"),
    [
        (1, 3, "ddp", []),
        (2, 4, "fsdp2", []),
        (0, 4, "fsdp2", ["found 0, expected a whole number from 1"]),
        (2, 4, "zero3", ["found --strategy zero3, expected fsdp2"]),
        (4, 6, "ddp", ["found --strategy ddp", "found 6 processes in all, expected a multiple of 4"]),
        (2, 1, "fsdp2", ["found 1 process in all"]),
    ],
)
def test_what_is_asked_for_on_the_command_line(size: int, processes: int, strategy: str, said: list[str]) -> None:
    found = list(context.asked_problems(size, processes, strategy))
    assert len(found) == len(said)
    assert all(part in problem for part, problem in zip(said, found, strict=True))


def test_a_plain_recipe_can_be_divided(recipe: Any, shared: None) -> None:
    assert list(context.recipe_problems(recipe())) == []
    context.refuse_what_cannot_be_divided(recipe("model.attn_implementation=sdpa"), 4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.packing=true", "data.packing: found true, expected false"),
        ("data.packing=auto", "data.packing: found auto, expected false"),
        ("data.fold_turns=true", "data.fold_turns: found true"),
        ("model.attn_implementation=eager", "model.attn_implementation: found eager, expected auto or sdpa"),
        ("model.attn_implementation=flash_attention_2", "model.attn_implementation: found flash_attention_2"),
        (
            "data.datasets.0.streaming=true data.splits.validation=0 data.splits.test=0 train.max_steps=3",
            "data.datasets: found a set with streaming: true",
        ),
        ("train.loss_type=dft", "train.loss_type: found dft, expected nll"),
        ("train.label_smoothing_factor=0.1", "train.label_smoothing_factor: such a loss is upstream's"),
        ("train.torch_compile=true", "train.torch_compile: found true"),
        ("train.auto_find_batch_size=true", "train.auto_find_batch_size: works in one process"),
        (
            'train.accelerator_config={"split_batches":true,"dispatch_batches":true}',
            "train.accelerator_config.dispatch_batches: true deals a batch out",
        ),
    ],
)
def test_what_a_recipe_cannot_have(recipe: Any, override: str, said: str) -> None:
    found = list(context.recipe_problems(recipe(*override.split())))
    assert found[0].startswith(said)
    assert len(found) == (2 if "split_batches" in override else 1)


def test_a_file_of_accelerator_config_is_read(recipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"split_batches": true}')
    (found,) = context.recipe_problems(recipe(f"train.accelerator_config={file}"))
    assert found.startswith("train.accelerator_config.split_batches: true")


def test_all_problems_come_out_together_before_data_and_weights(
    recipe: Any, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instructft.training import run

    monkeypatch.setattr(run, "load_tokenizer", lambda *args: pytest.fail("the run has begun"))
    wrong = recipe("data.packing=true", "train.loss_type=dft")
    with pytest.raises(UsageError, match="3 problems") as error:
        instructft.train(wrong)  # one process: no multiple of two
    for part in ("a multiple of 2", "data.packing", "train.loss_type"):
        assert part in str(error.value)


def test_without_fsdp2_nothing_is_divided(recipe: Any, shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UsageError, match="found --strategy fsdp1, expected fsdp2"):
        context.refuse_what_cannot_be_divided(recipe(), 4)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(UsageError, match="found --strategy ddp, expected fsdp2"):
        context.refuse_what_cannot_be_divided(recipe(), 4)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("llama", {}, ""),
        ("gpt2", {}, ""),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096}, ""),
        ("mistral", {"sliding_window": None}, ""),
        ("mistral", {"sliding_window": 4096}, "mistral has layers of type sliding_attention"),
        ("gemma2", {}, "gemma2 has layers of type sliding_attention"),
        ("qwen3_next", {}, "qwen3_next has layers of type linear_attention"),
        ("lfm2", {"full_attn_idxs": [0]}, "lfm2 has layers of type conv"),
        ("mixtral", {"sliding_window": None}, "train.router_aux_loss_coef: the router of mixtral"),
        ("mamba", {}, "torch's ring is made for attention sdpa, and mamba has none"),
        ("gemma3", {}, "gemma3 has more than a text model"),
    ],
)
def test_what_a_model_cannot_have_is_told_by_its_configuration(
    recipe: Any, kind: str, fields: dict[str, Any], said: str
) -> None:
    from transformers import AutoConfig

    found = list(context.model_problems(AutoConfig.for_model(kind, **fields), recipe()))
    assert bool(found) == bool(said)
    assert any(said in problem for problem in found) or not said


def test_a_mixture_without_its_routers_loss_can_be_divided(recipe: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("mixtral", sliding_window=None)
    assert list(context.model_problems(config, recipe("train.router_aux_loss_coef=0.0"))) == []


def test_a_model_is_refused_before_its_weights_are_loaded(
    write_recipe: Callable[..., Path], shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instructft.training import run

    monkeypatch.setattr(run, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    monkeypatch.setattr(context, "asked_problems", lambda *args: iter(()))  # one process is no multiple of two
    model = (
        "{model_type: mistral, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
        "num_key_value_heads: 1, sliding_window: 8}"
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    recipe = instructft.load_recipe(write_recipe(), [f"model.config={model}"])
    with pytest.raises(UsageError, match="mistral has layers of type sliding_attention"):
        instructft.train(recipe)
