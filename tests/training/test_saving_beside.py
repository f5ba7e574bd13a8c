"""Checkpoints that a thread writes while training goes on: the same files, and the same end whatever happens to it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback

import instructft
import instructft.training.judging.budget as budget
import instructft.training.resumable as resumable
from instructft.checkpoints import manifest
from instructft.checkpoints.background import Writing
from instructft.errors import CheckpointError, DivergedError, Stopped
from instructft.training.resumable import Sealing
from instructft.training.trainer import Trainer
from tests.helpers.stops import interrupt

QUIET = Console(quiet=True)
BESIDE = "train.save_in_background=true"
STEPS = ("train.max_steps=6", "train.save_steps=2", "train.eval_strategy=no", "samples=[]")


@pytest.fixture
def run(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, *overrides: str) -> Path:
        given = [f"output_dir={tmp_path / name}", *STEPS, *overrides]
        return Path(instructft.train(instructft.load_recipe(write_recipe(), given), console=QUIET).output_dir)

    return run


class Held:
    """Holds the thread that writes until `opens` of the trainer says so, or somebody waits; notes what happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, opens: Callable[[int, int], bool] = lambda saved, now: False):
        self.events: list[str] = []
        self.taken: dict[int, int] = {}  # saved step -> the step that training had come to as it was sealed
        self._gate = threading.Event()
        self._trainer: Any = None
        seal, begin, wait, step = Sealing._seal, manifest.begin, Writing.wait, Trainer.training_step

        def sealing(of: Sealing, folder: Path, later: Any, best: Any, saved: int) -> None:
            self._trainer, self._saved = of.trainer, saved
            aside = threading.current_thread() is not threading.main_thread()
            if aside:
                assert self._gate.wait(60)
                assert manifest.kind(folder) == "cut short"
                assert of.last != folder.name
            seal(of, folder, later, best, saved)
            self.taken[saved] = of.trainer.state.global_step
            self.events.append(f"sealed {saved}")
            self._gate.clear()

        def beginning(folder: Path) -> None:
            self.events.append(f"begun {manifest.step_of(folder)}")
            begin(folder)

        def waiting(of: Writing) -> None:
            self.events.append("waits")
            self._gate.set()
            wait(of)

        def stepping(of: Trainer, *args: Any, **kwargs: Any) -> Any:
            if self._trainer is not None and opens(self._saved, of.state.global_step):
                self._gate.set()
            return step(of, *args, **kwargs)

        monkeypatch.setattr(Sealing, "_seal", sealing)
        monkeypatch.setattr(manifest, "begin", beginning)
        monkeypatch.setattr(Writing, "wait", waiting)
        monkeypatch.setattr(Trainer, "training_step", stepping)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No thread, and no open file of a checkpoint."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "instructft-checkpoint"]
    links = Path("/proc/self/fd").glob("*")  # nothing where there is no /proc
    opened = [os.readlink(link) for link in links if link.is_symlink()]
    assert not [name for name in opened if name.startswith(str(tmp_path)) and "checkpoint-" in name]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The same files


@pytest.fixture
def base(moved_run: Path) -> Path:
    """A tiny base model on the disk."""
    return shutil.move(moved_run, moved_run.with_name("base"))


