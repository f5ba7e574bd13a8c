"""Adapter folders: one that is whole gives the model that was trained, bit for bit; any other is refused everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import instructft
from instructft import cli
from instructft.adapters import quantization
from instructft.adapters.adapter_folder import is_adapter, read_adapter
from instructft.adapters.attach import attach, check_fit, leaves_base_as_it_is, locate_base
from instructft.adapters.new_tokens import fit_embeddings
from instructft.errors import AdapterError, ModelError, UsageError
from instructft.evaluation import compare as compare_module
from instructft.inference.chat import generate
from instructft.models import load_for_inference as loading
from instructft.models.load_for_inference import load_bare, load_base, load_for_inference, locate
from instructft.prompt.templates import TEMPLATES
from instructft.weights.base_record import base_fingerprint
from instructft.weights.weight_files import read_header
from tests.helpers.adapters import record_base

NEW = ["<|im_start|>", "<|im_end|>"]
PREFIX = "base_model.model."
ROWS = f"{PREFIX}transformer.wte.token_adapter.trainable_tokens_delta"
A = f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_base(kind: str, folder: Path) -> Path:
    """A random base with clear choices: GPT-2 (Conv1D, tied head) or Llama (untied head). No tokenizer."""
    from tests.helpers.quickstart import tokenizer

    torch.manual_seed(0)
    rows = len(tokenizer())
    if kind == "gpt2":
        shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
        ids = {"bos_token_id": 0, "eos_token_id": tokenizer().eos_token_id}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=rows, **shape, **ids))
    else:
        width = 128 if kind == "wide" else 32  # rows of whole blocks, as 4-bit weights have them on a CPU
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
        shape["num_attention_heads"] = 2
        shape |= {"max_position_embeddings": 128, "tie_word_embeddings": False}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


def make_adapter(
    base: Path, folder: Path, new: bool = False, ours: bool = True, **lora: Any
) -> tuple[Path, Any, torch.Tensor]:
    """An adapter folder, the live model that it was saved from, and a batch of ids: (2, 9), new tokens among them."""
    from tests.helpers.quickstart import tokenizer as bundled

    tokenizer = bundled()
    tokenizer.chat_template = TEMPLATES["instruction"].text()
    model = AutoModelForCausalLM.from_pretrained(base)
    conv1d = model.config.model_type == "gpt2"
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": NEW})
        rows = [len(tokenizer) - 2, len(tokenizer) - 1]
        fit_embeddings(model, len(tokenizer))
        lora["trainable_token_indices"] = rows if conv1d else {"embed_tokens": rows, "lm_head": rows}
    lora = {"target_modules": "all-linear", "fan_in_fan_out": conv1d, **lora}
    live = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **lora))
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in live.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    live.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    live.generation_config.pad_token_id = 7  # not the base's
    live.generation_config.save_pretrained(folder)
    if ours:
        record_base(folder, str(base), len(tokenizer) if new else model.config.vocab_size)
    ids = torch.randint(0, len(tokenizer), (2, 9))
    ids[0, 3:5] = torch.tensor([len(tokenizer) - 2, len(tokenizer) - 1])
    return folder, live.eval(), ids


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {kind: make_base(kind, place / kind) for kind in ("gpt2", "llama", "wide")}


@pytest.fixture
def sound(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A whole adapter over a base of its own, both in `tmp_path`, for a test to break."""
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    return make_adapter(base, tmp_path / "adapter")[0]


# ---------------------------------------------------------------------------------------------------------- whole ones

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
        assert (model(ids).logits - live(ids).logits).abs().max() <= 1e-6
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
        difference = (model(ids).logits - start(ids).logits).abs().max()
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
    assert (model(ids).logits - live(ids).logits).abs().max() <= 1e-6
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
    assert (model(ids).logits - live(ids).logits).abs().max() <= 1e-6


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
    assert (model(ids).logits - live.eval()(ids).logits).abs().max() <= 1e-6


# ------------------------------------------------------------------------------------------------------------ the base


def save_again(base: Path, folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, **how: Any) -> str:
    """The base saved once more, changed or not: the fingerprint of that."""
    model = AutoModelForCausalLM.from_pretrained(base)
    state = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    if change:
        change(state)
    if how:
        model.save_pretrained(folder, **how)
    else:
        folder.mkdir()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(base / "config.json", folder)
    return base_fingerprint(str(folder))


