"""A step of training waits for the GPU once, and once more where it is logged; what is logged is what upstream logs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

import instructft
from instructft.models.kernels import fused_loss, gpu_head
from instructft.training import run as run_module
from instructft.training.run import train
from instructft.training.trainer import Trainer
from tests.helpers.read_backs import ReadBacks

RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 128, attn_pdrop: 0.0, resid_pdrop: 0.0,
           embd_pdrop: 0.0}
  tokenizer: quickstart
data: {datasets: [{name: quickstart, rows: 60}], max_length: 64, packing: true, splits: {validation: 0},
       template: instruction}
train: {max_steps: 6, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, save_strategy: "no",
        use_cpu: true, logging_steps: 2, report_to: none}
"""
# what no GPU is asked for: batches are made on the host, and masks are the attention's, which needs none on a GPU
NOT_OF_THE_STEP = ("data/collator.py", "batches/", "masking_utils.py")


class Look(TrainerCallback):
    """What was read back in each step, from the end of the one before to its own end, its log included."""

    def __init__(self, on_cuda: bool) -> None:
        self.on_cuda = on_cuda
        self.steps: dict[int, list[str]] = {}
        self.open: ReadBacks | None = None

    def _next(self, step: int) -> None:
        if self.open is not None:
            self.open.close()
            self.steps[step] = [f"{what} at {where}" for what, where in self.open.found
                                if not any(name in where for name in NOT_OF_THE_STEP)]  # fmt: skip
        self.open = ReadBacks(self.on_cuda).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end of a step that is not logged; the log of one that is comes later."""
        if not control.should_log:
            self._next(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._next(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.open is not None:
            self.open.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of six steps, looked at; flat packs and the GPU's head stand for a GPU."""
    ran: list[Path] = []

    def run(*overrides: str, flat: bool = True, on_cuda: bool = False) -> tuple[Path, dict[int, list[str]]]:
        path = tmp_path / "looked.yaml"
        path.write_text(RECIPE)
        ran.append(tmp_path / f"run-{len(ran)}")
        look, build = Look(on_cuda), run_module.build_trainer

        def watched(*args: Any) -> Any:
            trainer = build(*args)
            trainer.data_collator.flatten = flat  # as an attention that keeps to borders has it
            trainer.add_callback(look)
            return trainer

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "build_trainer", watched)
            recipe = instructft.load_recipe(path, [f"output_dir={ran[-1]}", *overrides])
            train(recipe, console=Console(file=io.StringIO()))
        return ran[-1], look.steps

    return run


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "_DEVICES", ())
    monkeypatch.setattr(gpu_head, "head_for", lambda device: gpu_head.torch_parts)


@pytest.mark.usefixtures("like_a_gpu")
def test_a_step_reads_once_and_its_log_once_more(run: Any) -> None:
    _, steps = run()
    assert sorted(steps) == [2, 3, 4, 5, 6]
    assert {step: len(found) for step, found in steps.items()} == {2: 2, 3: 1, 4: 2, 5: 1, 6: 2}, steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA itself")
def test_on_a_gpu_torch_counts_no_more(run: Any) -> None:
    _, steps = run("train.use_cpu=false", flat=False, on_cuda=True)
    assert all(len(found) <= 2 for found in steps.values()), steps


MIXTURE = (
    "model.config={model_type: mixtral, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 1, intermediate_size: 32, num_local_experts: 4, max_position_embeddings: 128, "
    "output_router_logits: true, router_jitter_noise: 0.0}"
)


def logged(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = ("epoch", "step", "tokens_per_second")
    return [{name: x for name, x in line.items() if name not in left_out and not name.startswith("train_")}
            for line in lines if "loss" in line]  # fmt: skip


@pytest.mark.parametrize("more", [(), ("data.packing=false",), ("data.packing=false", MIXTURE)])
def test_what_is_logged_is_what_upstream_logs(run: Any, more: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    each = ("train.logging_steps=1", "train.gradient_accumulation_steps=1", *more)
    ours, _ = run(*each, flat=False)
    monkeypatch.setattr(Trainer, "plain_loss", False)
    theirs, steps = run(*each, flat=False)
    assert all(len(found) > 4 for found in steps.values()), steps  # the counter counts
    assert len(logged(ours)) == 6
    assert {"entropy", "mean_token_accuracy", "num_tokens", "grad_norm"} < set(logged(ours)[0])
    assert ("aux_loss" in logged(ours)[0]) == (MIXTURE in more)
    for mine, other in zip(logged(ours), logged(theirs), strict=True):
        if MIXTURE in more:  # upstream's loss holds the router's, which ours tells beside it
            other = {**other, "loss": other["loss"] - 0.001 * other["aux_loss"]}
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        else:
            assert mine["loss"] == other["loss"]
        assert mine == pytest.approx(other, rel=1e-6)
        assert mine["grad_norm"] == other["grad_norm"]


def test_another_loss_is_upstreams(run: Any) -> None:
    ours, _ = run("train.loss_type=dft", flat=False)
    assert all(0 < line["entropy"] < 10 and line["num_tokens"] > 0 for line in logged(ours))


def test_a_token_counts_once_in_what_is_logged_of_several_micro_batches(run: Any) -> None:
    """Rows of unequal length: whether they come in one micro-batch or in four changes nothing."""
    uneven = "model.config.initializer_range=0.5"  # so that tokens differ in entropy
    same = ("data.packing=false", "train.max_steps=2", "train.logging_steps=2", uneven)
    parts, _ = run(*same, "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4", flat=False)
    whole, _ = run(*same, "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1", flat=False)
    (mine,), (other,) = logged(parts), logged(whole)
    assert mine.pop("total_flos") < other.pop("total_flos")  # they count padding
    assert mine == pytest.approx(other, rel=1e-5)
