"""A final model is on the disk before it has its name, and is read by what others use: older versions, converters."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import instructft
from instructft.training.outcome import _give_names, _write_facts
from tests.conftest import TINY


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_hands_on_sentencepieces_own_file_and_nothing_of_this_machine(
    adapter: str, tmp_path: Path, tokenizer: Any, write_recipe: Any
) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")
    text = (
        f"model: {{name_or_path: {tmp_path / 'base'}}}\nadapter: {{type: {adapter}}}\noutput_dir: {tmp_path / 'run'}\n"
        "data: {datasets: [{name: quickstart, rows: 12}], splits: {validation: 0}}\n"
        "train: {max_steps: 1, use_cpu: true, learning_rate: 1e-2, warmup_steps: 0, report_to: none}\n"
    )
    instructft.train(instructft.load_recipe(write_recipe(text)), console=Console(quiet=True))
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == b"pieces"
    written = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert not {"is_local", "local_files_only"} & set(written)
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"  # what transformers 5 writes, version 4 has not


@pytest.mark.parametrize(
    "fails", ["instructft.weights.weight_files.require_whole", "instructft.training.outcome._write_facts"]
)
def test_what_fails_while_the_model_is_saved_loses_nothing(
    fails: str, tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = instructft.load_recipe(write_recipe(TINY), [f"output_dir={tmp_path / 'run'}", "train.max_steps=2"])
    said = io.StringIO()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the disk has gone")

    monkeypatch.setattr(fails, broken)
    with pytest.raises(OSError, match="the disk has gone"):
        instructft.train(recipe, console=Console(file=said, soft_wrap=True))
    kept = tmp_path / "run" / "unproved"
    assert f"what was trained is kept in {kept}; it is not proved" in said.getvalue()
    assert not (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "final.partial").exists()
    monkeypatch.undo()
    left = AutoModelForCausalLM.from_pretrained(kept)
    result = instructft.train(recipe, console=Console(quiet=True))  # from the last checkpoint: no step is trained again
    proved = AutoModelForCausalLM.from_pretrained(result.output_dir)
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), proved.parameters(), strict=True))
    assert not kept.exists()


def test_files_and_folders_are_on_disk_around_each_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes before the name, and the names of the model before those of `run.json`."""
    run, partial = tmp_path / "run", tmp_path / "run" / "final.partial"
    partial.mkdir(parents=True)
    events: list[tuple[str, str]] = []
    known: dict[int, str] = {run.stat().st_ino: "run", partial.stat().st_ino: "final.partial"}
    for name in ("config.json", "model.safetensors"):
        (partial / name).write_bytes(b"x")
        known[(partial / name).stat().st_ino] = name
    fsync, replace = os.fsync, Path.replace

    def noted_sync(handle: int) -> None:
        events.append(("disk", known.get(os.fstat(handle).st_ino, "run.json")))
        fsync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    _give_names(partial, run)
    known = {run.stat().st_ino: "run"}  # a file that is made now may have the number of one that is gone
    _write_facts(run, {"train": {}})
    assert sorted(events[:3]) == [("disk", "config.json"), ("disk", "final.partial"), ("disk", "model.safetensors")]
    assert events[3:] == [
        ("name", "model.safetensors"), ("name", "config.json"), ("disk", "run"),
        ("disk", "run.json"), ("name", "run.json"), ("disk", "run"),
    ]  # fmt: skip


@pytest.mark.parametrize(("asked", "stored"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_base_in_bfloat16_comes_back_as_one(
    asked: str, stored: torch.dtype, tmp_path: Path, tokenizer: Any, write_recipe: Any
) -> None:
    """Trained in float32 all the same; and rounded so that what was learned stays."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(0)
    base_model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).bfloat16()
    base_model.generation_config.update(do_sample=True, temperature=0.6, repetition_penalty=1.3)
    base_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    text = (
        f"model: {{name_or_path: {tmp_path / 'base'}, dtype: {asked}}}\noutput_dir: {tmp_path / 'run'}\n"
        "data: {datasets: [{name: quickstart, rows: 40}], splits: {validation: 0.2}}\n"
        "train: {max_steps: 4, use_cpu: true, learning_rate: 1e-2, warmup_steps: 0, report_to: none, save_steps: 4}\n"
    )
    out = io.StringIO()
    result = instructft.train(instructft.load_recipe(write_recipe(text)), console=Console(file=out, width=200))
    said = "stored in bfloat16, as its base is" if asked == "auto" else "stored in float32"
    assert f"the final model is {said}" in out.getvalue()
    assert "does not have its base's do_sample True, temperature 0.6, repetition_penalty 1.3" in out.getvalue()
    left_out = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3}
    assert result.facts["generation"]["left_out"] == left_out
    assert not left_out.keys() & json.loads((tmp_path / "run" / "generation_config.json").read_text()).keys() - {
        "do_sample"
    }
    assert result.facts["stored"] == str(stored).removeprefix("torch.")
    as_chat_has_it(tmp_path / "run")
    final, base = load_file(tmp_path / "run" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    checkpoint = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert {tensor.dtype for tensor in final.values()} == {stored}
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}  # a resumed run goes on from these bits
    assert AutoConfig.from_pretrained(tmp_path / "run").dtype == stored
    assert result.facts["like_base"]["dtype"] == str(stored).removeprefix("torch.")
    learned = sum(((checkpoint[name] - base[name].float()) ** 2).sum() for name in base)
    kept = sum(
        ((final[name].float() - base[name].float()) * (checkpoint[name] - base[name].float())).sum() for name in base
    )
    assert float(kept / learned) == pytest.approx(1, abs=0.01)
    saved = result.facts["saved"]
    assert saved["saved_loss"] == pytest.approx(saved["loss"], abs=3e-2)


def as_chat_has_it(run: Path) -> None:
    """Plain transformers, by the card's lines: the prompt, the logits and the greedy answer of `instructft chat`."""
    from instructft.inference.chat import Chat

    chat = Chat(str(run), max_new_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).to(chat.generator.model.device)
    tokenizer = AutoTokenizer.from_pretrained(run)
    messages = [{"role": "user", "content": "Which city does the text name?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    ours = chat.generator.rows([messages], 12)[0].prompt
    assert prompt["input_ids"][0].tolist() == list(ours)
    with torch.no_grad():
        logits = [one(input_ids=prompt["input_ids"]).logits for one in (model.eval(), chat.generator.model)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    model.generation_config = GenerationConfig.from_pretrained(run)  # of an adapter, as its card says
    made = model.generate(**prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(made, skip_special_tokens=True).strip() == chat.send(messages[0]["content"]).strip()


def test_plain_transformers_has_the_logits_of_chat_for_an_adapter(
    tmp_path: Path, tokenizer: Any, write_recipe: Any
) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    text = (
        f"model: {{name_or_path: {tmp_path / 'base'}}}\noutput_dir: {tmp_path / 'run'}\nadapter: lora\n"
        "data: {datasets: [{name: quickstart, rows: 40}], splits: {validation: 0.2}}\n"
        "train: {max_steps: 4, use_cpu: true, learning_rate: 1e-1, report_to: none, save_strategy: 'no'}\n"
    )
    instructft.train(instructft.load_recipe(write_recipe(text)), console=Console(quiet=True))
    as_chat_has_it(tmp_path / "run")
