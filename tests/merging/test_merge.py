"""A merged model is the adapted one: in value, in form, after a kill, and not at all when it would be wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from instructft import merge_adapter
from instructft.adapters.attach import read_adapter
from instructft.errors import AdapterError, InstructftError, ModelError, UsageError
from instructft.merging import arithmetic, merge, proof, proof_texts
from instructft.merging.plan import make_plan
from instructft.weights import tensor_io

QUIET = Console(quiet=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"0.*attn.*proj": 2}, "alpha_pattern": {"1.mlp.*": 5}},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [3, 7, 1480]},
    "saved": {"modules_to_save": ["norm", "ln_f"]},
    "biases": {"bias": "all"},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is merged in several pieces, of a number of rows that divides nothing."""
    monkeypatch.setattr(tensor_io, "PIECE", 7 * 32)


def make_base(
    folder: Path, kind: str, dtype: str = "float32", tied: bool = True, shards: str = "5GB", width: int = 32
) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=1490, tie_word_embeddings=tied, **sizes))
    else:
        sizes = {
            "hidden_size": width,
            "intermediate_size": width * 3 // 2,
            "num_hidden_layers": 2,
            "max_position_embeddings": 128,
        }
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "bos_token_id": 0}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1490, tie_word_embeddings=tied, eos_token_id=0, **sizes))
    for parameter in model.parameters():  # biases that are zero would hide a mistake
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shards)
    return folder


def make_adapter(folder: Path, base: Path, rows: int = 1490, **options: Any) -> Path:
    """Every weight of the adapter is random: with zeros in it a wrong merge could pass."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from instructft.adapters.attach import record_base
    from instructft.adapters.new_tokens import fit_embeddings

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fit_embeddings(model, rows)
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    source = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            size = 0.02 if "magnitude" in name else 0.1
            parameter.data += torch.randn(parameter.shape, generator=source) * size
    adapted.save_pretrained(folder, save_embedding_layers=False)
    record_base(
        folder,
        name_or_path=str(base),
        revision=None,
        subfolder=None,
        vocab_size=rows,
        quantization="none",
        dtype="float32",
    )
    return folder


def logits_of(model: Any) -> Any:
    import torch

    ids = torch.arange(5, 1485, 37).reshape(2, -1)  # (2, 20)
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


def live(adapter: Path, base: Path) -> Any:
    """The adapter on its base in float32, as it is used without a merge."""
    import torch
    from transformers import AutoModelForCausalLM

    from instructft.adapters.attach import attach

    return attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), read_adapter(adapter))


def load_whole(folder: Path) -> Any:
    """The merged model in float32, as anybody loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------------------------
# The merged model is the adapted one
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("options", CONFIGS)
def test_a_merge_equals_the_live_adapter(kind: str, options: str, tmp_path: Path) -> None:
    tied = kind == "gpt2"
    base = make_base(tmp_path / "base", kind, tied=tied, shards="60KB")
    adapter = make_adapter(tmp_path / "adapter", base, **CONFIGS[options])
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    model = load_whole(tmp_path / "out")
    expected = logits_of(live(adapter, base))
    assert (logits_of(model) - expected).abs().max() < 1e-5
    assert (logits_of(load_whole(base)) - expected).abs().max() > 1e-2
    assert is_tied(model) is tied


