"""What a run keeps of a training row is the loss of that row alone, however it is trained; and it changes nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import instructft
from instructft.data.batches.parts import ONCE_MORE
from instructft.data.prepare import prepare
from instructft.report.row_file import read_rows
from instructft.training.run import train
from tests.helpers import borders
from tests.helpers.evaluation import plain_loss
from tests.helpers.out_of_memory import out_of_memory
from tests.helpers.rehearsal import trainer_of

STILL = ("train.learning_rate=0.0", "train.num_train_epochs=1", "train.max_steps=-1", "train.eval_strategy=no",
         "train.save_strategy=no", "train.loss_spike_limit=null", "data.datasets.0.rows=60")  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "in parts": (),
    "packed": ("data.packing=true",),
    "flat": ("data.packing=true",),
    "twice": ("data.datasets.0.repeat=2",),
    "padded": (),
    "out of memory": ("train.auto_find_batch_size=true",),
    "a worker": ("train.dataloader_num_workers=1",),
}


@pytest.mark.parametrize(
    "kind", [*list(KINDS)[:4], *(pytest.param(kind, marks=pytest.mark.battery) for kind in list(KINDS)[4:])]
)
def test_the_loss_of_a_row_is_that_of_the_row_alone(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "flat":
        borders.flat(monkeypatch)
    if kind == "in parts":
        monkeypatch.setitem(ONCE_MORE, "cpu", 1)
    trainer = trainer_of(recipe(*STILL, *KINDS[kind]))
    if kind == "out of memory":
        out_of_memory(monkeypatch, lambda _, rows: rows > 2)
    trainer.train()
    origins, seen = trainer.history.origins, trainer.rows_seen()
    alone = prepare(recipe(*STILL), trainer.processing_class)
    model = trainer.model.eval()
    model.set_attn_implementation("sdpa")
    expected = [plain_loss(model, [row]) for row in alone.splits["train"]]
    place = {key: number for number, key in enumerate(zip(alone.origins.part, alone.origins.row, strict=True))}
    wanted = [expected[place[key]] for key in zip(origins.part, origins.row, strict=True)]
    assert len(wanted) == len(expected) > 50
    assert len({round(one, 3) for one in wanted}) > 30  # so unlike that none is taken for another
    np.testing.assert_allclose(seen.first, wanted, rtol=2e-5)
    np.testing.assert_allclose(seen.last, wanted, rtol=2e-5)
    again = (seen.last_step > seen.first_step).mean()
    assert again > 0.5 if kind == "twice" else again == 0


def test_a_run_trains_the_same_bits_with_and_without(recipe: Callable[..., Any], tmp_path: Path) -> None:
    runs, said = [], []
    for history in ("true", "false"):
        out = io.StringIO()
        mine = recipe(f"train.row_history={history}", f"output_dir={tmp_path / history}")
        train(mine, rehearsal=False, console=Console(file=out, width=120))
        runs.append(tmp_path / history)
        said.append(out.getvalue())
    weights = [(run / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    assert (runs[0] / "rows.parquet").is_file()
    assert not (runs[1] / "rows.parquet").exists()
    rows = read_rows(runs[0]).columns
    facts = instructft.load_recipe(runs[0] / "recipe.yaml")
    made = prepare(facts, instructft.load_tokenizer(facts))
    assert len(rows["id"]) == made.rows["train"]
    assert rows["tokens"].sum() == made.tokens["train"]
    assert rows["supervised_tokens"].sum() == made.supervised_tokens["train"]
    seen = np.isfinite(rows["loss_last"])
    assert 0 < seen.sum() < len(seen)  # four steps do not come to every row
    assert (rows["step_last"][~seen] == -1).all()


def test_what_cannot_have_a_history_says_so(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instructft.data.batches import row_history
    from instructft.training.build import row_history as made

    said: list[str] = []
    mine = recipe()
    data = prepare(mine, instructft.load_tokenizer(mine))
    monkeypatch.setattr(row_history, "MOST", 3)
    assert made(mine, data, said.append) is None
    assert made(recipe("train.row_history=false"), data, said.append) is None
    assert said == [f"rows.parquet is not kept: {data.rows['train']} rows are more than 3"]


def test_another_loss_has_no_history(recipe: Callable[..., Any]) -> None:
    trainer = trainer_of(recipe("train.loss_type=dft", "train.max_steps=1"))
    assert trainer.history is None
    trainer.train()  # nothing of it reaches a model that would not take it
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))
