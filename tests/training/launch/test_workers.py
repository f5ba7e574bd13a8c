"""Real processes that are stopped and resumed, their one exit code, and none left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from instructft.checkpoints.manifest import verify
from instructft.training.launch.workers import exit_code
from tests.conftest import BATTERY, OWN_PORT
from tests.helpers.processes import launch
from tests.helpers.telling import telling

REPO = Path(__file__).resolve().parents[3]
ACCELERATE = REPO / "recipes" / "accelerate"
ENVIRONMENT = {**os.environ, **OWN_PORT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
COMMAND = [sys.executable, "-m", "instructft", "launch"]


RECIPE = """
model:
  config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 64}
  tokenizer: quickstart
data: {datasets: [{name: quickstart, rows: 40}], template: instruction, max_length: 64, splits: {validation: 0}}
train: {max_steps: 60, per_device_train_batch_size: 2, logging_steps: 1, save_steps: 1000, report_to: none}
"""


def wait_for(true: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command, running; should the test fail, nothing of it goes on."""
    launcher = subprocess.Popen(command, env=ENVIRONMENT, text=True, **options)
    below: list[psutil.Process] = []
    try:
        yield launcher
    except BaseException:
        below = psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []
        raise
    finally:
        for process in [*below, launcher]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.communicate()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.timeout(400)
def test_a_run_on_two_processes_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """Real workers on the CPU: SIGTERM to the launcher is 143 and a sealed checkpoint; the same command goes on.

    The second time without the launcher, of which a start takes longer than the run; `make battery` takes it again.
    """
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(f"{RECIPE}output_dir: {out}\n")
    command = [*COMMAND, str(recipe), "--processes", "2"]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launcher:
        wait_for(lambda: steps(out) >= 3 or launcher.poll() is not None)
        below = psutil.Process(launcher.pid).children(recursive=True)
        launcher.terminate()
        said, _ = launcher.communicate(timeout=60)
        assert launcher.returncode == 143, said
    assert len(below) >= 3  # what runs accelerate, and two workers
    wait_for(lambda: not alive(below), seconds=5)
    assert "Traceback" not in said
    (checkpoint,) = out.glob("checkpoint-*")
    stopped_at = verify(checkpoint).step
    assert f"stopped by SIGTERM; checkpoint-{stopped_at} is saved" in said
    assert not (out / "run.json").exists()

    train = ["-m", "instructft", "train"]
    if BATTERY:
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    else:
        done = launch(str(ACCELERATE / "ddp.yaml"), [*train, str(recipe), "train.use_cpu=true"], tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    facts = json.loads((out / "run.json").read_text())
    assert facts["hardware"]["processes"] == 2
    assert facts["train"]["steps"] == 60
    assert [resumed["step"] for resumed in facts["train"]["resumed"]] == [stopped_at]
    assert (out / "model.safetensors").is_file()


# Workers that need no torch; each says in a file that it is there.
WORKER = """
import os, signal, subprocess, sys, time
rank = os.environ["RANK"]
def here(name):
    open(name + rank, "w").write(str(os.getpid()))
def stray():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    open("stray" + rank, "w").write(str(child.pid))
"""
ENDS = {
    "does what it should": ("", 0, ""),
    # one fails and leaves a process behind; the other waits for it
    "fails": ("if rank == '1': stray(); sys.exit(1)\ntime.sleep(300)", 1, ""),
    "finds a fault": ("sys.exit(2 if rank == '0' else 1)", 2, ""),
    "is killed": ("if rank == '1': os.kill(os.getpid(), 9)\ntime.sleep(300)", 1, "rank 1 was killed by SIGKILL"),
}


def launched(folder: Path, body: str) -> list[str]:
    """A command that runs two workers with this body, as `instructft launch` runs them."""
    (folder / "worker.py").write_text(WORKER + body)
    arguments = ["--config_file", str(ACCELERATE / "ddp.yaml"), "--num_processes", "2", "worker.py"]
    return [
        sys.executable,
        "-c",
        f"import sys; from instructft.training.launch.workers import run; sys.exit(run({arguments!r}))",
    ]


@pytest.mark.parametrize("case", telling(ENDS, "fails", "is killed"))
def test_the_exit_code_is_that_of_the_workers(tmp_path: Path, case: str) -> None:
    body, wanted, said = ENDS[case]
    done = subprocess.run(
        launched(tmp_path, body), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == wanted, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    for note in tmp_path.glob("stray*"):
        wait_for(lambda note=note: not psutil.pid_exists(int(note.read_text())), seconds=5)


def test_a_second_signal_leaves_nothing_behind(tmp_path: Path) -> None:
    """Workers and a process of theirs that will not hear SIGTERM."""
    body = "signal.signal(signal.SIGTERM, lambda *_: here('told'))\nstray()\nhere('up')\nwhile True: time.sleep(0.1)"
    with started(launched(tmp_path, body), cwd=tmp_path) as launcher:
        wait_for(lambda: len(list(tmp_path.glob("up*"))) == 2)
        below = psutil.Process(launcher.pid).children(recursive=True)
        assert len(below) >= 5
        launcher.terminate()
        wait_for(lambda: len(list(tmp_path.glob("told*"))) == 2)
        time.sleep(1.2)  # sooner it would be taken for the same
        assert len(alive(below)) == len(below)
        launcher.terminate()
        began = time.monotonic()
        assert launcher.wait(10) == 143
        wait_for(lambda: not alive(below), seconds=5 - (time.monotonic() - began))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent was killed")
def test_workers_are_stopped_when_the_launcher_is_killed(tmp_path: Path) -> None:
    body = "def end(*_): here('told'); sys.exit(143)\nsignal.signal(signal.SIGTERM, end)\nhere('up')\ntime.sleep(300)"
    with started(launched(tmp_path, body), cwd=tmp_path) as launcher:
        wait_for(lambda: len(list(tmp_path.glob("up*"))) == 2)
        below = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
    wait_for(lambda: not alive(below), seconds=10)
    assert len(list(tmp_path.glob("told*"))) == 2


def test_one_exit_code_for_all() -> None:
    said = {(): 0, (0, 0): 0, (1, 143): 1, (-15, 2, 1): 2, (143, -15): 143, (-2, 130): 130, (-9, 143): 1, (3,): 1}
    assert {codes: exit_code(codes) for codes in said} == said


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler sends it to every process of a job, and the launcher passes it on to the workers."""
    from instructft.training import stopping as signals

    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(signals, "AGAIN", 0.3)
    with signals.Stop() as stopping:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stopping.signal, ends) == (signal.SIGTERM, [])
        time.sleep(0.35)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends == [143]