@pytest.mark.parametrize("options", ["lora", "dora"])
def test_a_bfloat16_merge_is_the_nearest_there_is(options: str, tmp_path: Path) -> None:
    """Each merged value is the exact one rounded once; PEFT, which rounds twice, is further away."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False)
    adapter = make_adapter(tmp_path / "adapter", base, **CONFIGS[options])
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter, autocast_adapter_dtype=False
    )
    exact = exact.double().merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    theirs = PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    off = {"ours": 0.0, "peft": 0.0}
    for name, value in exact.items():
        assert ours[name].dtype == torch.bfloat16
        unit = proof_unit(value.float())
        assert ((ours[name].double() - value).abs() <= 0.5001 * unit + 1e-7).all(), name
        off["ours"] += float((ours[name].double() - value).abs().sum())
        off["peft"] += float((theirs[name].double() - value).abs().sum())
    assert off["ours"] < 0.95 * off["peft"]


def proof_unit(values: Any) -> Any:
    import torch

    from instructft.merging.weight_proof import unit_in_last_place

    return unit_in_last_place(values, torch.bfloat16)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_new_tokens_are_in_the_merged_model_and_nowhere_else(kind: str, tied: bool, tmp_path: Path) -> None:
    import torch

    base = make_base(tmp_path / "base", kind, "bfloat16", tied=tied, shards="60KB")
    names = ["wte" if kind == "gpt2" else "embed_tokens", *([] if tied else ["lm_head"])]
    tokens = {name: [1490, 1492] for name in names}
    adapter = make_adapter(tmp_path / "adapter", base, rows=1493, trainable_token_indices=tokens)
    merge_adapter(adapter, tmp_path / "out", verify=False, dtype="float32", console=QUIET)
    model, expected = load_whole(tmp_path / "out"), live(adapter, base)
    assert (logits_of(model) - logits_of(expected)).abs().max() < 1e-5
    assert is_tied(model) is tied
    rows = model.get_input_embeddings().weight.data
    before = load_whole(base).get_input_embeddings().weight.data
    assert rows.shape[0] == model.config.vocab_size == logits_of(model).shape[-1] == 1493
    assert torch.equal(rows[:1490], before)
    assert torch.allclose(rows[1491], before.mean(dim=0), atol=1e-6)  # new, and not trained
    assert (rows[1490] - before.mean(dim=0)).abs().max() > 1e-2


def test_one_shard_and_five_are_the_same_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    merge_adapter(adapter, tmp_path / "one", verify=False, console=QUIET)
    planned = [output.planned for output in _plan(adapter, base).outputs.values()]
    size = next(size for size in range(10_000, 400_000, 1000) if len(tensor_io.shards(planned, size)) == 5)
    merge_adapter(adapter, tmp_path / "five", verify=False, max_shard_size=f"{size}B", console=QUIET)
    assert [name for name in files_in(tmp_path / "one") if "safetensors" in name] == ["model.safetensors"]
    found = sorted(name for name in files_in(tmp_path / "five") if "safetensors" in name)
    assert found == [*(f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)), "model.safetensors.index.json"]
    one, five = load_whole(tmp_path / "one").state_dict(), load_whole(tmp_path / "five").state_dict()
    assert one.keys() == five.keys()
    assert all((one[name] == five[name]).all() for name in one)


def _plan(adapter: Path, base: Path) -> Any:
    from instructft.adapters.attach import read_adapter
    from instructft.merging.plan import make_plan

    return make_plan(base, tensor_io.read_checkpoint(base), adapter, read_adapter(adapter).shapes, 0, None)


def test_names_of_a_checkpoint_without_the_prefix_stay_as_they_are(tmp_path: Path) -> None:
    """GPT-2's first checkpoints hold `h.0…`, not `transformer.h.0…`."""
    from transformers import AutoModelForCausalLM

    whole = make_base(tmp_path / "whole", "gpt2")
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.transformer.save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **CONFIGS["tokens"])
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert "h.0.attn.c_attn.weight" in tensor_io.read_checkpoint(tmp_path / "out")
    merged = load_whole(tmp_path / "out")
    assert (logits_of(merged) - logits_of(live(adapter, tmp_path / "base"))).abs().max() < 1e-5
    assert is_tied(merged)


