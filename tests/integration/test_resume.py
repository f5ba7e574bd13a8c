"""A run that was stopped, killed or damaged goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback

import instructft
from instructft.checkpoints.manifest import verify
from instructft.errors import CheckpointError, NotFiniteError, ResumeError, Stopped, UsageError
from instructft.training.run import train
from tests.helpers.device import here
from tests.helpers.processes import python
from tests.helpers.stops import SignalAt, interrupt

# Of each kind of run, and at as many steps; `make battery` asks for more.
KILLS = int(os.environ.get("INSTRUCTFT_KILLS", "2"))
QUIET = Console(quiet=True)

MODEL = "config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 16, n_positions: 64}"  # with dropout
FULL = f"""
model:
  {MODEL}
  tokenizer: quickstart
data:
  datasets: [{{name: quickstart, rows: 60}}]
  template: instruction
  max_length: 64
  packing: false
  splits: {{validation: 0.1}}
train:
  {{max_steps: 12, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, logging_steps: 2, eval_steps: 4,
   save_steps: 3, save_total_limit: 2, use_cpu: true, learning_rate: 1e-2, report_to: none}}
"""
LORA = FULL.replace(MODEL, "name_or_path: BASE") + "adapter: {type: lora, r: 4, dropout: 0.2}\n"
PACKED = FULL.replace("packing: false", "packing: true")
COPIES = FULL.replace("tokenizer: quickstart", "tokenizer: quickstart\n  dtype: bfloat16")
COPIES = COPIES.replace("report_to: none", "report_to: none, float32_copies: true")
BESIDE = FULL.replace("save_steps: 3", "save_steps: 1, save_in_background: true")
KINDS = {"full": FULL, "lora": LORA, "packed": PACKED, "beside": BESIDE, "copies": COPIES}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    path = folder / "base.yaml"
    path.write_text(FULL)
    recipe = instructft.load_recipe(path)
    tokenizer = instructft.load_tokenizer(recipe)
    instructft.load_model(recipe, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def write(tmp_path: Path, base: Path) -> Any:
    def write(kind: str = "full", **changes: str) -> Path:
        text = KINDS[kind].replace("BASE", str(base))
        for old, new in changes.items():
            text = text.replace(old, new)
        path = tmp_path / f"{kind}.yaml"
        path.write_text(here(f"{text}output_dir: {tmp_path / 'run'}\n"))
        return path

    return write


def weights(run: Path) -> bytes:
    return next(p for p in (run / "model.safetensors", run / "adapter_model.safetensors") if p.exists()).read_bytes()


def logged(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "train_loss")
    return [{key: line[key] for key in kept if key in line} for line in lines]


# Killed


@pytest.mark.timeout(200 + 200 * KILLS)
# where weights are all trained, a day of faults kills too (test_day)
@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(k, marks=pytest.mark.battery) for k in ("full", "packed", "beside", "copies"))]
)
def test_a_killed_run_goes_on_bit_for_bit(kind: str, write: Any, tmp_path: Path) -> None:
    whole, *killed = hit(write(kind), tmp_path, KILLS, "kill")
    assert whole["moments"] > 60
    assert len(killed) == KILLS
    for run in killed:
        assert run["status"] == 0, run
        assert (run["weights"], run["logged"]) == (whole["weights"], whole["logged"]), run


def hit(recipe: Path, tmp_path: Path, hits: int, how: str) -> list[dict[str, Any]]:
    """What `crash.py` found: the run that nothing hit, then those that were."""
    program = str(Path(__file__).parents[1] / "helpers" / "crash.py")
    done = python([program, str(recipe), str(tmp_path / "out"), str(hits), "7", how], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# A full disk


def _can_mount(folder: Path) -> bool:
    try:
        command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # there is no such program
        return False


@pytest.mark.battery  # in a day of faults the disk is full too: test_day
@pytest.mark.timeout(200 + 300 * KILLS)
def test_a_full_disk_ends_a_run_with_a_word_and_harms_nothing(write: Any, tmp_path: Path) -> None:
    """A small disk of the run's own, without a free byte from some writing moment on; with room it goes on."""
    if not _can_mount(tmp_path):
        pytest.skip("this machine lets nobody mount a tmpfs")
    whole, *filled = hit(write(), tmp_path, 2 * KILLS, "fill")
    assert len(filled) == 2 * KILLS
    for run in filled:
        if run["ended"]:  # the last moments need no room
            assert "the disk is full" in run["said"] or "MiB are free" in run["said"], run
            newest = next(iter(run["left"]), None)
            stands = f"{newest} stands" if newest else "there is no checkpoint before it"
            assert stands in run["said"], run
            assert "from" in run, run.get("error")
            assert run["from"] == [int(name.removeprefix("checkpoint-")) for name in run["left"]][:1], run
        assert run["status"] == 0, run
        assert (run["weights"], run["logged"]) == (whole["weights"], whole["logged"]), run
    assert sum(bool(run["ended"]) for run in filled) > KILLS


