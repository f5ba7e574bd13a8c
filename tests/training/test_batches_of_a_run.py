"""What a run trains: batches of its rows in order, each counted on the host; and the same run where packs are flat."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file
from trl import SFTTrainer

import instructft
from instructft.checkpoints.manifest import NOT_FINITE
from instructft.data.arrow.token_rows import tokens_of
from instructft.data.batches.counts import counted
from instructft.data.batches.parts import ONCE_MORE
from instructft.data.row_order import LengthGrouped
from instructft.errors import NotFiniteError, UsageError
from instructft.training.batch_size import MicroBatches
from instructft.training.run import train
from tests.helpers import borders
from tests.helpers.out_of_memory import out_of_memory
from tests.helpers.plain_batches import plain_batch, same

QUIET = Console(quiet=True)
WIDTH = 160  # of the recipe
FLAT = ("data.packing=true", "data.splits.validation=0.0", "train.eval_strategy=no")


def trained(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches that runs train from now on, as they reach the model."""
    found: list[dict[str, Any]] = []
    real = SFTTrainer.training_step

    def step(self: Any, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        found.append(dict(inputs))
        return real(self, model, inputs, *args)

    patch.setattr(SFTTrainer, "training_step", step)
    return found


def logged(run: Path, *names: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names if name in line} for line in lines]


