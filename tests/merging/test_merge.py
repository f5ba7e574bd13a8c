"""A merged model is the adapted one in form and in use, and whatever is wrong is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from instructft import merge_adapter
from instructft.errors import AdapterError, ModelError, UsageError
from instructft.merging import merge
from instructft.weights import tensor_io
from tests.helpers.merging import (
    QUIET,
    files_in,
    live,
    load_whole,
    logits_of,
    make_adapter,
    make_base,
    plan_of,
    refused,
    rewrite,
    with_tokenizer,
)
from tests.helpers.processes import python


def test_one_shard_and_five_are_the_same_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    merge_adapter(adapter, tmp_path / "one", verify=False, console=QUIET)
    planned = [output.planned for output in plan_of(adapter, base).outputs.values()]
    size = next(size for size in range(10_000, 400_000, 1000) if len(tensor_io.shards(planned, size)) == 5)
    merge_adapter(adapter, tmp_path / "five", verify=False, max_shard_size=f"{size}B", console=QUIET)
    assert [name for name in files_in(tmp_path / "one") if "safetensors" in name] == ["model.safetensors"]
    found = sorted(name for name in files_in(tmp_path / "five") if "safetensors" in name)
    assert found == [*(f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)), "model.safetensors.index.json"]
    one, five = load_whole(tmp_path / "one").state_dict(), load_whole(tmp_path / "five").state_dict()
    assert one.keys() == five.keys()
    assert all((one[name] == five[name]).all() for name in one)


def test_a_base_of_pickled_weights(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = make_base(tmp_path / "base", "gpt2")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    adapter = make_adapter(tmp_path / "adapter", base)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert (logits_of(load_whole(tmp_path / "out")) - logits_of(live(adapter, base))).abs().max() < 1e-5


def test_without_a_proof_the_card_says_so(tmp_path: Path, tokenizer: Any) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert "not verified" in (tmp_path / "out" / "README.md").read_text()
    assert "proof" not in json.loads((tmp_path / "out" / "run.json").read_text())["merge"]


@pytest.mark.usefixtures("short_answers")
def test_a_merged_model_is_used_like_any_other(tmp_path: Path, tokenizer: Any, write_recipe: Any) -> None:
    from instructft.inference.chat import generate
    from instructft.inference.generator import Generator
    from instructft.models.load_for_inference import load_for_inference
    from instructft.recipe.load import load_recipe

    base = with_tokenizer(make_base(tmp_path / "base", "gpt2", "bfloat16"), tokenizer)
    run = with_tokenizer(make_adapter(tmp_path / "run", base), tokenizer)
    (run / "recipe.yaml").write_text(load_recipe(write_recipe()).to_yaml())
    (run / "run.json").write_text('{"seed": 42}')
    (run / "README.md").write_text("---\nlibrary_name: peft\nlicense: mit\n---\n\n# A run\n")
    out = tmp_path / "out"
    facts = merge_adapter(run, out, console=QUIET).facts
    assert facts["proof"]["source"] == "the recipe's held-out rows"
    assert json.loads((out / "run.json").read_text())["seed"] == 42
    assert (out / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "license: mit" in card
    assert "# out\n" in card  # the run's own facts are not there
    assert card.index("## Merge") < card.index("## Use") < card.index("AutoModelForCausalLM.from_pretrained")
    assert "peft" not in card
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config["dtype"] == "bfloat16"
    merged, kept = load_for_inference(str(out))
    assert kept.chat_template == tokenizer.chat_template
    questions = ["Name a colour.", "What is the capital of France?"]
    answers = Generator(live(run, base), tokenizer).answers([[{"role": "user", "content": q}] for q in questions], 6)
    assert len(generate(merged, questions, tokenizer=kept, max_new_tokens=6)) == len(answers) == 2


def test_a_checkpoint_of_a_run_brings_what_its_run_holds(tmp_path: Path, tokenizer: Any) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    run = with_tokenizer(tmp_path / "run", tokenizer)
    checkpoint = make_adapter(run / "checkpoint-4", base)
    (checkpoint / "base.json").rename(run / "base.json")
    (run / "run.json").write_text('{"seed": 7}')
    merge_adapter(checkpoint, tmp_path / "out", verify=False, console=QUIET)
    assert {"tokenizer.json", "chat_template.jinja"} <= files_in(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed"] == 7


def test_the_command_refuses_with_exit_2_and_writes_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    made = python(["-m", "instructft", "merge", str(adapter), str(tmp_path / "out")], tmp_path_factory.mktemp("said"))
    assert made.returncode == 2
    assert "cut short" in made.stderr
    assert "Traceback" not in made.stderr
    assert files_in(tmp_path) == {"base", "adapter"}


def test_an_output_that_is_not_empty_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    from instructft.cli import app

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert isinstance(result.exception, UsageError)
    assert "not empty" in str(result.exception)
    assert files_in(tmp_path / "out") == {"mine.txt"}


def test_broken_adapters_are_refused(pair: tuple[Path, Path]) -> None:
    import torch

    _, adapter = pair
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    first = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda found: found.pop(first), "lora_A"),
        (lambda found: found.update({first.replace("h.0", "h.9"): found[first].clone()}), "h.9"),
        (lambda found: found.update({first: torch.zeros(0, 32)}), "lora_A"),
        (lambda found: found.update({first: torch.zeros(4, 31)}), "shape"),
        (lambda found: found[first].fill_(float("nan")), "NaN"),
    ]
    for change, match in changes:
        (adapter / "adapter_model.safetensors").write_bytes(whole)
        rewrite(adapter, change)
        refused(adapter, match, AdapterError)


def test_a_changed_base_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-8] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    refused(adapter, "is not the base", AdapterError)


def test_a_full_disk_is_seen_before_anything_is_written(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = pair
    usage = shutil.disk_usage(adapter)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(adapter, "0.00 GB are free, and the merged model needs", UsageError)


def test_a_disk_that_fills_up_leaves_nothing(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = pair
    write, calls = tensor_io._write, iter(range(1000))

    def full(file: Any, data: Any) -> int:
        if next(calls) == 40:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(tensor_io, "_write", full)
    with pytest.raises(ModelError, match="No space left on device; nothing was kept"):
        merge_adapter(adapter, adapter.parent / "out", verify=False, console=QUIET)
    assert files_in(adapter.parent) == {"base", "adapter"}


@pytest.mark.parametrize(("value", "match"), [("0", "max-shard-size"), ("many", "max-shard-size")])
def test_a_size_that_is_none_is_refused(pair: tuple[Path, Path], value: str, match: str) -> None:
    refused(pair[1], match, UsageError, max_shard_size=value)


def test_a_merge_that_is_still_running_is_left_alone(pair: tuple[Path, Path]) -> None:
    pytest.importorskip("fcntl")
    from instructft.checkpoints.run_folder import partial_folder

    _, adapter = pair
    out = adapter.parent / "out"
    with partial_folder(out) as theirs:
        (theirs / "config.json").write_text("{}")
        with partial_folder(out) as ours:
            (ours / "config.json").write_text("[]")
        assert theirs.is_dir()
        (out / "config.json").unlink()  # so that the other may take the place
    assert (out / "config.json").read_text() == "{}"