# Stopped by a signal


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "full.yaml").write_text(f"{FULL}output_dir: {folder / 'run'}\n")
    return train(instructft.load_recipe(folder / "full.yaml"), console=QUIET).output_dir


@pytest.fixture
def hangups_heard() -> Iterator[None]:
    """Also where these tests are run by `nohup`, which has SIGHUP ignored, and a run respects that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("place", "step", "number"),
    [
        *[("step", step, signal.SIGTERM) for step in (0, 11)],  # at steps between: the next test
        ("step", 5, signal.SIGINT),
        ("step", 6, signal.SIGHUP),
        ("evaluation", 4, signal.SIGTERM),
        ("evaluation", 12, signal.SIGTERM),
        ("save", 6, signal.SIGTERM),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    write: Any, monkeypatch: pytest.MonkeyPatch, hangups_heard: None, uninterrupted: Path, place: str, step: int,
    number: int,
) -> None:  # fmt: skip
    recipe = instructft.load_recipe(write())
    run = Path(recipe.output_dir)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt(patch, SignalAt(place, step, number))
        with pytest.raises(
            Stopped, match=rf"stopped by {signal.Signals(number).name}; checkpoint-\d+ is saved"
        ) as stop:
            train(recipe, console=QUIET)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (run / "model.safetensors").exists()
    assert not (run / "run.json").exists()
    result = train(recipe, console=QUIET)
    assert weights(run) == weights(uninterrupted)
    assert logged(run) == logged(uninterrupted)
    assert (run / "rows.parquet").read_bytes() == (uninterrupted / "rows.parquet").read_bytes()
    (resumed,) = result.facts["train"]["resumed"]
    assert resumed["step"] == {"step": step + 1, "evaluation": step, "save": step + 1}[place]
    assert result.facts["train"]["tokens"] == json.loads((uninterrupted / "run.json").read_text())["train"]["tokens"]


def test_a_run_that_is_stopped_at_each_of_its_steps(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One stop after the other, each a step further: to the bits of the run that nobody stopped."""
    steps = 20 if KILLS > 3 else 4
    whole = train(
        instructft.load_recipe(write(), [f"train.max_steps={steps}", f"output_dir={tmp_path / 'whole'}"]), console=QUIET
    )
    recipe = instructft.load_recipe(write(), [f"train.max_steps={steps}"])
    run = Path(recipe.output_dir)
    for step in range(steps):
        with monkeypatch.context() as patch:
            interrupt(patch, SignalAt("step", step))
            with pytest.raises(Stopped, match=f"checkpoint-{step + 1} is saved") as stop:
                train(recipe, console=QUIET)
        assert stop.value.exit_code == 143
        assert not (run / "run.json").exists()
    result = train(recipe, console=QUIET)
    assert [entry["step"] for entry in result.facts["train"]["resumed"]] == list(range(1, steps + 1))
    assert weights(run) == weights(whole.output_dir)
    assert logged(run) == logged(whole.output_dir)


