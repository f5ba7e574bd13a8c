"""Memory that runs out: one message with keys that help, in the order of what they save."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from torch.utils.data import dataloader

from instructft.errors import InstructftError, OutOfMemoryError
from instructft.training.out_of_memory import ran_out
from instructft.training.run import train
from instructft.training.trainer import Trainer
from tests.helpers.device import of_the_cpu
from tests.helpers.out_of_memory import CUDA, out_of_memory, proposed
from tests.helpers.processes import python

QUIET = Console(quiet=True)

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
def test_it_ends_with_one_message(recipe: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, device: str) -> None:
    asked = recipe()
    out_of_memory(monkeypatch, lambda trainer, rows: trainer.state.global_step == 2, error)
    with pytest.raises(OutOfMemoryError) as caught:
        train(asked, console=QUIET)
    said = str(caught.value)
    assert re.match(rf"step 3: memory ran out on {device}(:0)?, with a batch of 4 × ", said)
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


@of_the_cpu
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
    (tmp_path / "program.py").write_text(program)
    done = python([str(tmp_path / "program.py")], tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "step 1: memory ran out on cpu, with a batch of 32 × " in done.stderr
    assert "train.per_device_train_batch_size=16 train.gradient_accumulation_steps=4" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_loads_rows_and_ends_leaves_a_checkpoint_and_a_word(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a step, as a system does that is short of memory."""
    asked = recipe("train.dataloader_num_workers=1", "train.save_steps=100")
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))  # of 5 s
    step = Trainer.training_step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            for child in psutil.Process().children():
                child.kill()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", watched)
    with pytest.raises(InstructftError, match="a process that loads rows has ended") as caught:
        train(asked, console=QUIET)
    said = re.match(
        r"after step (\d+): .*; checkpoint-(\d+) stands.*dataloader_num_workers=0 \(found 1\)", str(caught.value)
    )
    assert said, caught.value
    assert int(said[1]) == int(said[2]) >= 3
    monkeypatch.undo()
    resumed = train(asked, console=QUIET).facts["train"]["resumed"]
    assert [entry["step"] for entry in resumed] == [int(said[2])]
