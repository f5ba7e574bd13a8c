"""Whole runs with float32 copies of bfloat16 weights: no stall, resumed to the same bits, saved by the copies."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import instructft
from instructft.check.report import check, show
from instructft.checkpoints.manifest import verify
from instructft.errors import RecipeError, ResumeError, Stopped, UsageError
from instructft.recipe.conflicts import WITH_COPIES
from instructft.training.out_of_memory import advice, measure
from instructft.training.trainer import Trainer
from tests.helpers.out_of_memory import out_of_memory
from tests.helpers.stops import SignalAt, interrupt

COPIES = ("model.dtype=bfloat16", "train.float32_copies=true")
NO_DROPOUT = "model.config={model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128, " \
             "resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}"  # fmt: skip
QUIET = ("samples=[]", "train.report_to=none", "evaluation.rows=0", "train.lr_scheduler_type=constant")


def trained(path: Path, folder: Path, *overrides: str) -> tuple[Any, list[dict[str, Any]], str]:
    printed = io.StringIO()
    recipe = instructft.load_recipe(path, [*QUIET, f"output_dir={folder}", *overrides])
    result = instructft.train(recipe, console=Console(file=printed, width=200))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, [line for line in lines if "loss" in line], printed.getvalue()


def state(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
    return found


def test_small_updates_are_not_lost(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """At a rate whose updates are below the spacing of most weights the losses are those of float32 weights."""
    path, small = write_recipe(), ("train.learning_rate=1e-5", "train.max_steps=6", "train.save_steps=6")
    plain, _, said = trained(path, tmp_path / "plain", "model.dtype=bfloat16", *small)
    assert "rounds most updates" in said
    assert "train.float32_copies=true" in said
    result, lines, said = trained(path, tmp_path / "copies", *COPIES, *small)
    assert "rounds most updates" not in said
    assert "bfloat16 weights with float32 copies without autocast" in said
    assert "stored in bfloat16, rounded by chance from its float32 copies" in said
    _, whole, _ = trained(path, tmp_path / "float32", *small)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], abs=5e-3)
    facts = result.facts
    assert "bfloat16 weights with float32 copies" in facts["hardware"]["precision"]
    assert facts["float32_copies"] == {
        "weights": 28, "bytes": facts["float32_copies"]["bytes"], "gradients": "float32"
    }  # fmt: skip
    assert plain.facts["float32_copies"] is None

    began = instructft.load_model(recipe := instructft.load_recipe(path, [*COPIES]), instructft.load_tokenizer(recipe))
    first = dict(began.named_parameters())
    stalled, moved = (load_file(tmp_path / run / "checkpoint-6" / "model.safetensors") for run in ("plain", "copies"))
    name = "transformer.h.0.mlp.c_fc.weight"
    large = first[name].abs() > 0.02  # of these no number has moved
    assert torch.equal(stalled[name][large], first[name][large])
    copies = state(tmp_path / "copies", 6)["float32_copies"]
    shapes = [tuple(copy.shape) for copy in copies]
    assert all(copy.dtype == torch.float32 for copy in copies)
    copy = copies[shapes.index(tuple(first[name].shape))]
    assert float((copy != first[name].float()).float().mean()) > 0.9
    assert torch.equal(moved[name], copy.bfloat16())  # a checkpoint holds what the next step computes with

    final = load_file(tmp_path / "copies" / "model.safetensors")
    assert {value.dtype for value in final.values()} == {torch.bfloat16}
    error = (final[name].double() - copy.double())[large].mean(), (moved[name].double() - copy.double())[large].mean()
    assert not torch.equal(final[name], moved[name])
    assert abs(float(error[0])) < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copies", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_parameter(name), final[name])


@pytest.mark.parametrize("more", [(), ("train.gradient_accumulation_steps=2", "train.optim=adamw_torch")])
def test_a_stopped_run_goes_on_bit_for_bit(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    path, options = write_recipe(), (*COPIES, *more, "train.learning_rate=1e-4", "train.max_steps=6")
    _, whole, _ = trained(path, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        interrupt(patch, SignalAt("step", 2))
        with pytest.raises(Stopped, match="checkpoint-3 is saved"):
            trained(path, tmp_path / "part", *options)
    verify(tmp_path / "part" / "checkpoint-3")
    _, lines, said = trained(path, tmp_path / "part", *options)
    assert "resuming from" in said
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("part", "whole")]
    assert files[0] == files[1]
    one, other = (state(tmp_path / run, 6) for run in ("part", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(one["float32_copies"], other["float32_copies"], strict=True))


@pytest.mark.parametrize("began", [True, False])
def test_the_key_is_fixed_for_a_runs_life(write_recipe: Callable[..., Path], tmp_path: Path, began: bool) -> None:
    path, dtype = write_recipe(), "model.dtype=bfloat16"
    then, now = (f"train.float32_copies={str(value).lower()}" for value in (began, not began))
    trained(path, tmp_path / "run", dtype, then, "train.max_steps=2")
    said = rf"train\.float32_copies: {str(began).lower()} when checkpoint-2 was written, now {str(not began).lower()}"
    with pytest.raises(ResumeError, match=said):
        trained(path, tmp_path / "run", dtype, now)


def test_the_best_checkpoint_is_gone_back_to_with_its_copies(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final model is made of copies, and those in memory are of the last step."""
    monkeypatch.setattr(Trainer, "_determine_best_metric", _first_is_best)
    options = ("train.load_best_model_at_end=true", "train.save_steps=2", "train.eval_steps=2")
    trained(write_recipe(), tmp_path / "run", *COPIES, *options, "train.learning_rate=1e-2")
    first, last = (state(tmp_path / "run", step)["float32_copies"] for step in (2, 4))
    final = load_file(tmp_path / "run" / "model.safetensors")["transformer.wpe.weight"].float()
    at = [tuple(copy.shape) for copy in first].index(tuple(final.shape))
    near, far = ((final - copies[at]).abs().max() for copies in (first, last))
    assert float(near) < 1e-3
    assert float(far) > 1e-3