# Refused, or said


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints at 3 and 6 of 12 steps, that was stopped there."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "full.yaml").write_text(f"{FULL}output_dir: {folder / 'run'}\n")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, SignalAt("step", 5))
        with pytest.raises(Stopped):
            train(instructft.load_recipe(folder / "full.yaml"), console=QUIET)
    return folder / "full.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=7", "train.seed: 42 when checkpoint-6 was written, now 7"),
        ("data.seed=7", "data.seed"),
        ("train.per_device_train_batch_size=8", "train.per_device_train_batch_size"),
        ("train.gradient_accumulation_steps=1", "train.gradient_accumulation_steps"),
        ("data.datasets=[{name: quickstart, rows: 61}]", "data.datasets"),
        ("data.max_length=48", "data.max_length"),
        ("data.packing=true", "data.packing"),
        ("data.template=human-assistant", "data.template"),
        ("model.config.n_layer=1", "model.config"),
        ("train.optim=sgd", "train.optim"),
        (
            "train.dataloader_drop_last=true",
            "train.dataloader_drop_last: false when checkpoint-6 was written, now true",
        ),
        ("train.lr_scheduler_type=constant", "train.lr_scheduler_type"),
        ("train.max_steps=24", "train.max_steps: 12 when checkpoint-6 was written, now 24; it may only grow"),
    ],
)
def test_a_changed_field_is_refused_by_name(half: Path, override: str, said: str) -> None:
    before = sorted((half.parent / "run").rglob("*"))
    with pytest.raises(ResumeError, match="cannot be resumed with these changes") as error:
        train(instructft.load_recipe(half, [override]), console=QUIET)
    assert said in str(error.value)
    assert error.value.exit_code == 2
    assert sorted((half.parent / "run").rglob("*")) == before


