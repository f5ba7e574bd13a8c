"""`auto_find_batch_size`: where memory runs out, fewer rows are taken at a time, and a step keeps its rows."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from instructft.errors import OutOfMemoryError, RecipeError, Stopped, UsageError
from instructft.training.run import train
from tests.helpers.device import near
from tests.helpers.out_of_memory import out_of_memory, proposed

QUIET = Console(quiet=True)


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
        assert mine == pytest.approx(other, abs=near(1e-5))
    others = weights(whole.output_dir)
    for name, tensor in weights(found.output_dir).items():
        torch.testing.assert_close(tensor, others[name], atol=near(1e-5), rtol=0)


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
