"""Estimates beside the real thing: parameters, tensors that live in a step, optimizer state, steps, peak memory."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import instructft
from instructft.data.prepare import prepare
from instructft.errors import UsageError
from instructft.models.fake_step import Batch, MemoryTracker
from instructft.models.memory import (
    duration,
    largest_batch,
    last_speed,
    memory,
    optimizer_bytes,
    resident,
    steps,
)
from instructft.models.starting_point import starting_point
from instructft.recipe.load import load_recipe
from instructft.recipe.schema import AdapterSection
from tests.helpers.processes import python

REPO = Path(__file__).resolve().parents[2]


MIB = 1 << 20


SHAPES = {
    "gpt2": "n_layer: 2, n_head: 2, n_embd: 32, n_positions: 256",
    "llama": "num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2",
    "qwen2": "num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, "
    "num_key_value_heads: 1, tie_word_embeddings: true",
    "gpt_neox": "num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2",
    "opt": "num_hidden_layers: 2, hidden_size: 32, word_embed_proj_dim: 32, ffn_dim: 64, num_attention_heads: 2",
}


ARGS = SimpleNamespace(bf16=False, fp16=False, gradient_checkpointing=False, optim="adamw_torch_fused")


def estimated(
    kind: str, batch: Batch, *overrides: str, adapter: str = "none", args: Any = ARGS, device: str = "cpu", **rest: Any
) -> Any:
    config = f"model.config={{model_type: {kind}, {SHAPES[kind]}}}"
    recipe = load_recipe("quickstart", [config, *overrides])
    # a recipe with an adapter over random weights is refused; its shapes are as good as any
    lora = load_recipe("quickstart", ["model={name_or_path: org/name}", f"adapter={adapter}"]).adapter
    recipe = recipe.model_copy(update={"adapter": lora})
    tokenizer = instructft.load_tokenizer(recipe)
    return memory(recipe, starting_point(recipe, tokenizer), batch, args, device, **rest), recipe, tokenizer


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_parameters_and_activations_are_those_of_a_real_step(kind: str, attention: str) -> None:
    batch = Batch(3, 64, 100)
    found, recipe, tokenizer = estimated(kind, batch, f"model.attn_implementation={attention}")
    model = instructft.load_model(recipe, tokenizer).train()
    assert found["parameters"] == {"all": model.num_parameters(), "trainable": model.num_parameters()}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert found["memory"]["weights"] == 4 * model.num_parameters() + buffers
    gc.collect()
    with MemoryTracker([*model.parameters(), *model.buffers()]) as tracker:
        out = model.base_model(input_ids=torch.zeros(3, 64, dtype=torch.long), use_cache=False).last_hidden_state
        out.backward(torch.ones_like(out))
    real = tracker.peak(without=[p.grad for p in model.parameters() if p.grad is not None])
    assert found["exact"] == {"activations": True, "optimizer": True}
    assert found["memory"]["activations"] == pytest.approx(real, rel=0.15)


def test_adapters_are_counted_as_peft_counts_them() -> None:
    from peft import LoraConfig, get_peft_model

    for kind, more in (
        ("gpt2", ""),
        ("llama", ", use_dora: true"),
        ("gpt_neox", ", target_modules: [query_key_value]"),
    ):
        adapter = f"{{type: lora, r: 4{more}}}"
        found, recipe, tokenizer = estimated(kind, Batch(2, 16, 10), adapter=adapter)
        model = instructft.load_model(recipe.model_copy(update={"adapter": AdapterSection()}), tokenizer)
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **recipe.adapter.peft_kwargs()))
        trainable, everything = peft.get_nb_trainable_parameters()
        assert found["parameters"] == {"all": everything, "trainable": trainable}
        assert found["memory"]["gradients"] == 4 * trainable
        assert found["memory"]["optimizer"] == 8 * trainable
        assert found["exact"]["activations"] is True


def test_an_adapter_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="adapter"):
        estimated("gpt2", Batch(2, 16, 10), adapter="{type: lora, target_modules: [no_such_module]}")


def test_what_changes_the_memory() -> None:
    batch = Batch(4, 128, 200)
    plain = estimated("gpt2", batch)[0]["memory"]
    checkpointing = SimpleNamespace(**{**vars(ARGS), "gradient_checkpointing": True})
    assert estimated("gpt2", batch, args=checkpointing)[0]["memory"]["activations"] < 0.7 * plain["activations"]
    no_dropout = "model.config.attn_pdrop=0.0"
    fused = estimated("gpt2", batch, no_dropout)[0]["memory"]["activations"]
    assert fused < plain["activations"]  # sdpa on a CPU keeps the scores when it must drop some
    assert estimated("gpt2", batch, device="cuda")[0]["memory"]["activations"] == fused  # kernels there do not
    eager = estimated("gpt2", batch, no_dropout, "model.attn_implementation=eager")[0]["memory"]["activations"]
    assert eager > fused
    assert estimated("gpt2", batch, processes=2)[0]["memory"]["communication"] == plain["gradients"]
    half = estimated("gpt2", batch, "model.dtype=bfloat16")[0]["memory"]
    assert half["weights"] < 0.55 * plain["weights"]
    assert half["optimizer"] == plain["optimizer"] / 2
    lora, recipe, tokenizer = estimated("llama", batch, adapter="lora")
    quantized = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "4bit"})})
    assert (
        memory(quantized, starting_point(recipe, tokenizer), batch, ARGS, "cpu")["memory"]["weights"]
        < lora["memory"]["weights"]
    )  # type: ignore[arg-type]
    again = estimated("gpt2", batch, accumulates=True)[0]["memory"]
    assert again["total"] - again["framework"] > plain["total"] - plain["framework"]
    for parts in (plain, half):
        assert parts["total"] <= sum(size for name, size in parts.items() if name != "total")


def test_float32_copies_take_eighteen_bytes_a_weight() -> None:
    """2 of the weight, 4 of its copy, 4 of the gradient, 8 of AdamW's state; with DDP 2 of the gradient at first."""
    batch, copies = Batch(4, 128, 200), ("model.dtype=bfloat16", "train.float32_copies=true")
    half = estimated("llama", batch, "model.dtype=bfloat16", device="cuda")[0]
    found = estimated("llama", batch, *copies, device="cuda")[0]
    count, parts = found["parameters"]["all"], found["memory"]
    assert (parts["float32_copies"], parts["gradients"], parts["optimizer"]) == (4 * count, 4 * count, 8 * count)
    assert parts["weights"] == half["memory"]["weights"]
    assert "float32_copies" not in half["memory"]
    assert parts["activations"] == pytest.approx(half["memory"]["activations"], rel=0.05)
    least = sum(parts[name] for name in ("weights", "float32_copies", "gradients", "optimizer"))
    assert parts["total"] >= least + parts["framework"]
    assert parts["total"] - half["memory"]["total"] >= 8 * count  # gradients and activations take turns
    both = estimated("llama", batch, *copies, device="cuda", processes=2)[0]["memory"]
    assert both["gradients"] == both["communication"] == 2 * count
    tiny = estimated("llama", Batch(1, 2, 2), *copies, device="cuda", processes=2)[0]["memory"]
    in_step = tiny["total"] - sum(
        size for name, size in tiny.items() if name not in ("total", "activations", "gradients")
    )
    assert in_step == 6 * count  # as the optimizer takes its step they are there in both types


