"""Memory that runs out: one message with keys that help, and `auto_find_batch_size`, whose steps keep their rows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from trl import SFTTrainer

import instructft
from instructft.errors import OutOfMemoryError, RecipeError, Stopped, UsageError
from instructft.training.out_of_memory import ran_out
from instructft.training.run import train

QUIET = Console(quiet=True)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
)
RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 192, resid_pdrop: 0.0, embd_pdrop: 0.0,
           attn_pdrop: 0.0}
  tokenizer: quickstart
data: {datasets: [{name: quickstart, rows: 160}], template: instruction, max_length: 160, splits: {validation: 0.1}}
train: {max_steps: 4, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, logging_steps: 1, eval_steps: 4,
        save_steps: 2, use_cpu: true, learning_rate: 1e-2, adam_epsilon: 1e-3, report_to: none}
"""
Fails = Callable[[Any, int], bool]  # (trainer, rows) -> whether memory runs out now


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    path = write_recipe(RECIPE)

    def load(*overrides: str) -> Any:
        if any("tokens_per_step" in override for override in overrides):  # it sets the accumulation
            path.write_text(path.read_text().replace("gradient_accumulation_steps: 2, ", ""))
        return instructft.load_recipe(path, list(overrides))

    return load


def out_of_memory(patch: pytest.MonkeyPatch, fails: Fails, error: Any = None, after: bool = False) -> list[int]:
    """Let memory run out where `fails` says so, `after` the gradient is there or before; the rows that were tried."""
    real, tried = SFTTrainer.training_step, []

    def step(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        rows = inputs["input_ids"].shape[0]
        tried.append(rows)
        failing = fails(self, rows)
        if failing and not after:
            raise error or torch.OutOfMemoryError(CUDA)
        loss = real(self, model, inputs, *args)
        if failing:
            raise error or torch.OutOfMemoryError(CUDA)
        return loss

    patch.setattr(SFTTrainer, "training_step", step)
    return tried


def proposed(error: OutOfMemoryError) -> list[str]:
    """The overrides that a message names, line by line."""
    lines = str(error).split("What would help most:\n")[1].splitlines()
    return [line.split("  (")[0].strip() for line in lines]


# The message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        RuntimeError("[enforce fail at alloc_cpu.cpp:132] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                     "tried to allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_it_ends_with_one_message(recipe: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    asked = recipe()
    out_of_memory(monkeypatch, lambda trainer, rows: trainer.state.global_step == 2, error)
    with pytest.raises(OutOfMemoryError) as caught:
        train(asked, console=QUIET)
    said = str(caught.value)
    assert said.startswith("step 3: memory ran out on cpu, with a batch of 4 × ")
    assert ("2.0 GiB more were asked for" in said) == bool(str(error))
    held = {name: float(value) for name, value in re.findall(r"(weights|gradients|optimizer state) ([\d.]+) KiB", said)}
    assert held["weights"] > 300
    assert held["optimizer state"] == pytest.approx(2 * held["weights"], abs=2)  # AdamW, after two steps
    assert proposed(caught.value)[0] == "train.per_device_train_batch_size=2 train.gradient_accumulation_steps=4"
    assert caught.value.exit_code == 1
    assert not (Path(asked.output_dir) / "run.json").exists()


def test_the_real_error_of_the_allocator_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert ran_out(caught.value)
    with pytest.raises(MemoryError) as other:
        bytearray(1 << 60)
    assert ran_out(other.value)
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_pass(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory(monkeypatch, lambda *_: True, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(recipe(), console=QUIET)


@pytest.mark.parametrize(
    ("overrides", "never"),
    [
        ((), ()),
        (("train.per_device_train_batch_size=6",), ()),
        (("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=8"), ("batch_size",)),
        (("train.gradient_checkpointing=true",), ("checkpointing",)),
        (("train.tokens_per_step=700",), ("accumulation",)),
        (("model.config.n_embd=256",), ()),
    ],
)
def test_each_key_is_worth_setting(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], never: tuple[str, ...]
) -> None:
    """What is proposed makes a recipe that is legal, differs, and keeps the rows of a step; in the order of bytes."""
    asked = recipe(*overrides)
    out_of_memory(monkeypatch, lambda *_: True)
    with pytest.raises(OutOfMemoryError) as caught:
        train(asked, console=QUIET)
    lines = proposed(caught.value)
    assert 1 <= len(lines) <= 3
    assert not any(word in line for line in lines for word in never)
    for line in lines:
        changed = recipe(*overrides, *line.split())
        assert changed != asked
        if "per_device" in line and "tokens_per_step" not in str(overrides):
            old, new = (r.train["per_device_train_batch_size"] * r.train["gradient_accumulation_steps"]
                        for r in (asked, changed))  # fmt: skip
            assert old == new
            assert changed.train["per_device_train_batch_size"] < asked.train["per_device_train_batch_size"]
        if "max_length" in line:
            assert changed.data.max_length < asked.data.max_length


def test_a_model_that_is_too_large_gets_other_advice(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full fine-tuning of a model from disk: an adapter frees gradients and optimizer; with one, 4 bits are next."""
    from instructft.training.out_of_memory import advice

    asked = recipe()
    caught: dict[str, Any] = {}

    def fails(trainer: Any, rows: int) -> bool:
        caught["trainer"] = trainer
        return True

    out_of_memory(monkeypatch, fails)
    with pytest.raises(OutOfMemoryError):
        train(asked, console=QUIET)
    trainer = caught["trainer"]
    held = SimpleNamespace(weights=4 << 30, gradients=0, optimizer=0, rest=0)
    named = asked.model.model_copy(update={"name_or_path": "gpt2", "config": None})
    full = advice(SimpleNamespace(model=named, adapter=asked.adapter, train=asked.train), trainer, held)
    assert any(key == "adapter.type=lora" for key, _ in full)
    lora = SimpleNamespace(type="lora")
    adapted = advice(SimpleNamespace(model=named, adapter=lora, train=asked.train), trainer, held)
    assert not any(key.startswith("adapter") for key, _ in adapted)
    assert adapted[0][0] == "model.quantization=4bit"
    assert "about 3.4 GiB" in adapted[0][1]
    trainer.micro_batches.under_way = ("validation", (4, 160))
    assert advice(asked, trainer, held)[0][0] == "train.per_device_eval_batch_size=2"


def test_a_process_whose_memory_is_limited(recipe: Any, tmp_path: Path) -> None:
    """A real allocation that fails, in the command: exit 1, the message, and no traceback."""
    asked = recipe("train.per_device_train_batch_size=32", "model.config.n_embd=512")  # some 400 MB of activations
    (tmp_path / "big.yaml").write_text(asked.to_yaml())
    program = f"""
import resource, sys
from instructft.training.trainer import Trainer
step = Trainer.training_step
def limited(self, *args, **kwargs):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (48 << 20), -1))
    return step(self, *args, **kwargs)
Trainer.training_step = limited
sys.argv = ["instructft", "train", {str(tmp_path / "big.yaml")!r}]
from instructft.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    assert "step 1: memory ran out on cpu, with a batch of 32 × " in done.stderr
    assert "train.per_device_train_batch_size=16 train.gradient_accumulation_steps=4" in done.stderr
    assert "Traceback" not in done.stderr


# auto_find_batch_size


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def logged(run: Path, *names: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *names) if name in line} for line in lines]