KINDS = {
    "in order": ("train.train_sampling_strategy=sequential",),
    "grouped": ("train.train_sampling_strategy=group_by_length",),
    "packed": ("train.train_sampling_strategy=sequential", "data.packing=true"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_rows_in_order(recipe: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    found = trained(monkeypatch)
    monkeypatch.setitem(ONCE_MORE, "cpu", 1)
    asked = recipe(*KINDS[kind])
    result = train(asked, console=QUIET)
    tokenizer = instructft.load_tokenizer(asked)
    rows = list(instructft.prepare_dataset(asked, tokenizer)["train"])
    if kind == "grouped":
        lengths = [len(row["input_ids"]) for row in rows]
        rows = [rows[i] for i in LengthGrouped(lengths, step=8, seed=asked.train["seed"], batch=4)]
    sizes = [len(batch["input_ids"]) for batch in found]
    assert len(sizes) == 8 if kind == "packed" else len(sizes) > 8  # rows of like length at a time
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    wanted = [plain_batch(rows[i : i + n], tokenizer.pad_token_id) for i, n in zip(starts, sizes, strict=True)]
    assert len(found) == len(wanted)
    assert all(map(same, found, wanted))
    tokens, supervised, slots = (sum(counts) for counts in zip(*map(counted, wanted), strict=True))
    facts = result.facts
    assert (facts["train"]["tokens"], facts["train"]["supervised_tokens"]) == (tokens, supervised)
    assert facts["data"]["padding_share"] == pytest.approx(1 - tokens / slots)
    totals = [line["num_tokens"] for line in logged(result.output_dir, "num_tokens") if line]
    tokens_of_rows = [len(row["input_ids"]) for row in rows]
    steps = (
        [sum(tokens_of_rows[: i + 8]) for i in range(0, 32, 8)]
        if kind != "packed"
        else [sum(counted(batch)[0] for batch in wanted[: i + 2]) for i in range(0, 8, 2)]
    )
    assert totals == steps


def test_a_step_in_parts_is_the_step(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same losses and weights, but for the order of sums, whether batches are divided or stay whole."""
    weights, losses = [], []
    for once_more in (1, 1 << 30):
        with monkeypatch.context() as patch:
            patch.setitem(ONCE_MORE, "cpu", once_more)
            found = trained(patch)
            run = train(recipe(f"output_dir={tmp_path / str(once_more)}", "train.save_strategy=no"), console=QUIET)
        assert (len(found) > 8) == (once_more == 1)
        losses.append([line["loss"] for line in logged(run.output_dir, "loss") if line])
        weights.append(load_file(run.output_dir / "model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert all(torch.allclose(value, weights[1][name], atol=1e-4) for name, value in weights[0].items())


def test_rows_in_random_order_come_once_an_epoch(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(monkeypatch)
    asked = recipe("train.train_sampling_strategy=random", "train.max_steps=-1", "train.num_train_epochs=1")
    train(asked, console=QUIET)
    rows = list(instructft.prepare_dataset(asked, instructft.load_tokenizer(asked))["train"])
    seen = [
        ids[mask.bool()].tolist()
        for batch in found
        for ids, mask in zip(*map(batch.get, ("input_ids", "attention_mask")), strict=True)
    ]
    assert sorted(seen) == sorted(row["input_ids"] for row in rows)
    assert seen != [row["input_ids"] for row in rows]


def test_a_step_asks_no_other_process(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen is summed over processes when it is told, and not at each micro-batch."""
    asked_for: list[int] = []
    real = Accelerator.reduce

    def reduce(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        asked_for.append(1)
        return real(self, tensor, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "reduce", reduce)
    result = train(recipe("train.logging_steps=4"), console=QUIET)
    assert asked_for == []
    totals = [line["num_tokens"] for line in logged(result.output_dir, "num_tokens") if line]
    assert totals == [result.facts["train"]["tokens"]]


def test_batches_that_are_dispatched_are_counted_where_they_arrive(recipe: Any, tmp_path: Path) -> None:
    own = train(recipe(), console=QUIET)
    config = "train.accelerator_config={dispatch_batches: true, split_batches: true}"
    other = train(recipe(config, f"output_dir={tmp_path / 'dispatched'}"), console=QUIET)
    assert other.facts["train"]["tokens"] == own.facts["train"]["tokens"]
    assert other.facts["data"]["padding_share"] == own.facts["data"]["padding_share"]


# --------------------------------------------------------------------------------------------------------------------
# Packs end to end
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on packs (B, T)."""
    from tests.helpers.out_of_memory import RECIPE

    folder = tmp_path_factory.mktemp("by_rows")
    (folder / "r.yaml").write_text(f"{RECIPE}\noutput_dir: {folder / 'run'}\n")
    return train(instructft.load_recipe(folder / "r.yaml", [*FLAT]), console=QUIET)


def is_the_run(found: Any, wanted: Any, *, slots: int | None = None) -> None:
    for mine, other in zip(*(logged(run.output_dir, "loss", "grad_norm", "num_tokens", "entropy")
                             for run in (found, wanted)), strict=True):  # fmt: skip
        assert mine == pytest.approx(other, abs=1e-4)
    weights = load_file(wanted.output_dir / "model.safetensors")
    for name, tensor in load_file(found.output_dir / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-4, rtol=0)
    for name in ("tokens", "supervised_tokens", "steps"):
        assert found.facts["train"][name] == wanted.facts["train"][name]
    if slots:
        assert found.facts["data"]["padding_share"] == pytest.approx(1 - found.facts["train"]["tokens"] / slots)


def test_flat_packs_train_as_rows_do(recipe: Any, monkeypatch: pytest.MonkeyPatch, by_rows: Any) -> None:
    found = trained(monkeypatch)
    borders.flat(monkeypatch)
    result = train(recipe(*FLAT), console=QUIET, rehearsal=False)
    assert {batch["input_ids"].shape for batch in found} == {(1, 4 * WIDTH)}
    assert len({batch["cu_seq_lens_q"].shape for batch in found}) == 1
    is_the_run(result, by_rows, slots=8 * 4 * WIDTH)


def test_flat_packs_that_do_not_fit_are_trained_in_parts(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, by_rows: Any
) -> None:
    borders.flat(monkeypatch)
    begun: list[tuple[int, ...]] = []

    def runs_out(trainer: Any, _: int) -> bool:
        begun.append(trainer.micro_batches.under_way[1])
        return bool(trainer.state.global_step >= 1 and trainer.micro_batches.done >= 1 and begun[-1][0] > 1)

    out_of_memory(monkeypatch, runs_out, after=True)
    console = Console(record=True, width=200, file=io.StringIO())
    result = train(recipe(*FLAT, "train.auto_find_batch_size=true"), console=console, rehearsal=False)
    said = [line for line in console.export_text().splitlines() if "do not fit" in line]
    assert said == [
        "step 2: 4 rows at a time do not fit into memory; 2 are taken from now on (a step keeps its 8 rows)",
        "step 2: 2 rows at a time do not fit into memory; 1 are taken from now on (a step keeps its 8 rows)",
    ]
    assert set(begun) == {(4, WIDTH), (2, WIDTH), (1, WIDTH)}
    is_the_run(result, by_rows, slots=8 * 4 * WIDTH)


def test_the_rows_of_a_flat_step_are_named_when_it_is_not_finite(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack by pack, each scored alone."""
    borders.flat(monkeypatch)
    monkeypatch.setattr(MicroBatches, "train", lambda *_: torch.tensor(float("nan")))
    asked = recipe(*FLAT)
    with pytest.raises(NotFiniteError, match="step 1: a gradient is not a finite number"):
        train(asked, console=QUIET, rehearsal=False)
    lines = (Path(asked.output_dir) / f"{NOT_FINITE}1-0.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert len(kept) == 8
    assert {len(row["input_ids"]) for row in kept} == {WIDTH}
    assert all(3 < row["loss"] < 12 for row in kept)


def test_attention_that_gives_way_before_the_first_step_gets_rows(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    borders.flat(monkeypatch)
    found = trained(monkeypatch)

    def give_way(trainer: Any, attention: Any, *_: Any) -> Any:
        trainer.model.set_attn_implementation("sdpa")
        trainer.data_collator.flatten = False
        return attention

    monkeypatch.setattr("instructft.training.rehearsal.isolation.prove_isolation", give_way)
    train(recipe(*FLAT), console=QUIET, rehearsal=False)
    assert {len(batch["input_ids"]) for batch in found} == {4}
    assert not any("supervised" in batch for batch in found)


def test_a_width_that_is_a_multiple(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    borders.flat(monkeypatch)
    found = trained(monkeypatch)
    train(recipe(*FLAT, "train.pad_to_multiple_of=64", "train.max_steps=1"), console=QUIET, rehearsal=False)
    assert {batch["input_ids"].shape for batch in found} == {(1, 4 * 192)}


def test_the_last_batch_of_an_epoch_has_the_shape_of_all(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(monkeypatch)
    borders.flat(monkeypatch)
    epoch = ("train.max_steps=-1", "train.num_train_epochs=1", "train.per_device_train_batch_size=3")
    asked = recipe(*FLAT, *epoch)
    result = train(asked, console=QUIET, rehearsal=False)
    packs = instructft.prepare_dataset(asked, instructft.load_tokenizer(asked))["train"]
    assert len(packs) % 3
    assert {batch["input_ids"].shape for batch in found} == {(1, 3 * WIDTH)}
    assert result.facts["train"]["tokens"] == int(tokens_of(packs).lengths.sum())


def test_a_stream_of_flat_packs(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whose packs nobody has counted before, and whose batches no process makes for the others."""
    rows = [{"instruction": f"Say {i} twice.", "output": f"{i} and {i}."} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = f"data.datasets=[{{path: {tmp_path / 'rows.jsonl'}, streaming: true}}]"
    own = train(recipe(*FLAT, stream, f"output_dir={tmp_path / 'own'}"), console=QUIET)
    with monkeypatch.context() as patch:
        found = trained(patch)
        borders.flat(patch)
        flat = train(recipe(*FLAT, stream), console=QUIET, rehearsal=False)
    assert {batch["input_ids"].shape for batch in found} == {(1, 4 * WIDTH)}
    is_the_run(flat, own)


def test_flat_packs_are_not_dispatched(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    borders.flat(monkeypatch)
    config = "train.accelerator_config={dispatch_batches: true, split_batches: true}"
    with pytest.raises(UsageError, match=r"dispatch_batches: true divides a batch .* attention borders"):
        train(recipe(*FLAT, config), console=QUIET, rehearsal=False)