def test_what_a_strategy_divides() -> None:
    batch = Batch(4, 128, 200)

    def parts(strategy: str) -> Any:
        return estimated("llama", batch, device="cuda", processes=4, strategy=strategy, base=0)[0]

    ddp, zero2, zero3, fsdp2 = map(parts, ("ddp", "zero2", "zero3", "fsdp2"))
    assert fsdp2 == zero3
    assert zero2["memory"]["weights"] == ddp["memory"]["weights"]
    for part in ("gradients", "optimizer"):
        assert zero2["memory"][part] == fsdp2["memory"][part] == ddp["memory"][part] // 4
    assert fsdp2["memory"]["weights"] == ddp["memory"]["weights"] // 4
    # a shape of two blocks: all of it is gathered while it works
    assert fsdp2["memory"]["communication"] == pytest.approx(ddp["memory"]["weights"], rel=0.02)
    saving = ddp["memory"]["weights"] + ddp["memory"]["optimizer"]
    assert fsdp2["host_memory"]["first"] - ddp["host_memory"]["first"] == pytest.approx(
        saving - ddp["memory"]["weights"], rel=0.05
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps what is freed, and has a call for it")
def test_what_was_freed_is_returned(tmp_path: Path) -> None:
    """In a process of its own: where much else has run, the heap has room for some of it elsewhere."""
    (tmp_path / "program.py").write_text(FREED)
    done = python([str(tmp_path / "program.py")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200 * MIB


# Blocks with something between them that stays, as a step leaves them; glibc returns by itself only the end.
FREED = """
from instructft.models.memory import resident, return_freed
MIB = 1 << 20
large = [b"x" * (4 * MIB)]
large.clear()  # from here on blocks as large as this come from the heap
pairs = [(b"x" * (MIB + size), b"y" * (1 << 16)) for size in range(256)]
stays = [second for _, second in pairs]
pairs.clear()
before = resident()
return_freed()
print(before - resident())
"""


def test_an_architecture_that_cannot_be_traced_is_estimated_by_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = estimated("gpt_neox", Batch(4, 128, 200))[0]
    monkeypatch.setattr(
        "instructft.models.fake_step.MemoryTracker.__enter__", lambda self: (_ for _ in ()).throw(RuntimeError)
    )
    formula = estimated("gpt_neox", Batch(4, 128, 200))[0]
    assert formula["exact"]["activations"] is False
    assert formula["memory"]["activations"] == pytest.approx(traced["memory"]["activations"], rel=0.5)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_optimizer_state_is_that_of_a_real_step(name: str) -> None:
    from transformers.optimization import Adafactor

    layers = torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 128), torch.nn.LayerNorm(128))
    kinds = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    kinds |= {"rmsprop": torch.optim.RMSprop}
    parameters = list(layers.parameters())
    if name == "adafactor":
        optimizer: Any = Adafactor(parameters, scale_parameter=False, relative_step=False, lr=1e-3)
    else:
        optimizer = kinds[name](parameters, lr=1e-3)
    layers(torch.arange(8)).sum().backward()
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    real = sum(t.numel() * t.element_size() for t in tensors if t.dim() > 0)
    assert optimizer_bytes(name, parameters) == (real, True)
    assert optimizer_bytes("an_unknown_one", parameters) == (8 * sum(p.numel() for p in parameters), False)


def test_a_model_of_seven_billion_is_estimated_without_its_memory() -> None:
    shape = "num_hidden_layers: 32, hidden_size: 4096, intermediate_size: 11008, num_attention_heads: 32"
    config = f"model.config={{model_type: llama, vocab_size: 32000, max_position_embeddings: 4096, {shape}}}"
    recipe = load_recipe("quickstart", [config])
    args = SimpleNamespace(**{**vars(ARGS), "bf16": True})
    before, began = resident(), time.perf_counter()
    start = starting_point(recipe, instructft.load_tokenizer(recipe))
    found = memory(recipe, start, Batch(1, 1024, 500), args, "cuda")  # type: ignore[arg-type]
    assert found["parameters"]["all"] == 6_738_415_616
    assert found["memory"]["optimizer"] == 8 * 6_738_415_616
    assert 90 < found["memory"]["total"] / (1 << 30) < 160  # 16 bytes a parameter are 100 GiB
    assert resident() - before < 400 * MIB
    assert time.perf_counter() - began < 60


CHILD = REPO / "benchmarks" / "memory_estimate.py"


@pytest.mark.battery
def test_the_estimate_is_near_the_peak_of_a_real_run(tmp_path: Path) -> None:
    """One small run on the CPU in a process of its own; benchmarks/memory_estimate.py has the larger ones."""
    sys.path.insert(0, str(CHILD.parent))
    try:
        import memory_estimate as benchmark
    finally:
        sys.path.pop(0)
    config = "model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4, n_positions: 256"
    path = benchmark.recipe(tmp_path, config, 8, 256)
    command = [sys.executable, "-c", benchmark.CHILD, str(path), "train.max_steps=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=dict(os.environ), check=True)
    run = json.loads(done.stdout.splitlines()[-1])
    recipe = load_recipe(path)
    tokenizer = instructft.load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    found = memory(recipe, tokenizer, largest_batch(data, 8), ARGS, "cpu", base=run["base"])  # type: ignore[arg-type]
    assert found["batch"]["width"] == 256
    bare = found["memory"]["total"] - run["base"]
    assert run["peak"] - run["base"] > 400 * MIB
    assert bare == pytest.approx(run["peak"] - run["base"], rel=0.25)
    assert found["memory"]["total"] == pytest.approx(run["peak"], rel=0.15)


def fake_data(rows: int) -> Any:
    return SimpleNamespace(splits={"train": range(rows)}, tokens={"train": 10 * rows})


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.5]), st.booleans(),
    st.sampled_from([-1, 7]),
)  # fmt: skip
def test_steps_are_those_of_the_trainer(
    rows: int, batch: int, accumulation: int, epochs: float, drop: bool, most: int
) -> None:
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir="unused", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs, max_steps=most, dataloader_drop_last=drop, use_cpu=True, report_to=[],
    )  # fmt: skip
    loader: Any = DataLoader(range(rows), batch_size=batch, drop_last=drop)  # type: ignore[arg-type]
    if len(loader) == 0:
        return  # the trainer refuses
    trainer = SimpleNamespace(
        get_total_train_batch_size=lambda a: 1, get_sp_size=lambda: 1, num_examples=lambda d: rows
    )
    real = Trainer.set_initial_training_values(trainer, args, loader)  # type: ignore[arg-type]
    found = steps(fake_data(rows), args)  # type: ignore[arg-type]
    assert (found["steps_per_epoch"], found["steps"]) == (real[1], real[6])


