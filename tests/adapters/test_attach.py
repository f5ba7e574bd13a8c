"""An adapter and its base become one model again, strictly, wherever the base lies."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import instructft
from instructft import cli
from instructft.adapters import quantization
from instructft.adapters.adapter_folder import is_adapter, read_adapter
from instructft.adapters.attach import attach, leaves_base_as_it_is, locate_base
from instructft.adapters.lora import fit_embeddings
from instructft.errors import AdapterError, ModelError, UsageError
from instructft.inference.chat import generate
from instructft.models import load_for_inference as loading
from instructft.models.load_for_inference import load_bare, load_base, load_for_inference, locate
from tests.helpers.adapters import (
    base_json,
    make_adapter,
    record_base,
)
from tests.helpers.device import apart, near, on
from tests.helpers.telling import telling

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "tokens": {"new": True},
    "tokens and dora": {"new": True, "use_dora": True},
    "ranks": {"rank_pattern": {"c_attn|q_proj": 3}, "alpha_pattern": {"c_attn|q_proj": 5}},
    "biases": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_was_trained_comes_back(
    kind: str, base: str, bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, live, ids = make_adapter(bases[base], tmp_path / "adapter", **KINDS[kind])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft")  # not one word about missing keys
        model, tokenizer = load_for_inference(str(folder))
    with torch.no_grad():
        assert apart(model, live, ids) <= 1e-6
    assert not model.training
    assert model.generation_config.pad_token_id == 7
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.config.vocab_size == len(tokenizer)
    questions = ["What is 1 + 1?", "Name a colour."]
    assert generate(str(folder), questions, max_new_tokens=12) == generate(
        live, questions, tokenizer=tokenizer, max_new_tokens=12
    )
    assert capfd.readouterr().err.count("not verified") == 0


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_its_adapter_it_is_its_base(kind: str, base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    folder, _, ids = make_adapter(bases[base], tmp_path / "adapter", **KINDS[kind])
    adapter = read_adapter(folder)
    model = load_bare(str(folder))[0]
    start = load_base(adapter)
    fit_embeddings(start, adapter.base.vocab_size)
    with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
        difference = apart(model, start, ids)
    if leaves_base_as_it_is(adapter):
        assert difference == 0
    else:
        assert kind in ("biases", "pissa")
        # Llama has no biases, and what a PiSSA adapter takes out of its base is never put back
        assert difference > 0.01 or (kind, base) == ("biases", "llama")


def test_tied_rows_stay_tied_and_untied_rows_untied(bases: dict[str, Path], tmp_path: Path) -> None:
    for base, tied in (("gpt2", True), ("llama", False)):
        folder, live, _ = make_adapter(bases[base], tmp_path / base, new=True)
        saved = [name for name in read_adapter(folder).shapes if "trainable_tokens" in name]
        assert len(saved) == (1 if tied else 2)
        assert {read_adapter(folder).shapes[name] for name in saved} == {(2, 32)}
        model = load_bare(str(folder))[0]
        above, below = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert torch.equal(above, below) is tied
        assert torch.equal(below, live.get_input_embeddings().weight)
        assert torch.equal(above, live.get_output_embeddings().weight)
        assert not torch.equal(below[-2:], model.get_input_embeddings().token_adapter.base_layer.weight[-2:])


def test_to_be_trained_further(bases: dict[str, Path], tmp_path: Path) -> None:
    folder, live, _ = make_adapter(bases["gpt2"], tmp_path / "adapter", new=True)
    model = attach(AutoModelForCausalLM.from_pretrained(bases["gpt2"]), read_adapter(folder), trainable=True)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, weight in live.named_parameters() if weight.requires_grad}
    assert len(trainable) == 17


def test_a_checkpoint_takes_base_and_tokenizer_from_its_run(bases: dict[str, Path], tmp_path: Path) -> None:
    run, live, ids = make_adapter(bases["gpt2"], tmp_path / "run", new=True)
    checkpoint = run / "checkpoint-3"
    live.save_pretrained(checkpoint, save_embedding_layers=False)
    model, tokenizer = load_for_inference(str(checkpoint))
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert apart(model, live, ids) <= 1e-6
    record = read_adapter(checkpoint).base
    assert record == read_adapter(run).base
    (run / "base.json").write_text(json.dumps({**record.__dict__, "fingerprint": "sha256:0"}), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"name_or_path in .*/run/base.json"):
        load_bare(str(checkpoint))


def test_the_tokenizer_of_the_base_serves_where_there_is_no_other(sound: Path, bases: dict[str, Path]) -> None:
    tokenizer = load_for_inference(str(sound))[1]
    for file in sound.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer: there is none in \S+/base"):
        load_bare(str(sound))
    with pytest.raises(ModelError, match=r"has no tokenizer: there is none in"):
        load_bare(str(bases["gpt2"]))
    tokenizer.save_pretrained(sound.parent / "base")
    assert load_bare(str(sound))[1].get_vocab() == tokenizer.get_vocab()


def test_an_adapter_of_peft_alone(bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, live, ids = make_adapter(bases["gpt2"], tmp_path / "plain", ours=False)
    capfd.readouterr()
    model, _ = load_for_inference(str(folder))
    notes = [line for line in capfd.readouterr().err.splitlines() if "verified" in line]
    assert notes == [f"{folder} has no base.json: that {bases['gpt2']} is the base it was trained on is not verified."]
    assert apart(model, live, ids) <= 1e-6


def test_an_adapter_of_peft_alone_with_its_whole_embedding(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT saves the whole matrix when the vocabulary has grown and no rows of it are named."""
    grown = AutoModelForCausalLM.from_pretrained(bases["llama"])
    rows = grown.config.vocab_size
    fit_embeddings(grown, rows + 9)
    live = get_peft_model(grown, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        live.get_input_embeddings().weight[-9:] += 1
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        live.save_pretrained(tmp_path / "plain")
    adapter = read_adapter(tmp_path / "plain")
    assert adapter.base.vocab_size == rows + 9
    assert not leaves_base_as_it_is(adapter)
    model = attach(load_base(adapter), adapter)
    ids = torch.tensor([[1, 2, rows + 4]])
    assert apart(model, live.eval(), ids) <= 1e-6


def test_a_base_that_moved_together_with_its_run_is_found(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    shutil.copytree(bases["gpt2"], first / "models" / "base")
    monkeypatch.chdir(first)
    make_adapter(Path("models/base"), Path("runs/mine"))
    assert read_adapter("runs/mine").base.name_or_path == "models/base"
    assert locate_base(read_adapter("runs/mine")) == Path("models/base")
    monkeypatch.chdir("/")
    first.rename(tmp_path / "second")
    found = locate_base(read_adapter(tmp_path / "second" / "runs" / "mine"))
    assert found == tmp_path / "second" / "models" / "base"
    # another folder of that name in the working directory does not stand in for it
    shutil.copytree(bases["llama"], tmp_path / "other")
    (tmp_path / "here" / "models").mkdir(parents=True)
    (tmp_path / "other").rename(tmp_path / "here" / "models" / "base")
    monkeypatch.chdir(tmp_path / "here")
    assert locate_base(read_adapter(tmp_path / "second" / "runs" / "mine")) == found


def test_base_and_adapter_from_the_cache_of_the_hub(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is after a download, and offline; the commit that was trained on is taken, not where `main` is now."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def cached(repo: str, commit: str, folder: Path) -> Path:
        place = cache / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(commit, encoding="utf-8")
        return shutil.copytree(folder, place / "snapshots" / commit)

    cached("org/base", "a" * 40, bases["gpt2"])
    folder, live, ids = make_adapter(Path(cache / "models--org--base" / "snapshots" / ("a" * 40)), tmp_path / "adapter")
    kept = json.loads((folder / "base.json").read_text(encoding="utf-8"))
    record_base(folder, "org/base", kept["vocab_size"])
    record = read_adapter(folder).base
    assert (record.commit, record.fingerprint) == ("a" * 40, kept["fingerprint"])
    cached("org/base", "b" * 40, bases["llama"])
    cached("org/adapter", "c" * 40, folder)
    for name in (str(folder), "org/adapter", f"org/adapter@{'c' * 40}"):
        model, tokenizer = load_for_inference(name)
        assert apart(model, live, ids) <= 1e-6
    assert locate_base(read_adapter(folder)).name == "a" * 40
    tokenizer.save_pretrained(cache / "models--org--base" / "snapshots" / ("a" * 40))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_bare(str(folder))[1].get_vocab() == tokenizer.get_vocab()
    shutil.rmtree(cache / "models--org--base")
    with pytest.raises(AdapterError, match="trained on org/base, which is neither a folder"):
        load_for_inference("org/adapter")


@pytest.mark.parametrize(
    ("cpu", "how"),
    telling(itertools.product([True, False], ["4bit", "8bit"]), (True, "4bit"), (False, "8bit")),
    indirect=["cpu"],
)
def test_a_quantized_base_comes_as_it_was_in_training(
    cpu: bool,
    how: str,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import bitsandbytes as bnb

    folder, live, ids = make_adapter(bases["wide"], tmp_path / "adapter")
    base_json(folder, quantization=how)
    model, _ = load_for_inference(str(folder))
    kind = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}[how]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer  # type: ignore[union-attr]
    assert isinstance(layer, kind)
    assert not isinstance(model.get_output_embeddings(), kind)
    with torch.no_grad():
        wanted = live(ids).logits
        difference = (model(on(model, ids)).logits.cpu() - wanted).abs().mean() / wanted.abs().mean()
    assert 1e-4 < difference < 0.5
    monkeypatch.setattr(quantization, "trouble_with", lambda *_: "is not installed")
    capfd.readouterr()
    model, _ = load_for_inference(str(folder))
    assert f"{how} weights through bitsandbytes, which is not installed: the base is loaded unquantized" in (
        capfd.readouterr().err
    )
    assert apart(model, live, ids) <= 1e-6


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the command `evaluate` on three rows: its results."""
    rows, results = tmp_path / "rows.jsonl", tmp_path / "results.json"
    found = [{"instruction": f"What is {i} + 1?", "output": f"{i + 1}."} for i in range(3)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")

    def run(folder: Path, *options: Any) -> dict[str, Any]:
        arguments = [
            "instructft",
            "evaluate",
            folder,
            "--data",
            rows,
            "--json",
            results,
            "--max-new-tokens",
            8,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return dict(json.loads(results.read_text(encoding="utf-8")))

    return run


@pytest.mark.parametrize("kind", ["lora", "tokens", "pissa"])
def test_what_an_adapter_began_from(
    kind: str,
    bases: dict[str, Path],
    tmp_path: Path,
    evaluated: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, live, _ = make_adapter(bases["llama"], tmp_path / "adapter", **KINDS[kind])
    loaded: list[str] = []
    original = loading._load_weights
    monkeypatch.setattr(loading, "_load_weights", lambda name, *a, **k: loaded.append(name) or original(name, *a, **k))
    results = evaluated(folder, "--base", "start")
    assert len(loaded) == (2 if kind == "pissa" else 1)  # its base is in memory once, where that is exact
    tokenizer = load_for_inference(str(folder))[1]
    start = AutoModelForCausalLM.from_pretrained(bases["llama"])
    fit_embeddings(start, len(tokenizer))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    for side, model in (("base", start), ("tuned", live)):
        expected = instructft.evaluate(model, rows, tokenizer=tokenizer, max_new_tokens=8)
        assert results[side]["loss"] == pytest.approx(expected["loss"], abs=near(1e-6)), side
        for found, row in zip(results[side]["rows"], expected["rows"], strict=True):
            assert found.pop("dataset").endswith("rows.jsonl")  # which rows in memory do not have
            assert found == {**row, "nll": pytest.approx(row["nll"], abs=near(1e-5))}, side
    assert abs(results["base"]["loss"] - results["tuned"]["loss"]) > 1e-3


def test_an_adapter_beside_its_base_or_another_adapter(
    bases: dict[str, Path], tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    folder, *_ = make_adapter(base, tmp_path / "adapter", new=True)
    other, *_ = make_adapter(base, tmp_path / "other")
    load_for_inference(str(other))[1].save_pretrained(base)
    start = evaluated(folder, "--base", "start")
    assert evaluated(folder, "--base", base) == start
    beside = evaluated(folder, "--base", other)
    assert beside["tuned"] == start["tuned"]
    assert beside["base"]["loss"] == evaluated(other)["tuned"]["loss"]


def test_no_model_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(UsageError, match=r"no adapter_config.json and no config.json in it"):
        locate(str(tmp_path))
    assert not is_adapter(tmp_path)