def test_the_fingerprint_is_that_of_the_tensors(bases: dict[str, Path], tmp_path: Path) -> None:
    base, name = bases["gpt2"], "transformer.h.1.mlp.c_fc.weight"
    own = base_fingerprint(str(base))
    assert own.startswith("sha256:")
    assert save_again(base, tmp_path / "shards", max_shard_size="20KB") == own
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert save_again(base, tmp_path / "same") == own
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(load_file(base / "model.safetensors"), pickled / "pytorch_model.bin")
    shutil.copy(base / "config.json", pickled)
    assert base_fingerprint(str(pickled)) == own

    def move(state: dict[str, Any]) -> None:
        state[name][-1, -1] += 1e-6  # 16 KiB, so every byte counts

    def retype(state: dict[str, Any]) -> None:
        state[name] = state[name].view(torch.int32)  # the same bytes

    def reshape(state: dict[str, Any]) -> None:
        state[name] = state[name].reshape(-1).contiguous()

    def rename(state: dict[str, Any]) -> None:
        state[name.replace("weight", "weights")] = state.pop(name)  # the order of the names stays

    changed = {change.__name__: save_again(base, tmp_path / change.__name__, change) for change in (move, retype)}
    changed |= {change.__name__: save_again(base, tmp_path / change.__name__, change) for change in (reshape, rename)}
    assert len({own, *changed.values()}) == 5, changed


def test_the_fingerprint_of_a_large_base_takes_no_time(bases: dict[str, Path], tmp_path: Path) -> None:
    """12 GB, of which a sparse file holds nothing on disk; reading all of them would take many seconds."""
    header = {
        f"layer.{i}": {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [i << 25, (i + 1) << 25]}
        for i in range(360)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, path.stat().st_size + (360 << 25))
    shutil.copy(bases["gpt2"] / "config.json", tmp_path)
    begun = time.perf_counter()
    before = base_fingerprint(str(tmp_path))
    assert time.perf_counter() - begun < 2
    with path.open("r+b") as file:  # the last bytes of a tensor count
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert base_fingerprint(str(tmp_path)) != before


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
    save_again(bases["llama"], tmp_path / "other")
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
        assert (model(ids).logits - live(ids).logits).abs().max() <= 1e-6
    assert locate_base(read_adapter(folder)).name == "a" * 40
    tokenizer.save_pretrained(cache / "models--org--base" / "snapshots" / ("a" * 40))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_bare(str(folder))[1].get_vocab() == tokenizer.get_vocab()
    shutil.rmtree(cache / "models--org--base")
    with pytest.raises(AdapterError, match="trained on org/base, which is neither a folder"):
        load_for_inference("org/adapter")


# -------------------------------------------------------------------------------------------------------- broken ones


def tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Save the adapter's tensors again, changed."""
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")


def config(folder: Path, **changed: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def base_json(folder: Path, **changed: Any) -> None:
    path = folder / "base.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def other_base(folder: Path) -> None:
    def train(state: dict[str, Any]) -> None:
        state["transformer.h.0.attn.c_attn.weight"] += 1e-3

    base = folder.parent / "base"
    state = load_file(base / "model.safetensors")
    train(state)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})


def pair_gone(state: dict[str, Any]) -> None:
    del state[A], state[A.replace("lora_A", "lora_B")]


def layer_more(state: dict[str, Any]) -> None:
    for name in (A, A.replace("lora_A", "lora_B")):
        state[name.replace("h.0", "h.7")] = state[name].clone()