def test_steps_of_a_real_run_and_the_time_of_the_next(tmp_path: Path, write_recipe: Any) -> None:
    from instructft.check.report import check

    path = write_recipe()
    recipe = load_recipe(path, ["train.max_steps=-1", "train.num_train_epochs=1", "train.tokens_per_step=400"])
    before = check(recipe)["estimate"]
    assert before["time"] == {"tokens_per_second": None, "source": None, "seconds": None}
    from rich.console import Console

    result = instructft.train(recipe, console=Console(quiet=True))
    facts = result.facts["train"]
    assert before["schedule"]["steps"] == facts["steps"]
    assert before["schedule"]["total_tokens"] == facts["tokens"]
    after = check(recipe)["estimate"]["time"]
    assert after["source"] == str(Path(recipe.output_dir) / "run.json")
    assert after["tokens_per_second"] == pytest.approx(facts["tokens_per_second"])
    assert after["seconds"] == pytest.approx(facts["seconds"])
    assert last_speed(recipe, processes=2) == (None, "")
    other = load_recipe(write_recipe(name="other.yaml"))
    assert last_speed(other, processes=1) == (None, "")
    assert duration(recipe, before["schedule"], 1, given=100.0)["source"] == "given"


def test_the_largest_batch(write_recipe: Any) -> None:
    recipe = load_recipe(write_recipe())
    data = prepare(recipe, instructft.load_tokenizer(recipe))
    rows = sorted(data.splits["train"], key=lambda r: -len(r["input_ids"]))[:4]
    found = largest_batch(data, 4)
    assert (found.rows, found.width) == (4, len(rows[0]["input_ids"]))
    assert found.supervised == sum(label != -100 for r in rows for label in r["labels"])
    assert largest_batch(data, 4, multiple=64).width % 64 == 0
    assert largest_batch(data, 10_000).rows == len(data.splits["train"])


def test_a_copy_of_a_checkpoint_counts_where_it_is_written_beside_training() -> None:
    def host(*keys: str, **given: Any) -> Any:
        return estimated("llama", Batch(4, 128, 200), *keys, device="cuda", base=0, **given)[0]

    found = host()
    copy = found["memory"]["weights"] + found["memory"]["optimizer"]
    assert found["host_memory"]["first"] == found["host_memory"]["total"] == copy
    assert found["host_memory"]["process"] == found["memory"]["weights"]
    waits = host("train.save_in_background=false")["host_memory"]
    assert waits["first"] == waits["process"] == found["memory"]["weights"]
    assert host(processes=2)["host_memory"]["first"] == host(processes=2)["host_memory"]["process"]


def test_real_models_take_the_place_of_shapes_nowhere() -> None:
    found = estimated("gpt2", Batch(2, 16, 10))
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=2, n_head=2, n_embd=32))
    assert next(real.parameters()).device.type == "cpu"  # nothing of the estimate's modes is left behind
    assert type(next(real.parameters()).data) is torch.Tensor
    assert found[0]["host_memory"]["process"] == found[0]["memory"]["total"]