def test_what_is_free_may_change(half: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(half.parent / "run", run)
    free = ["train.logging_steps=1", "train.eval_steps=6", "train.save_steps=5", "samples=[Hello]", f"output_dir={run}"]
    free += ["train.dataloader_num_workers=1", "train.dataloader_prefetch_factor=1"]
    train(instructft.load_recipe(half, free), console=QUIET)
    assert weights(run) == weights(uninterrupted)


def test_a_damaged_checkpoint_is_passed_over_and_named(half: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(half.parent / "run", run)
    newest = run / "checkpoint-6" / "optimizer.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    recipe = instructft.load_recipe(half, [f"output_dir={run}"])
    with pytest.raises(ResumeError, match=r"checkpoint-6: optimizer.pt is not what was written"):
        train(recipe, resume="checkpoint-6", console=QUIET)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    result = train(recipe, console=console)
    said = " ".join(console.export_text().split())
    assert "checkpoint-6: optimizer.pt is not what was written (its SHA-256 differs)" in said
    assert "resuming from" in said
    assert "checkpoint-3, 3 steps done" in said
    assert weights(run) == weights(uninterrupted)
    assert result.facts["train"]["resumed"][0]["passed_over"]


def test_never_and_a_finished_run(uninterrupted: Path) -> None:
    recipe = instructft.load_recipe(uninterrupted.parent / "full.yaml")
    with pytest.raises(UsageError, match="already holds a run"):
        train(recipe, resume="never", console=QUIET)
    before = (uninterrupted / "model.safetensors").stat().st_mtime_ns
    assert train(recipe, console=QUIET).facts["train"]["steps"] == 12
    assert (uninterrupted / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_with_a_constant_schedule_may_grow(write: Any, tmp_path: Path) -> None:
    path = write(**{"learning_rate: 1e-2": "learning_rate: 1e-2, lr_scheduler_type: constant"})
    short = train(instructft.load_recipe(path, ["train.max_steps=6"]), console=QUIET)
    assert short.facts["train"]["steps"] == 6
    grown = train(instructft.load_recipe(path), console=QUIET)
    assert grown.facts["train"]["resumed"][0]["changed"] == {"train.max_steps": [6, 12]}
    whole = train(instructft.load_recipe(path, [f"output_dir={tmp_path / 'whole'}"]), console=QUIET)
    assert weights(grown.output_dir) == weights(whole.output_dir)


def test_a_full_disk_leaves_the_checkpoint_before(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space runs out while the second checkpoint is written, though there seemed to be enough."""
    import torch

    recipe = instructft.load_recipe(write())
    real, calls = torch.save, []

    def full(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        if "checkpoint-6" in str(path):
            raise OSError(28, "No space left on device")
        real(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-6 could not be written: the disk is full; checkpoint-3 stands"
    ):
        train(recipe, console=QUIET)
    run = Path(recipe.output_dir)
    assert verify(run / "checkpoint-3").step == 3
    assert not (run / "run.json").exists()


class Poison(TrainerCallback):
    """Puts what is no number where it can come from: what the model computes (`loss`), a gradient, its norm alone."""

    def __init__(self, what: str, step: int):
        self.what, self.step = what, step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            if self.what == "loss":
                model.transformer.ln_f.register_forward_hook(lambda *a: a[-1] * float("nan"))
            else:  # every element of 1e30 is finite, and the norm is not: clipped, such a gradient is zero
                by = {"gradient": float("inf"), "norm": 1e30}[self.what]
                model.transformer.wte.weight.register_hook(lambda grad: grad.sign() * by)


@pytest.mark.parametrize("what", ["loss", "gradient", "norm"])
def test_a_step_that_is_not_a_number_is_not_taken(write: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    recipe = instructft.load_recipe(write())
    run = Path(recipe.output_dir)
    with monkeypatch.context() as patch:
        interrupt(patch, Poison(what, 5))
        with pytest.raises(NotFiniteError, match=r"step 5: .* not a finite number; the step was not taken") as error:
            train(recipe, console=QUIET)
    rows = [json.loads(line) for line in (run / "not-finite-5-0.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all("### Response:" in row["text"] for row in rows)
    assert {row["loss"] == "nan" for row in rows} == {what == "loss"}
    assert ("8 of its 8 rows" in str(error.value)) == (what == "loss")
    assert verify(run / "checkpoint-3").step == 3
    assert not any("nan" in str(line.get("loss")) for line in logged(run))
    assert train(recipe, console=QUIET).facts["train"]["resumed"][0]["step"] == 3


def test_not_a_number_in_the_first_step_leaves_no_run(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to go on with, so the same command begins anew."""
    recipe = instructft.load_recipe(write(), ["train.max_steps=2"])
    with monkeypatch.context() as patch:
        interrupt(patch, Poison("loss", 1))
        with pytest.raises(NotFiniteError):
            train(recipe, console=QUIET)
    assert (Path(recipe.output_dir) / "not-finite-1-0.jsonl").is_file()
    assert train(recipe, console=QUIET).facts["train"]["resumed"] == []
    assert not list(Path(recipe.output_dir).glob("not-finite-*"))


def test_retention_keeps_the_newest(uninterrupted: Path) -> None:
    assert sorted(p.name for p in uninterrupted.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


def test_an_older_checkpoint_begins_a_line_of_its_own(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished run: its later checkpoints and its `run.json` are set aside, unseen by retention and `auto`."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    recipe = instructft.load_recipe(
        uninterrupted.parent / "full.yaml", [f"output_dir={run}", "train.save_total_limit=1", "train.save_steps=1"]
    )
    console = Console(record=True, width=200, file=io.StringIO())
    with monkeypatch.context() as patch:
        interrupt(patch, SignalAt("step", 10))
        with pytest.raises(Stopped, match="checkpoint-11 is saved"):
            train(recipe, resume="checkpoint-9", console=console)
    said = " ".join(console.export_text().split())
    assert f"set aside: checkpoint-12 now in {run}/set-aside-1; the run continues from checkpoint-9" in said
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-11"]
    assert sorted(path.name for path in (run / "set-aside-1").iterdir()) == ["checkpoint-12", "run.json"]
    assert verify(run / "set-aside-1" / "checkpoint-12").step == 12
    result = train(recipe, console=QUIET)
    assert [resume["step"] for resume in result.facts["train"]["resumed"]] == [9, 11]
    assert weights(run) == weights(uninterrupted)
    assert logged(run) == logged(uninterrupted)


def test_an_evaluation_before_the_first_step_is_not_made_again(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = instructft.load_recipe(write(), ["train.eval_on_start=true", "train.max_steps=6"])
    whole = train(recipe, console=QUIET).output_dir.rename(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, SignalAt("step", 1))
        with pytest.raises(Stopped):
            train(recipe, console=QUIET)
    assert logged(train(recipe, console=QUIET).output_dir) == logged(whole)