@pytest.mark.parametrize("kind", ["full", "adapter", "shards"])
def test_the_files_are_those_of_a_checkpoint_that_training_waits_for(
    kind: str, run: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is saved twice: waited for, then beside, by a thread that is held until the next save waits for it."""
    lora = ["model.config=null", f"model.name_or_path={base}", "adapter.type=lora", "adapter.r=4"]
    given = ["train.save_steps=1", *(lora if kind == "adapter" else ())]
    if kind == "shards":
        save = PreTrainedModel.save_pretrained
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *a, **k: save(*a, **k, max_shard_size="50KB"))
    with monkeypatch.context() as patch:
        held, write, clock = Held(patch), Trainer._write_checkpoint, [0.0]
        patch.setattr(resumable, "time", SimpleNamespace(perf_counter=lambda: clock[0]))  # for progress_0.json
        patch.setattr(budget, "CLOCK", lambda: clock[0])

        def twice(self: Trainer, model: Any, trial: Any, beside: bool = False) -> None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            clock[0] += 1
            self.budget._costs["checkpoints"] = 0.0  # the second time, too, it knows of a first
            write(self, model, trial)
            shutil.copytree(folder, tmp_path / "waited" / folder.name)
            self.sealing.last = None
            write(self, model, trial, beside)

        patch.setattr(Trainer, "_write_checkpoint", twice)
        done = run("beside", BESIDE, *given)
    for step in range(1, 7):
        waited, beside = (contents(folder / f"checkpoint-{step}") for folder in (tmp_path / "waited", done))
        assert sorted(waited) == sorted(beside)
        assert [name for name in waited if waited[name] != beside[name]] == []
        assert {"optimizer.pt", "trainer_state.json", "rng_state.pth", "manifest.json"} <= set(beside)
        assert sum(name.endswith(".safetensors") for name in beside) > (kind == "shards")
    assert held.events.count("waits") >= 5
    assert weights(done) == weights(run("waited for", "train.save_in_background=false", *given))


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


# Beside training


def test_training_goes_on_while_a_checkpoint_is_written(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, opens=lambda saved, now: now >= saved + 2)
    run("a", BESIDE, "train.max_steps=8", "train.save_steps=4")
    assert held.taken[4] >= 6
    assert held.taken[8] == 8  # the last one: there is nothing to go on with


def test_the_next_save_waits_for_the_one_before(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    run("a", BESIDE)
    told = ["begun 2", "waits", "sealed 2", "begun 4", "waits", "sealed 4", "begun 6", "sealed 6"]
    assert held.events == told


def test_the_weights_that_are_written_are_those_of_their_step(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Held(monkeypatch)
    held, now = run("held", BESIDE), run("waited", "train.save_in_background=false")
    for step in (2, 4, 6):
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            of = f"checkpoint-{step}/{name}"
            assert (held / of).read_bytes() == (now / of).read_bytes(), of


def test_a_callback_that_may_read_a_checkpoint_finds_it_whole(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    class Reads(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(manifest.verify(Path(args.output_dir) / f"checkpoint-{state.global_step}").step)

    interrupt(monkeypatch, Reads())
    run("a", BESIDE)
    assert found == [2, 4, 6]


def test_uploads_get_what_is_sealed_and_what_is_kept(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def sealed(folder: Path, step: int, tokens: int, loss: float | None, keep: list[str]) -> None:
        found.append((manifest.verify(folder).step, step, tokens > 0, sorted(keep)))

    publisher = SimpleNamespace(checkpoint_sealed=sealed)
    start = Trainer.train

    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.publisher = publisher  # type: ignore[assignment]
        return start(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train)
    Held(monkeypatch)
    run("a", BESIDE, "train.save_total_limit=1", "train.load_best_model_at_end=false")
    assert found == [(n, n, True, [f"checkpoint-{n}"]) for n in (2, 4, 6)]


def test_a_checkpoint_that_host_memory_has_no_room_for_is_waited_for(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    monkeypatch.setattr(resumable, "has_room", lambda copy: False)
    with (tmp_path / "said").open("w") as file:
        recipe = instructft.load_recipe(write_recipe(), [*STEPS, BESIDE])
        instructft.train(recipe, console=Console(file=file, soft_wrap=True))
    assert "waits" not in held.events
    said = (tmp_path / "said").read_text()
    assert said.count("checkpoint-2 is written while training waits: host memory has no room for a copy") == 1
    assert "checkpoint-4 is written" not in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_processes_that_load_rows_are_forked_while_a_checkpoint_is_written(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, opens=lambda saved, now: now > saved)
    given = ("train.max_steps=9", "train.save_steps=4", "data.datasets.0.rows=20", "data.splits.test=0")
    loaded = run("loaded", BESIDE, "train.dataloader_num_workers=2", *given)  # an epoch has four steps
    assert held.taken[4] > 4
    assert weights(loaded) == weights(run("plain", "train.save_in_background=false", *given))


# The best one


BEST = ("train.eval_strategy=steps", "train.eval_steps=2", "train.learning_rate=0.1", "train.max_steps=12")
BEST += ("train.on_divergence=warn",)
BEST += ("train.save_total_limit=1", "train.load_best_model_at_end=true")


@pytest.mark.parametrize("more", [(), ("train.early_stopping_patience=1",), ("train.save_strategy=best",)])
def test_the_best_checkpoint_is_the_same(more: tuple[str, ...], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = run("waited", "train.save_in_background=false", *BEST, *more)
    Held(monkeypatch)
    beside = run("beside", BESIDE, *BEST, *more)
    names = [sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (waited, beside)]
    assert names[0] == names[1]
    facts = [json.loads((folder / "run.json").read_text())["train"] for folder in (waited, beside)]
    for key in ("steps", "best", "stopped_early"):
        assert facts[0].get(key) == facts[1].get(key), key
    assert facts[0]["best"]["step"] < facts[0]["steps"]
    assert weights(waited) == weights(beside)


# Trouble


def full_disk_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = manifest.seal

    def sealing(folder: Path, *args: Any) -> None:
        if manifest.step_of(folder) == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(folder, *args)

    monkeypatch.setattr(manifest, "seal", sealing)


def test_a_full_disk_is_told_as_ever_and_the_run_goes_on_from_what_stands(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    whole = weights(run("whole"))
    with monkeypatch.context() as patch:
        full_disk_at(4, patch)
        for name, beside in (("a", "train.save_in_background=false"), ("b", BESIDE)):
            with pytest.raises(CheckpointError) as found:
                run(name, beside)
            said.append(str(found.value).replace(f"/{name}/", "/run/"))
            assert not (tmp_path / name / "run.json").exists()
            assert [path.name for path in manifest.folders(tmp_path / name) if manifest.kind(path) == "sealed"] == [
                "checkpoint-2"
            ]
    assert said[0] == said[1]
    assert said[0].endswith("checkpoint-4 could not be written: the disk is full; checkpoint-2 stands")
    assert weights(run("b", BESIDE)) == whole


def test_a_failure_ends_the_run_before_its_next_step(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk_at(2, monkeypatch)
    steps = []

    class Waits(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)
            for thread in threading.enumerate():
                if thread.name == "instructft-checkpoint":
                    thread.join()

    interrupt(monkeypatch, Waits())
    with pytest.raises(CheckpointError, match="checkpoint-2 could not be written"):
        run("a", BESIDE, "train.max_steps=20", "train.save_steps=2")
    assert steps in ([1, 2], [1, 2, 3])


def test_one_that_fails_as_the_run_ends_leaves_no_end(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best step was saved beside; after it nothing is saved, and what failed is told before the run has ended."""
    best = ("train.save_strategy=best", "train.metric_for_best_model=eval_loss", "train.eval_strategy=steps")
    given = (*best, "train.eval_steps=2", "train.max_steps=3", "train.load_best_model_at_end=false")
    full_disk_at(2, monkeypatch)
    Held(monkeypatch)
    with pytest.raises(CheckpointError, match="checkpoint-2 could not be written"):
        run("a", BESIDE, *given)
    assert "train_loss" not in (tmp_path / "a" / "metrics.jsonl").read_text()
    assert not (tmp_path / "a" / "run.json").exists()


class Fails(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise ValueError("a row is not there")


@pytest.mark.parametrize("full", [False, True], ids=["written", "a full disk"])
def test_a_run_that_fails_waits_for_its_checkpoint_and_tells_its_own_failure(
    full: bool, write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if full:
        full_disk_at(2, monkeypatch)
    held = Held(monkeypatch)
    interrupt(monkeypatch, Fails())
    recipe = instructft.load_recipe(write_recipe(), [*STEPS, BESIDE])
    with (tmp_path / "said").open("w") as file, pytest.raises(ValueError, match="a row is not there"):
        instructft.train(recipe, console=Console(file=file, soft_wrap=True))
    assert ("sealed 2" in held.events) is not full
    said = (tmp_path / "said").read_text()
    assert ("checkpoint-2 could not be written: the disk is full" in said) is full
    assert "ValueError after step 3; checkpoint-3 is saved" in said
    kept = ["checkpoint-3"] if full else ["checkpoint-3", "checkpoint-2"]
    assert [path.name for path in manifest.folders(tmp_path / "run") if manifest.kind(path) == "sealed"] == kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize("at", ["before the files", "after the weights", "before the manifest", "in the manifest"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    at: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills at seeded moments of any kind are `tests/integration/test_resume.py`'s, with the battery."""
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        kill_in_the_thread(at, monkeypatch)
        with contextlib.suppress(BaseException):
            run("a", BESIDE)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    kinds = {path.name: manifest.kind(path) for path in manifest.folders(tmp_path / "a")}
    assert kinds == {"checkpoint-4": "cut short", "checkpoint-2": "sealed"}
    assert (tmp_path / "a" / "checkpoint-4" / "model.safetensors").is_file() is (at != "before the files")
    assert weights(run("a", BESIDE)) == weights(run("whole", "train.save_in_background=false"))


def kill_in_the_thread(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill this process while it writes the checkpoint of step 4, once a further step has been taken."""

    def hit(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            aside = threading.current_thread() is not threading.main_thread()
            if aside and any("checkpoint-4" in str(arg) for arg in args if isinstance(arg, str | Path)):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    hit(*{
        "before the files": (Sealing, "_seal"),
        "after the weights": (torch, "save"),
        "before the manifest": (manifest, "seal"),
        "in the manifest": (Path, "replace"),
    }[at])  # fmt: skip
    Held(monkeypatch, opens=lambda saved, now: saved == 2 or now > saved)


def test_a_run_that_diverges_names_the_checkpoint_that_was_being_written(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    with pytest.raises(DivergedError) as found:
        run("a", BESIDE, "train.learning_rate=0.3", "train.save_steps=1", *BEST[:2])
    assert str(found.value).startswith("step 2:")
    assert f"the newest checkpoint is {tmp_path / 'a'}/checkpoint-1." in str(found.value)
    assert held.events == ["begun 1", "waits", "sealed 1"]


def test_a_signal_while_a_checkpoint_is_written_saves_its_step_too(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        held = Held(patch)
        interrupt(patch, Signal())
        with pytest.raises(Stopped, match="stopped by SIGTERM; checkpoint-3 is saved"):
            run("a", BESIDE)
    assert held.events == ["begun 2", "waits", "sealed 2", "begun 3", "sealed 3"]
    for step in (2, 3):
        manifest.verify(tmp_path / "a" / f"checkpoint-{step}")
    assert weights(run("a", BESIDE)) == weights(run("whole"))