@pytest.mark.parametrize("how", [pytest.param("rows", marks=pytest.mark.battery), "tokens"])
def test_a_step_keeps_its_rows(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    """Memory for two rows of four runs out in the middle of step 2: the run is the one that never ran out."""
    step = ("train.tokens_per_step=600",) if how == "tokens" else ()
    with monkeypatch.context() as patch:
        tried = out_of_memory(patch, lambda *_: False)
        whole = train(recipe(*step, f"output_dir={tmp_path / 'whole'}"), console=QUIET)
    count = len(tried) // 4  # micro-batches in a step
    assert set(tried) == {4}
    assert count > 1
    with monkeypatch.context() as patch:
        tried = out_of_memory(patch, runs_out_in_step_2, after=True)
        console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        found = train(recipe(*step, "train.auto_find_batch_size=true"), console=console)
    rows = 4 * count
    said = [line for line in console.export_text().splitlines() if "do not fit" in line]
    assert said == [
        f"step 2: 4 rows at a time do not fit into memory; 2 are taken from now on (a step keeps its {rows} rows)"
    ]
    # step 1, then one micro-batch of step 2 and one that did not fit, then parts of two rows
    assert tried == [4] * (count + 2) + [2] * (3 * 2 * count)
    assert found.facts["train"]["rows_at_once"] == 2
    for name in ("tokens", "supervised_tokens", "steps"):
        assert found.facts["train"][name] == whole.facts["train"][name]
    assert found.facts["data"]["padding_share"] == whole.facts["data"]["padding_share"]
    kept = ("loss", "eval_loss", "grad_norm", "num_tokens", "learning_rate")
    for mine, other in zip(logged(found.output_dir, *kept), logged(whole.output_dir, *kept), strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    others = weights(whole.output_dir)
    for name, tensor in weights(found.output_dir).items():
        torch.testing.assert_close(tensor, others[name], atol=1e-5, rtol=0)


def runs_out_in_step_2(trainer: Any, rows: int) -> bool:
    """Where one micro-batch of the step has its gradient already."""
    return bool(trainer.state.global_step >= 1 and trainer.micro_batches.done >= 1 and rows > 2)


DROPOUT = "model.config.resid_pdrop=0.3"


def test_a_step_that_is_done_again_leaves_no_trace(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With dropout: whether memory ran out before the gradient was there or after, the weights are the same bits."""
    runs = []
    for after in (False, True):
        with monkeypatch.context() as patch:
            out_of_memory(patch, runs_out_in_step_2, after=after)
            asked = recipe(DROPOUT, "train.auto_find_batch_size=true", f"output_dir={tmp_path / str(after)}")
            runs.append(train(asked, console=QUIET).output_dir)
    before, after_it = map(weights, runs)
    assert all(torch.equal(tensor, after_it[name]) for name, tensor in before.items())
    kept = ("loss", "eval_loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy")
    assert logged(runs[0], *kept) == logged(runs[1], *kept)


def test_a_resumed_run_uses_what_was_found(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = (DROPOUT, "train.auto_find_batch_size=true", "train.per_device_train_batch_size=5")
    with monkeypatch.context() as patch:
        tried = out_of_memory(patch, lambda trainer, rows: rows > 2)
        whole = train(recipe(*find, f"output_dir={tmp_path / 'whole'}"), console=QUIET)
    assert tried[:3] == [5, 3, 2]  # 5 rows are 3 and 2; 3 are too many
    assert tried[3:9] == [2, 1, 2, 2, 1, 2]
    assert whole.facts["train"]["rows_at_once"] == 2

    def stop(trainer: Any, rows: int) -> bool:
        if trainer.state.global_step == 2 and not trainer.stop.signal:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows > 2

    with monkeypatch.context() as patch:
        out_of_memory(patch, stop)
        with pytest.raises(Stopped):
            train(recipe(*find), console=QUIET)
    with monkeypatch.context() as patch:
        tried = out_of_memory(patch, lambda trainer, rows: rows > 2)
        on = train(recipe(*find), console=QUIET)
    assert on.facts["train"]["resumed"][0]["step"] == 3
    assert tried == [2, 2, 1, 2, 2, 1]  # nothing that is known not to fit is tried
    others = weights(whole.output_dir)
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights(on.output_dir).items())


def test_one_row_that_does_not_fit_ends_the_run(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = out_of_memory(monkeypatch, lambda *_: True)
    with pytest.raises(OutOfMemoryError) as caught:
        train(recipe("train.auto_find_batch_size=true"), console=QUIET)
    assert tried == [4, 2, 1]
    assert "with a batch of 1 × " in str(caught.value)
    assert not any("batch_size" in line for line in proposed(caught.value))


def test_what_it_cannot_work_with_is_refused(recipe: Any) -> None:
    from instructft.training.arguments import refuse_what_cannot_run

    state: Any = SimpleNamespace(num_processes=2, distributed_type=None)
    with pytest.raises(UsageError, match=r"train.auto_find_batch_size: found 2 processes"):
        refuse_what_cannot_run(recipe("train.auto_find_batch_size=true"), state)
    refuse_what_cannot_run(recipe(), state)
    with pytest.raises(RecipeError, match=r"train.auto_find_batch_size: flash-attention gets packs as one row"):
        recipe("train.auto_find_batch_size=true", "data.packing=true", "model.attn_implementation=flash_attention_2")