# what is broken -> how, and what is said
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensor missing": (
        lambda f: tensors(f, lambda s: s.pop(A)),
        r"not whole:\n  \S+h\.0\.attn\.c_attn\.lora_A\.weight is missing, the other half of lora_B",
    ),
    "pair missing": (
        lambda f: tensors(f, pair_gone),
        r"does not fit its base .*:\n  \S+c_attn\.lora_A\.weight is missing\n  \S+c_attn\.lora_B\.weight is missing",
    ),
    "extra tensor": (
        lambda f: tensors(f, layer_more),
        r"h\.7\.attn\.c_attn\.lora_A\.weight belongs to no layer of this base",
    ),
    "a weight of the base": (
        lambda f: tensors(f, lambda s: s.update({PREFIX + "transformer.h.0.ln_1.weight": torch.ones(32)})),
        r"h\.0\.ln_1\.weight belongs to no layer of this base",
    ),
    "zero-sized": (
        lambda f: tensors(f, lambda s: s.update({A: torch.zeros(4, 0)})),
        r"lora_A\.weight has the shape \(4, 0\): it holds nothing",
    ),
    "wrong shape": (
        lambda f: tensors(f, lambda s: s.update({A: torch.zeros(4, 31)})),
        r"lora_A\.weight has the shape \(4, 31\); expected \(4, 32\)",
    ),
    "wrong rank": (
        lambda f: tensors(f, lambda s: s.update({A: torch.zeros(5, 32)})),
        r"lora_A\.weight has the shape \(5, 32\); expected rank 4 on axis 0",
    ),
    "unknown base": (
        lambda f: (f.parent / "base").rename(f.parent / "moved"),
        r"trained on \S+/base, which is neither a folder .*write its new place to name_or_path in \S+/base\.json",
    ),
    "changed base": (
        other_base,
        r"is not the base that \S+ was trained on: found the fingerprint sha256:\w+, ex",
    ),
    "cut short": (cut, r"adapter_model\.safetensors is cut short: found \d+ bytes, expected \d+"),
    "garbage": (
        lambda f: (f / "adapter_config.json").write_text("{not json", encoding="utf-8"),
        r"adapter_config\.json cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_adapters_are_refused_by_every_command(
    what: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    break_it, message = BROKEN[what]
    break_it(sound)
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text(json.dumps({"instruction": "What is 1 + 1?", "output": "2"}) + "\n", encoding="utf-8")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    commands = {
        "generate": [sound, "--input", rows, "--output", answers],
        "chat": [sound],
        "evaluate": [sound, "--data", rows],
    }
    for command, arguments in commands.items():
        monkeypatch.setattr(sys, "argv", ["instructft", command, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert ended.value.code == 2, (command, err)
        assert err.startswith("instructft: "), err
        assert re.search(message, err), err
        assert "Traceback" not in out + err
        assert str(sound.parent) in err
    assert not answers.exists()


# found without the base, by whoever reads the folder
UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "pickled weights .* save it again",
    ),
    "longer": (
        lambda f: (f / "adapter_model.safetensors").open("ab").write(b"x"),
        "is longer than its header says: found",
    ),
    "no header": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 50), "cut short or no safetensors"),
    "no tensors": (lambda f: tensors(f, lambda s: s.clear()), "holds no tensors at all"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "found list, expected a JSON object"),
    "another method": (lambda f: config(f, peft_type="IA3"), "peft_type: found 'IA3', expected 'LORA'"),
    "another task": (lambda f: config(f, task_type="SEQ_CLS"), "task_type: found 'SEQ_CLS', expected 'CAUSAL_LM'"),
    "no rank": (lambda f: config(f, r="4"), "rank of .*: found '4', expected a whole number"),
    "bad pattern": (lambda f: config(f, rank_pattern={"(": 3}), "rank_pattern cannot be read"),
    "no magnitudes": (lambda f: config(f, use_dora=True), r"lora_magnitude_vector is missing, though"),
    "no rows": (lambda f: config(f, trainable_token_indices=[1, 2]), "missing: the rows of 2 trained tokens"),
    "another number of rows": (
        lambda f: (
            config(f, trainable_token_indices=[1, 2]),
            tensors(f, lambda s: s.update({ROWS: torch.ones(3, 32)})),
        ),
        r"trainable_tokens_delta has 3 rows; expected 2, one for each of the trained tokens",
    ),
    "odd rows": (lambda f: config(f, trainable_token_indices=[-1]), "expected lists of row numbers"),
    "odd name": (lambda f: tensors(f, lambda s: s.update(x=torch.ones(2))), "x is no name that PEFT gives"),
    "half a record": (lambda f: (f / "base.json").write_text('{"dtype": "float32"}'), "base.json lacks commit, "),
    "way out": (lambda f: base_json(f, subfolder="../../etc"), r"base.json: subfolder: found '../../etc'"),
    "odd record": (lambda f: base_json(f, quantization="3bit"), r"base.json: quantization: found '3bit'"),
    "few rows": (lambda f: base_json(f, vocab_size=0), r"base.json: vocab_size: found 0"),
    "no base": (
        lambda f: ((f / "base.json").unlink(), config(f, base_model_name_or_path=None)),
        "does not name the base it was trained on; write its folder",
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_refused_without_the_base(what: str, sound: Path) -> None:
    break_it, message = UNREADABLE[what]
    read_adapter(sound)
    break_it(sound)
    assert is_adapter(sound)
    with pytest.raises(AdapterError, match=message):
        locate(str(sound))


def test_attach_itself_is_strict(sound: Path) -> None:
    """Also for a caller that brings a base of its own and checks nothing before."""
    tensors(sound, pair_gone)
    adapter = read_adapter(sound)
    with pytest.raises(AdapterError, match=r"lora_A\.weight is missing\n.*lora_B\.weight is missing$"):
        attach(load_base(adapter), adapter)
    with pytest.raises(AdapterError, match=r"lora_A\.weight is missing"):
        check_fit(adapter, locate_base(adapter))


def test_more_than_three_problems_are_counted(sound: Path) -> None:
    tensors(sound, lambda s: [s.pop(name) for name in list(s) if "lora_B" in name])
    with pytest.raises(AdapterError, match=r"lora_B.weight is missing[^\n]*\n  and 5 more$"):
        read_adapter(sound)


def test_nan_and_what_peft_did_not_load(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read_adapter(sound)
    monkeypatch.setattr("peft.set_peft_model_state_dict", lambda *a, **k: None)
    with pytest.raises(ModelError, match=r"PEFT did not load .* as it is in the file"):
        attach(load_base(adapter), adapter)
    tensors(sound, lambda s: s[A].fill_(float("nan")))
    with pytest.raises(AdapterError, match=r"lora_A\.weight holds NaN or infinity"):
        load_bare(str(sound))


def test_a_base_that_is_an_adapter_or_has_too_few_rows(sound: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(sound / "adapter_config.json", tmp_path / "base")
    with pytest.raises(AdapterError, match="holds an adapter itself; merge that one first"):
        load_bare(str(sound))
    (tmp_path / "base" / "adapter_config.json").unlink()
    rows = json.loads((bases["gpt2"] / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    folder, *_ = make_adapter(bases["gpt2"], tmp_path / "tokens", new=True)
    base_json(folder, vocab_size=rows)  # less than the rows that were trained
    with pytest.raises(AdapterError, match=r"base.json: vocab_size: found \d+, which is not what instructft writes"):
        read_adapter(folder)


def test_half_a_base_is_refused(sound: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-64])
    with pytest.raises(ModelError, match=r"model.safetensors is cut short"):
        load_bare(str(sound))
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load_bare(str(sound))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"names ../model-2.safetensors, which is no file in its folder"):
        load_bare(str(sound))


def test_headers_that_lie(tmp_path: Path) -> None:
    for header, message in (
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "does not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "does not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "header cannot be read"),
        ([1], "header cannot be read"),
    ):
        text = json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(ModelError, match=message):
            read_header(tmp_path / "x.safetensors")


# ----------------------------------------------------------------------------------------------------------- quantized


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_a_quantized_base_comes_as_it_was_in_training(
    how: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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
        near = (model(ids).logits - live(ids).logits).abs().mean() / live(ids).logits.abs().mean()
    assert 1e-4 < near < 0.5
    monkeypatch.setattr(quantization, "trouble_with", lambda *_: "is not installed")
    capfd.readouterr()
    model, _ = load_for_inference(str(folder))
    assert f"{how} weights through bitsandbytes, which is not installed: the base is loaded unquantized" in (
        capfd.readouterr().err
    )
    assert (model(ids).logits - live(ids).logits).abs().max() <= 1e-6


# -------------------------------------------------------------------------------------------------- base beside tuned


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the command `evaluate` on three rows: its results."""
    rows, results = tmp_path / "rows.jsonl", tmp_path / "results.json"
    found = [{"instruction": f"What is {i} + 1?", "output": f"{i + 1}."} for i in range(3)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    original = compare_module.evaluate
    monkeypatch.setattr(compare_module, "evaluate", lambda *a, **k: original(*a, **k, max_new_tokens=8))

    def run(folder: Path, *options: Any) -> dict[str, Any]:
        arguments = ["instructft", "evaluate", folder, "--data", rows, "--json", results, *options]
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
        assert results[side]["loss"] == pytest.approx(expected["loss"], abs=1e-6), side
        for found, row in zip(results[side]["rows"], expected["rows"], strict=True):
            assert found.pop("dataset").endswith("rows.jsonl")  # which rows in memory do not have
            assert found == {**row, "nll": pytest.approx(row["nll"], abs=1e-5)}, side
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