def test_a_base_of_pickled_weights(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = make_base(tmp_path / "base", "gpt2")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    adapter = make_adapter(tmp_path / "adapter", base)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert (logits_of(load_whole(tmp_path / "out")) - logits_of(live(adapter, base))).abs().max() < 1e-5


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(("target", "use_dora"), [("embed_tokens", False), ("lm_head", False), ("lm_head", True)])
def test_weights_that_training_made_differ_are_tied_no_more(target: str, use_dora: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tied=True)
    options = {"target_modules": ["q_proj", target], "use_dora": use_dora}
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    facts = merge_adapter(adapter, tmp_path / "out", console=QUIET).facts
    model = load_whole(tmp_path / "out")
    assert not is_tied(model)
    assert model.config.tie_word_embeddings is False
    assert (logits_of(model) - logits_of(live(adapter, base))).abs().max() < 1e-5
    assert facts["proof"]["weights"] is None  # PEFT's own merge would change both
    assert facts["proof"]["source"] == "random token ids"  # neither adapter nor base has a tokenizer


@pytest.mark.parametrize("use_dora", [True, False])
def test_adapted_embeddings_of_an_untied_model(use_dora: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tied=False)
    options = {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3, "use_dora": use_dora}
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert (logits_of(load_whole(tmp_path / "out")) - logits_of(live(adapter, base))).abs().max() < 1e-5


def test_lora_bias_goes_into_the_bias(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn", "c_fc"], lora_bias=True)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert (logits_of(load_whole(tmp_path / "out")) - logits_of(live(adapter, base))).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# The proof
# --------------------------------------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_texts, "ANSWER", 4)
    monkeypatch.setattr(proof_texts, "FIXED", proof_texts.FIXED[:3])
    monkeypatch.setattr(proof_texts, "ROWS", 3)


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", "float32"), ("llama", "bfloat16"), ("llama", "float16")])
def test_a_right_merge_is_proved(kind: str, dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    base = make_base(tmp_path / "base", kind, dtype, tied=kind == "gpt2")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base, use_dora=kind == "llama"), tokenizer)
    facts = merge_adapter(adapter, tmp_path / "out", console=QUIET).facts
    found = facts["proof"]
    assert facts["dtype"] == dtype
    assert found["difference"] <= found["tolerance"] < found["effect"] / 5
    assert found["weights"] == {"tensors": 8 if kind == "gpt2" else 14}
    assert found["tokens"] == 3 * 4
    if dtype == "float32":
        assert found["difference"] < 1e-5
        assert found["equal_tokens"] == found["tokens"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["merge"] == json.loads(json.dumps(facts))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{found['difference']:.2e}" in card
    assert f"{found['equal_tokens']} of {found['tokens']}" in card


WRONG: dict[str, Callable[[Any, Any], Any]] = {
    "the delta is forgotten": lambda weight, right: weight.source.read().float(),
    "the scale is twice too large": lambda weight, right: 2 * right - weight.source.read().float(),
    "the delta has the wrong sign": lambda weight, right: 2 * weight.source.read().float() - right,
    "a twentieth of the delta is missing": lambda weight, right: right - (right - weight.source.read().float()) / 20,
}


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("by", ["weights", "logits"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_merge_is_refused(
    wrong: str, by: str, whole: bool, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    dtype = "float32" if "twentieth" in wrong and by == "logits" else "bfloat16"
    base = make_base(tmp_path / "base", "llama", dtype, tied=False)
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    read = arithmetic._Weight.read

    def miscalculated(self: Any, start: int, stop: int) -> Any:
        return WRONG[wrong](self, read(self, 0, self.rows))[start:stop]

    monkeypatch.setattr(arithmetic._Weight, "read", miscalculated)
    if not whole:
        machine = proof.Machine("cpu", getattr(torch, dtype), whole=False)
        monkeypatch.setattr(proof, "choose_machine", lambda *_: machine)
    if by == "logits":
        monkeypatch.setattr(proof, "compare_weights", lambda *_: {"tensors": 0})
    with pytest.raises(ModelError, match="not merged as PEFT" if by == "weights" else "is not the adapted one"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)
    assert files_in(tmp_path) == {"base", "adapter"}


def test_a_transposed_delta_is_refused(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's `c_proj` of the attention is square: only its values tell."""
    import torch

    base = make_base(tmp_path / "base", "gpt2")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base, target_modules=["attn.c_proj"]), tokenizer)

    def transposed(self: Any, start: int, stop: int) -> Any:
        whole = self.source.read().float() + (self.b @ self.a) * self.edit.lora.scaling
        return whole[start:stop]

    monkeypatch.setattr(arithmetic._Weight, "read", transposed)
    with pytest.raises(ModelError, match="is not merged as PEFT merges it"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)
    monkeypatch.undo()
    torch.manual_seed(0)
    assert merge_adapter(adapter, tmp_path / "out", console=QUIET).facts["proof"]["difference"] < 1e-5


def test_without_a_proof_the_card_says_so(tmp_path: Path, tokenizer: Any) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert "not verified" in (tmp_path / "out" / "README.md").read_text()
    assert "proof" not in json.loads((tmp_path / "out" / "run.json").read_text())["merge"]


def free_memory(found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    little = psutil.virtual_memory()._replace(available=found)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("gpt2", "float32", "lora"),
        ("gpt2", "float32", "tokens"),
        ("llama", "bfloat16", "dora"),
        ("llama", "float16", "saved"),
    ],
)
def test_a_model_larger_than_the_memory_is_proved_alike(
    kind: str, dtype: str, options: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures, or nearly so where rounding is drawn anew, from files that are mapped."""
    import torch

    base = make_base(tmp_path / "base", kind, dtype, tied=kind == "gpt2")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base, **CONFIGS[options]), tokenizer)
    found = []
    for is_whole in (True, False):
        machine = proof.Machine("cpu", getattr(torch, dtype), is_whole)
        monkeypatch.setattr(proof, "choose_machine", lambda *_, machine=machine: machine)
        found.append(merge_adapter(adapter, tmp_path / str(is_whole), console=QUIET).facts["proof"])
    whole, mapped = found
    assert mapped["compared"] == "most likely next tokens"
    assert mapped["tokens"] > whole["tokens"]
    assert mapped["weights"] == whole["weights"]
    for figure in ("scale", "effect", "rounding"):
        assert mapped[figure] == pytest.approx(whole[figure], rel=0.5), figure
    assert mapped["difference"] <= mapped["tolerance"] < mapped["effect"] / 5


@pytest.mark.usefixtures("short_answers")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_larger_than_the_memory_stays_in_its_files(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a model is looked at, its weights are the files' own pages, which the system can let go."""
    import torch

    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False, shards="100KB")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    looks, held, look_once = [], [], proof.look_once

    def spy(model: Any, *arguments: Any, **more: Any) -> Any:
        mapped = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        places = [[int(end, 16) for end in m[0].split("-")] for m in mapped if m[-1].endswith(".safetensors")]
        weights = [p for name, p in model.named_parameters() if "lora" not in name]
        looks.append([any(start <= p.data_ptr() < end for start, end in places) for p in weights])
        held.append([p.detach().clone() for p in weights])
        return look_once(model, *arguments, **more)

    machine = proof.Machine("cpu", torch.bfloat16, whole=False)
    monkeypatch.setattr(proof, "choose_machine", lambda *_: machine)
    monkeypatch.setattr(proof, "look_once", spy)
    merge_adapter(adapter, tmp_path / "out", console=QUIET)
    assert len(looks) == 4  # the adapter, its base, rounded, merged
    assert all(len(weights) > 20 and all(weights) for weights in looks)
    # a page that is written to is the process's own: after PEFT merged each layer no bit may be another
    assert all(torch.equal(before, after) for before, after in zip(held[0], held[2], strict=True))


def test_where_a_proof_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    base = make_base(tmp_path / "base", "llama", "bfloat16")
    adapter = read_adapter(make_adapter(tmp_path / "adapter", base))
    plan = make_plan(base, tensor_io.read_checkpoint(base), adapter.folder, adapter.shapes, 1490, None)
    parameters = sum(weight.numel() for weight in plan.model.parameters())
    held = proof.in_memory(plan, torch.bfloat16)
    assert 5 * 4 * 1490 * 32 <= held < 5 * 4 * 1490 * 32 + 1000  # the largest weight
    for room, expected in (
        (parameters * 4 * 1.15, ("float32", True)),
        (parameters * 4 * 1.15 - 1, ("bfloat16", True)),
        (parameters * 2 * 1.15 - 1, None),  # so small that its largest weight does not fit beside
    ):
        free_memory(int(room) + 1 + (1 << 30), monkeypatch)
        if expected is None:
            with pytest.raises(UsageError, match="--no-verify"):
                proof.choose_machine(plan, torch.bfloat16)
            free_memory(held + (1 << 30), monkeypatch)
            monkeypatch.setattr(plan.model, "parameters", lambda: [torch.empty(1 << 40, device="meta")])
            expected = ("bfloat16", False)
        found = proof.choose_machine(plan, torch.bfloat16)
        assert (str(found.dtype).removeprefix("torch."), found.whole) == expected
    wider = make_plan(base, tensor_io.read_checkpoint(base), adapter.folder, adapter.shapes, 1490, torch.float32)
    assert proof.in_memory(wider, torch.float32) == held + parameters * 4  # loading changes every weight


def test_a_model_that_does_not_fit_in_memory_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base)
    free_memory(1 << 20, monkeypatch)
    with pytest.raises(UsageError, match="--no-verify"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)
    assert files_in(tmp_path) == {"base", "adapter"}


@pytest.mark.usefixtures("short_answers", "cpu")
def test_a_quantized_run_merges_into_the_plain_base(tmp_path: Path, tokenizer: Any) -> None:
    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False, width=128)
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    record = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps({**record, "quantization": "4bit"}))
    facts = merge_adapter(adapter, tmp_path / "out", measure_quantized=True, console=QUIET).facts
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts["quantized"]["quantization"] == "4bit"
    # four bits are far coarser than the rounding of the merge, and nearer to it than no adapter at all
    assert facts["proof"]["difference"] < facts["quantized"]["difference"] < facts["proof"]["effect"]
    assert "4bit base" in (tmp_path / "out" / "README.md").read_text()


