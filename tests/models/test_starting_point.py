"""What a run begins with is found once: an adapter is read, its base hashed, the tokenizer loaded one time each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import instructft
from instructft.adapters import adapter_folder
from instructft.weights import weight_files

QUIET = Console(quiet=True)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thing is done from now on, wherever its function is imported."""
    calls: Counter[str] = Counter()

    def watch(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            if what != "adapter" or Path(args[0]).name == "adapter_config.json":
                calls[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    watch(adapter_folder, "_read_object", "adapter")
    watch(weight_files, "_safetensors", "fingerprint")
    watch(AutoTokenizer, "from_pretrained", "tokenizer")
    watch(AutoModelForCausalLM, "from_pretrained", "weights")
    watch(AutoModelForCausalLM, "from_config", "on meta")
    return calls


def test_one_look_at_where_a_run_begins(
    tmp_path: Path, tokenizer: Any, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def run(begin: Path, out: str, template: str, steps: int) -> Any:
        text = (
            f"model: {{name_or_path: {begin}}}\nadapter: {{type: lora, r: 2}}\noutput_dir: {tmp_path / out}\n"
            f"data: {{datasets: [{{name: quickstart, rows: 12}}], template: {template}, splits: {{validation: 0}}}}\n"
            f"train: {{max_steps: {steps}, save_steps: 1, lr_scheduler_type: constant, warmup_steps: 0, use_cpu: true}}"
        )
        return instructft.train(instructft.load_recipe(write_recipe(text, f"{out}{steps}.yaml")), console=QUIET)

    calls = counted(monkeypatch)
    first = run(tmp_path / "base", "first", "chatml", 1)
    # the second tokenizer is the one that the rehearsal saves and reads back
    assert calls == {"fingerprint": 1, "tokenizer": 2, "weights": 1, "on meta": 1}
    record = adapter_folder.read_adapter(first.output_dir).base

    once = {"adapter": 1, "fingerprint": 1, "tokenizer": 2, "weights": 1}
    for steps in (1, 2):  # the second goes on from the checkpoint of the first
        calls.clear()
        further = run(first.output_dir, "further", "tokenizer", steps)
        assert calls == once
    assert len(further.facts["train"]["resumed"]) == 1
    assert adapter_folder.read_adapter(further.output_dir).base == record
    assert further.facts["base"] == first.facts["base"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.router_aux_loss_coef=0.1", r"train\.router_aux_loss_coef: found 0\.1, .* is no mixture of experts"),
        ("model.attn_implementation=flash_attention_2", "flash_attention_2 cannot be used here: .* write model.attn"),
    ],
)
def test_what_the_architecture_or_the_machine_lacks_is_refused_before_weights_in_check_and_in_training(
    override: str, words: str, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instructft.check.report import check
    from instructft.errors import UsageError

    monkeypatch.setattr("instructft.training.run.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    recipe = instructft.load_recipe(write_recipe(), [override])
    with pytest.raises(UsageError, match=words):
        check(recipe)
    with pytest.raises(UsageError, match=words):
        instructft.train(recipe, console=QUIET)


def test_no_weight_of_a_routers_loss_is_taken_for_a_model_without_router(write_recipe: Any) -> None:
    recipe = instructft.load_recipe(write_recipe(), ["train.router_aux_loss_coef=0", "train.max_steps=1"])
    assert instructft.train(recipe, console=QUIET).facts["train"]["steps"] == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("n_layer=two", "n_layer"),
        ("n_embd=[32]", "n_embd"),
        ("n_head=0", "model.config.n_head: found 0, expected a number from 1"),
        ("n_layer=1000000000000", "model.config.n_layer: found 1,000,000,000,000, expected"),
        ("n_positions=-4", "model.config.n_positions: found -4, expected"),
    ],
)
def test_a_configuration_that_no_machine_could_hold_is_refused_at_once(
    write_recipe: Any, override: str, said: str
) -> None:
    from instructft.errors import UsageError
    from instructft.models.starting_point import starting_point

    recipe = instructft.load_recipe(write_recipe(), [f"model.config.{override}"])
    with pytest.raises(UsageError, match=r"model\.config") as refused:
        starting_point(recipe, instructft.load_tokenizer(recipe))
    assert said in str(refused.value)