def _first_is_best(self: Any, metrics: Any, trial: Any) -> bool:
    if self.state.best_metric is None:
        self.state.best_metric, self.state.best_global_step = 0.0, self.state.global_step
        return True
    return False


def test_a_spike_that_is_left_out_moves_no_copy(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.training_step

    def leaps(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = step(self, *args, **kwargs)
        if self.state.global_step == 12 - 1:
            self.step_checks.loss = self.step_checks.loss * 100
        return found

    monkeypatch.setattr(Trainer, "training_step", leaps)
    _, _, said = trained(
        write_recipe(), tmp_path / "run", *COPIES, "train.max_steps=12", "train.save_steps=11",
        "train.on_loss_spike=skip", "train.learning_rate=1e-3", "train.per_device_train_batch_size=2",
    )  # fmt: skip
    assert "the step is left out" in said
    before, after = (state(tmp_path / "run", step) for step in (11, 12))
    assert all(torch.equal(a, b) for a, b in zip(before["float32_copies"], after["float32_copies"], strict=True))


def test_memory_that_runs_out_in_a_step(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = write_recipe(), (*COPIES, NO_DROPOUT, "train.gradient_accumulation_steps=2")
    _, whole, _ = trained(path, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        out_of_memory(patch, lambda trainer, rows: bool(trainer.state.global_step >= 1 and rows > 2), after=True)
        _, lines, said = trained(path, tmp_path / "found", *options, "train.auto_find_batch_size=true")
    assert "2 are taken from now on" in said
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], abs=2e-3)


def test_frozen_weights_have_no_copy(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    result, _, said = trained(write_recipe(), tmp_path / "run", *COPIES, "model.freeze=['transformer.h.0']")
    assert "12 frozen weights are what they were" in said
    assert result.facts["float32_copies"]["weights"] == 28 - 12


def test_compiled_blocks(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    packs = (*COPIES, "data.packing=true", "train.pad_to_multiple_of=128", "train.per_device_train_batch_size=2")
    compiler = ("train.torch_compile=true", "train.torch_compile_backend=aot_eager")
    _, expected, _ = trained(write_recipe(), tmp_path / "eager", *packs)
    result, found, said = trained(write_recipe(), tmp_path / "compiled", *packs, *compiler)
    assert "2 of 2 blocks compiled" in said
    assert result.facts["torch_compile"]["graphs"] == 1
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-2)


def test_attention_by_borders(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    packs = (*COPIES, NO_DROPOUT, "data.packing=true", "train.per_device_train_batch_size=2")
    _, expected, _ = trained(write_recipe(), tmp_path / "mask", *packs)
    result, found, _ = trained(write_recipe(), tmp_path / "borders", *packs, "model.attn_implementation=varlen")
    assert result.facts["attention"]["name"] == "varlen"
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-2)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "train.float32_copies: keeps copies of bfloat16 weights, and model.dtype is auto; write model.dtype: bf"),
        (["model.dtype=float32"], "model.dtype is float32"),
        (["model.dtype=bfloat16", "adapter.type=lora"], "those of lora are float32 themselves; take it out"),
        (["model.dtype=bfloat16", "adapter.type=lora", "model.quantization=4bit"], "those of lora are float32"),
        (["model.dtype=bfloat16", "train.fp8=true"], "keep one of train.fp8 and train.float32_copies"),
        (["model.dtype=bfloat16", "train.fp16=true"], "take train.fp16 out"),
        (
            ["model.dtype=bfloat16", "train.optim=adamw_torch_8bit", "train.optim_args=bf16_stochastic_round=true"],
            f"optim adamw_torch_8bit has no place for copies; write one of {', '.join(WITH_COPIES)}",
        ),
        (["model.dtype=bfloat16", "train.optim=adamw_8bit"], "optim adamw_8bit has no place for copies"),
    ],
)
def test_what_it_cannot_be_meant_with(write_recipe: Callable[..., Path], overrides: list[str], says: str) -> None:
    text = write_recipe().read_text()
    config = text[text.index("  config:") : text.index("data:")]
    path = write_recipe(text.replace(config, "  name_or_path: gpt2\n"))
    with pytest.raises(RecipeError) as caught:
        instructft.load_recipe(path, ["train.float32_copies=true", *overrides])
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_shared_weights_are_refused_before_any_is_loaded(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    monkeypatch.setattr("instructft.training.run.load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=r"train\.float32_copies: the processes share the weights.*--strategy ddp"):
        trained(write_recipe(), tmp_path / "run", *COPIES)


def test_check_counts_the_copies_and_divides_none(write_recipe: Callable[..., Path]) -> None:
    recipe, printed = instructft.load_recipe(write_recipe(), COPIES), io.StringIO()
    eight = {"device": "cuda", "processes": 8, "card": "h100"}
    report = check(recipe, **eight)  # type: ignore[arg-type]
    count, memory = report["estimate"]["parameters"]["all"], report["estimate"]["memory"]
    assert (memory["float32_copies"], memory["optimizer"]) == (4 * count, 8 * count)
    assert (
        report["estimate"]["precision"] == "bfloat16 weights with float32 copies without autocast, as the recipe says"
    )
    assert [line for line in report["remarks"] if "DDP averages them so over the processes" in line]
    assert not check(recipe)["remarks"]
    show(report, Console(file=printed, width=120))
    assert "float32_copies" in printed.getvalue()
    for strategy in ("fsdp2", "zero2", "zero3"):
        with pytest.raises(UsageError, match=r"train\.float32_copies: the processes share the weights"):
            check(recipe, strategy=strategy, **eight)  # type: ignore[arg-type]


def test_what_is_held_and_written_is_counted_with_the_copies(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    held: list[Any] = []
    path = write_recipe()
    recipe = instructft.load_recipe(path, COPIES)
    save = Trainer._save_checkpoint

    def measured(self: Any, *args: Any) -> None:
        held.append(measure(self.model, self.optimizer, self.args.device, self.copies))
        held.append(advice(recipe, self, held[0]))
        save(self, *args)

    monkeypatch.setattr(Trainer, "_save_checkpoint", measured)
    monkeypatch.setattr("instructft.checkpoints.manifest.require_space", lambda run, size: asked.append(size))
    trained(path, tmp_path / "run", *COPIES, "train.max_steps=1", "train.save_steps=1", "train.optim=adamw_torch")
    count = held[0].weights // 2
    assert held[0].optimizer == pytest.approx(12 * count, rel=0.01)
    assert not [keys for keys, _ in held[1] if "8bit" in keys]
    folder = tmp_path / "run" / "checkpoint-1"
    written = sum((folder / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert 14 * count < written < asked[0]
    assert asked[0] - (1 << 20) == pytest.approx(14 * count, rel=0.01)  # a MiB for all the rest