# --------------------------------------------------------------------------------------------------------------------
# What goes along, and back to use
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_answers")
def test_a_merged_model_is_used_like_any_other(tmp_path: Path, tokenizer: Any, write_recipe: Any) -> None:
    from instructft.inference.chat import Generator, generate, load_for_inference
    from instructft.recipe.schema import load_recipe

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


def test_a_checkpoint_of_a_run_brings_the_papers_of_the_run(tmp_path: Path, tokenizer: Any) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    run = with_tokenizer(tmp_path / "run", tokenizer)
    checkpoint = make_adapter(run / "checkpoint-4", base)
    (checkpoint / "base.json").rename(run / "base.json")
    (run / "run.json").write_text('{"seed": 7}')
    merge_adapter(checkpoint, tmp_path / "out", verify=False, console=QUIET)
    assert {"tokenizer.json", "chat_template.jinja"} <= files_in(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed"] == 7


# --------------------------------------------------------------------------------------------------------------------
# Refused, and nothing written
# --------------------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "instructft", "merge", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command_refuses_with_exit_2_and_writes_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    made = command(adapter, tmp_path / "out")
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


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = make_base(tmp_path / "base", "gpt2")
    return base, make_adapter(tmp_path / "adapter", base)


def refused(adapter: Path, match: str, error: type[InstructftError] = InstructftError, **options: Any) -> None:
    out = adapter.parent / "out"
    with pytest.raises(error, match=match) as caught:
        merge_adapter(adapter, out, console=QUIET, **options)
    assert caught.value.exit_code == 2
    assert files_in(adapter.parent) == {"base", "adapter"}


def rewrite(adapter: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    found = load_file(adapter / "adapter_model.safetensors")
    change(found)
    save_file(found, adapter / "adapter_model.safetensors")


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("ensure_weight_tying", True),
        ("a_later_option_of_peft", {"on": True}),
    ],
)
def test_options_without_a_proved_merge_are_refused_by_name(pair: tuple[Path, Path], key: str, value: Any) -> None:
    _, adapter = pair
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    refused(adapter, key, UsageError)


