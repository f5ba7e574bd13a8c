"""A run that goes on from the Hub, on a machine that has nothing of it: to the same bits, or refused with a word."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback

import instructft
from instructft.checkpoints.manifest import folders, verify
from instructft.errors import ResumeError, Stopped
from instructft.hub.background import Publisher
from instructft.hub.resume import newest_on_hub
from instructft.training.run import train
from tests.helpers.stops import SignalAt, interrupt

QUIET = Console(quiet=True)
REPO = "tester/support"
RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 16, n_positions: 64}
  tokenizer: quickstart
data:
  datasets: [{path: ROWS}]
  template: instruction
  max_length: 64
  splits: {validation: 0.1}
train:
  {max_steps: 12, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, logging_steps: 2, eval_steps: 3,
   save_steps: 3, use_cpu: true, learning_rate: 1e-2, report_to: none}
"""


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    """Makes the recipe of a machine: its own folders, the same rows in a file of its own."""

    def make(name: str, *overrides: str, push: str = "checkpoints") -> Any:
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        rows = [{"prompt": f"How much is {i} and {i + 1}?", "completion": f"It is {2 * i + 1}."} for i in range(60)]
        (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (home / "support.yaml").write_text(RECIPE.replace("ROWS", str(home / "rows.jsonl")))
        hub = ["hub.repo_id=support", f"hub.push={push}", f"output_dir={home / 'run'}"] if push != "none" else []
        return instructft.load_recipe(home / "support.yaml", [f"output_dir={home / 'run'}", *hub, *overrides])

    return make


def stopped(recipe: Any, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a signal ends in the step after `at`; its checkpoints are on the Hub, each of them.

    Of checkpoints that come faster than they can be uploaded only the newest would be.
    """
    sealed = Publisher.checkpoint_sealed

    def uploaded(self: Publisher, *args: Any) -> None:
        sealed(self, *args)
        assert self.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "checkpoint_sealed", uploaded)
        interrupt(patch, SignalAt("step", at))
        with pytest.raises(Stopped):
            train(recipe, console=QUIET)


def weights(run: str | Path) -> bytes:
    return (Path(run) / "model.safetensors").read_bytes()


def logged(run: str | Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "train_loss")
    return [{key: line[key] for key in kept if key in line} for line in lines]


def checkpoints(hub: Any, inside: str = "") -> list[str]:
    files = hub.files(REPO)
    return sorted(f.split("/")[-2] for f in files if f.startswith(inside) and f.endswith("/manifest.json"))


@pytest.mark.parametrize("place", ["", "instruct/"])
def test_a_clean_machine_goes_on_bit_for_bit(
    hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    inside = [f"hub.path_in_repo={place}"] if place else []
    whole = train(machine("whole", push="none"), console=QUIET)
    stopped(machine("first", *inside), 6, monkeypatch)
    assert len(checkpoints(hub, place)) == 3
    told = Console(record=True, file=io.StringIO(), soft_wrap=True)
    result = train(machine("second", *inside), console=told)
    assert result.facts["train"]["resumed"][0]["step"] == 7
    assert result.facts["train"]["resumed"][0]["changed"] == {}
    assert weights(result.output_dir) == weights(whole.output_dir)
    assert logged(result.output_dir) == logged(whole.output_dir)
    assert "checkpoint-7, 7 steps done; every byte of it verified" in told.export_text()
    assert result.pushed is not None
    assert result.pushed.pushed
    assert hub.files(REPO)[f"{place}model.safetensors"] == weights(whole.output_dir)
    assert not (result.output_dir / ".fetch").exists()


def test_one_that_is_damaged_on_the_hub_is_passed_over(
    hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped(machine("first"), 6, monkeypatch)
    files = hub.files(REPO)
    by_step = {
        json.loads(files[f])["manifest"]["step"]: f.rpartition("/")[0] for f in files if f.endswith("manifest.json")
    }
    assert sorted(by_step) == [3, 6, 7]
    hub.put(REPO, {}, delete=[f"{by_step[7]}/optimizer.pt"])
    damaged = bytearray(files[f"{by_step[6]}/model.safetensors"])
    damaged[-1] ^= 1
    hub.put(REPO, {f"{by_step[6]}/model.safetensors": bytes(damaged)})
    found, passed = newest_on_hub(machine("second").hub, tmp_path / "second" / "run")
    assert found is not None
    assert found.step == 3
    assert verify(found.folder).step == 3
    assert [by_step[7] in passed[0], by_step[6] in passed[1]] == [True, True]
    assert "optimizer.pt is missing" in passed[0]
    assert "model.safetensors is not what was written" in passed[1]
    result = train(machine("second"), console=QUIET)
    assert result.facts["train"]["resumed"][0]["step"] == 3


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"manifest": {"step": 7}}', '{"manifest": {"step": "x", "files": {}}}']
)
def test_a_manifest_that_cannot_be_read_is_passed_over(
    hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    stopped(machine("first"), 3, monkeypatch)
    newest = max(
        checkpoints(hub), key=lambda name: json.loads(hub.files(REPO)[f"{name}/manifest.json"])["manifest"]["step"]
    )
    hub.put(REPO, {f"{newest}/manifest.json": content})
    found, passed = newest_on_hub(machine("second").hub, tmp_path / "second" / "run")
    assert found is not None
    assert found.step == 3
    assert passed == [f"{REPO}/{newest}: manifest.json is not what was written"]


def test_none_that_is_whole_stops_the_run(hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(machine("first", "train.save_steps=100"), 3, monkeypatch)
    (name,) = checkpoints(hub)
    hub.put(REPO, {}, delete=[f"{name}/scheduler.pt"])
    second = machine("second", "train.save_steps=100")
    with pytest.raises(ResumeError, match=r"(?s)none of the checkpoints in tester/support is whole.*scheduler.pt"):
        train(second, console=QUIET)
    assert not list(folders(Path(second.output_dir)))


def test_an_unreachable_hub_is_no_fresh_start(hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fault("info", "503", 99)
    hub.fault("whoami", "503", 99)
    recipe = machine("first")
    with pytest.raises(ResumeError, match=r"(?s)whether support holds a checkpoint.*503.*--resume never"):
        train(recipe, console=QUIET)
    assert not Path(recipe.output_dir).exists()


def test_a_repository_without_checkpoints_is_a_fresh_start(hub: Any, machine: Any) -> None:
    hub.create(REPO, private=True)
    hub.put(REPO, {"README.md": "# mine", "checkpoint-5/notes.txt": "not ours"})
    result = train(machine("first", "train.max_steps=2", push="end"), console=QUIET)
    assert result.facts["train"]["resumed"] == []
    assert hub.files(REPO)["checkpoint-5/notes.txt"] == b"not ours"


def test_another_run_in_the_same_place_is_refused(hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(machine("first", "train.save_steps=100"), 3, monkeypatch)
    with pytest.raises(ResumeError, match=r"train\.seed: 42 when checkpoint-4 was written, now 7"):
        train(machine("second", "train.seed=7", "train.save_steps=100"), console=QUIET)


def test_the_best_checkpoint_comes_too(hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights become the model at the end, though it is not the newest."""
    # the greatest loss counts as the best, so that it is the first one
    first = ("train.load_best_model_at_end=true", "train.greater_is_better=true", "train.save_total_limit=1")
    whole = train(machine("whole", *first, push="none"), console=QUIET)
    stopped(machine("first", *first), 6, monkeypatch)
    result = train(machine("second", *first), console=QUIET)
    assert weights(result.output_dir) == weights(whole.output_dir) == weights(whole.output_dir / "checkpoint-3")
    assert json.loads((result.output_dir / "checkpoint-12/trainer_state.json").read_text())["best_global_step"] == 3


@pytest.mark.parametrize("kind", ["reset_midway", "drop", "503"])
def test_a_download_that_breaks_is_tried_again(
    hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    import time

    stopped(machine("first", "train.save_steps=100"), 3, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.fault("resolve", kind, 5)
    found, passed = newest_on_hub(machine("second").hub, tmp_path / "second" / "run")
    assert found is not None
    assert (found.step, passed) == (4, [])


@pytest.mark.battery  # in one process: test_a_clean_machine_goes_on_bit_for_bit
def test_by_the_command_on_another_machine(
    hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process of its own, with a home of its own; and nothing in the run folder but what the Hub gave it."""
    stopped(machine("first"), 6, monkeypatch)
    second = machine("second")
    (tmp_path / "second" / "whole.yaml").write_text(second.to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "instructft", "train", str(tmp_path / "second" / "whole.yaml")],
        env={**os.environ, **hub.environment(tmp_path / "home")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "7 steps done" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"pushed {hub.url}/{REPO}")
    # and the token is nowhere but in the headers of requests
    canary = hub.token.encode()
    assert any(canary in str(request.headers).encode() for request in hub.requests)
    written = [path for path in (tmp_path / "second").rglob("*") if path.is_file()]
    assert len(written) > 20
    leaks = [str(path) for path in written if canary in path.read_bytes()]
    leaks += [request.path for request in hub.requests if canary in request.body or canary in request.path.encode()]
    leaks += [path for path, content in hub.files(REPO).items() if canary in content]
    assert leaks == []
    assert hub.token not in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["503", "drop"])
def test_a_hub_that_dies_during_a_run_does_not_end_it(
    hub: Any, machine: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The run is finished and whole; its last line says what was not pushed, and the command that would."""
    from instructft.commands.train import print_outcome

    recipe = machine("first")
    hub.create(REPO, private=True)

    class Dies(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                for route in ("info", "whoami", "create", "commit"):
                    hub.fault(route, kind, 10_000)

    with monkeypatch.context() as patch:
        interrupt(patch, Dies())
        result = train(recipe, console=QUIET)
    assert result.facts["train"]["steps"] == 12
    assert result.pushed is not None
    assert not result.pushed.pushed
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", said)
    print_outcome(result)
    monkeypatch.undo()
    *_, reason, command = said.getvalue().rstrip().splitlines()
    assert reason.startswith("not pushed: ")
    assert command.strip() == f"instructft push {recipe.output_dir} support"