def test_weights_that_loading_puts_together_are_refused(tmp_path: Path) -> None:
    """Qwen2-MoE's checkpoints hold every expert alone; transformers 5 stacks them, and an adapter may target that."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=1490, num_local_experts=2, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensor_io.read_checkpoint(tmp_path / "base")
    attention = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    merge_adapter(attention, tmp_path / "out", verify=False, console=QUIET)
    assert (logits_of(load_whole(tmp_path / "out")) - logits_of(live(attention, tmp_path / "base"))).abs().max() < 1e-5
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(attention)
    make_adapter(attention, tmp_path / "base", target_modules=[], target_parameters=["experts.gate_up_proj"])
    refused(attention, "target_parameters", UsageError)


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


def test_a_dtype_too_small_for_the_weights_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base)
    rewrite(adapter, lambda found: [tensor.mul_(1e4) for tensor in found.values()])
    with pytest.raises(ModelError, match="not a number in float16"):
        merge_adapter(adapter, tmp_path / "out", verify=False, dtype="float16", console=QUIET)
    assert files_in(tmp_path) == {"base", "adapter"}


# --------------------------------------------------------------------------------------------------------------------
# Killed
# --------------------------------------------------------------------------------------------------------------------

POINTS = 10


@contextlib.contextmanager
def counted(kill_at: int) -> Iterator[list[int]]:
    """Counts what reaches the disk: writes, flushes, renames; kills this process at one of them."""
    calls = [0]
    originals = (tensor_io._write, os.fsync, os.rename)

    def wrap(original: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == kill_at:
                if half:  # killed in the middle of a write
                    file, data = arguments
                    file.write(memoryview(data)[: len(data) // 2])
                    file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return call

    tensor_io._write, os.fsync, os.rename = wrap(originals[0], half=True), wrap(originals[1]), wrap(originals[2])
    try:
        yield calls
    finally:
        tensor_io._write, os.fsync, os.rename = originals


def driver(folder: Path) -> None:
    """In a process of its own: for each kill point a child that merges and dies; then a merge that lives."""
    import torch

    torch.set_num_threads(1)
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"

    def run(target: Path, kill_at: int) -> int:
        with counted(kill_at) as calls:
            merge_adapter(adapter, target, verify=False, max_shard_size="100KB", console=QUIET)
        return calls[0]

    total = run(folder / "whole", 0)
    right = load_whole(folder / "whole").state_dict()
    wrong_folders, complete = 0, 0
    for i in range(POINTS):
        kill_at = 1 + i * (total - 1) // (POINTS - 1)  # the first call, the last, and eight between
        child = os.fork()
        if not child:
            run(out, kill_at)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), (kill_at, total)
        assert os.WTERMSIG(status) == signal.SIGKILL
        left = [path for path in folder.iterdir() if path.name.startswith("out")]
        assert len(left) == 1, left
        try:
            found = load_whole(left[0]).state_dict()
        except Exception:
            wrong_folders += out.exists()  # under its own name it must load
        else:
            complete += 1
            wrong_folders += any(not torch.equal(found[name], right[name]) for name in right)
        if out.exists():
            shutil.rmtree(out)
    run(out, 0)
    again = load_whole(out).state_dict()
    same = all(torch.equal(again[name], right[name]) for name in right)
    left_over = [path.name for path in folder.iterdir() if "partial" in path.name]
    assert base.is_dir()
    result = {"calls": total, "wrong": wrong_folders, "complete": complete, "same": same, "left": left_over}
    print("RESULT " + json.dumps(result))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kill points are children by fork")
def test_a_killed_merge_leaves_nothing_that_is_wrong(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2", shards="100KB")
    make_adapter(tmp_path / "adapter", base, **CONFIGS["tokens"])
    made = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    line = next((line for line in made.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line, made.stdout[-2000:] + made.stderr[-4000:]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["calls"] > 40
    assert result["wrong"] == 0
    assert result["complete"] < POINTS / 2  # most points lie where the folder cannot be loaded yet
    assert result["same"]
    assert result["left"] == []


def test_a_merge_that_is_still_running_is_left_alone(pair: tuple[Path, Path]) -> None:
    pytest.importorskip("fcntl")
    from instructft.checkpoints.atomic import partial_folder

    _, adapter = pair
    out = adapter.parent / "out"
    with partial_folder(out) as theirs:
        (theirs / "config.json").write_text("{}")
        with partial_folder(out) as ours:
            (ours / "config.json").write_text("[]")
        assert theirs.is_dir()
        (out / "config.json").unlink()  # so that the other may take the place
    assert (out / "config.json").read_text() == "{}"


if __name__ == "__main__":
    driver(Path(sys.argv[1]))
