"""The line of `instructft launch`, and what is said before anything is started."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructft import cli
from instructft.training.launch import command
from tests.conftest import OWN_PORT

REPO = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, **OWN_PORT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `instructft launch` in this process, on a machine with so many GPUs: exit code, stdout, stderr."""

    def run(*arguments: str, gpus: int = 8) -> tuple[int, str, str]:
        monkeypatch.setattr(command, "count_gpus", lambda: gpus)
        monkeypatch.setattr(sys, "argv", ["instructft", "launch", *arguments])
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(command, "_cores", lambda: 6)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))


# --------------------------------------------------------------------------------------------------------------------
# The line
# --------------------------------------------------------------------------------------------------------------------

TRAIN = "-m instructft train quickstart"
LINES = {
    "": f"single.yaml --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 6 {TRAIN}",
    "gpus=1": f"single.yaml --num_processes 1 --num_machines 1 {TRAIN}",
    "gpus=4": f"ddp.yaml --num_processes 4 --num_machines 1 {TRAIN}",
    "gpus=8 --processes 2": f"ddp.yaml --num_processes 2 --num_machines 1 {TRAIN}",
    "gpus=8 --strategy fsdp2": f"fsdp2.yaml --num_processes 8 --num_machines 1 {TRAIN}",
    "gpus=8 --strategy fsdp2 --context-parallel 4": "fsdp2_context.yaml --num_processes 8 --num_machines 1 "
    f"--parallelism_config_cp_size 4 --parallelism_config_dp_shard_size 2 {TRAIN}",
    "gpus=8 --strategy fsdp2 --context-parallel 1": f"fsdp2.yaml --num_processes 8 --num_machines 1 {TRAIN}",
    "gpus=8 --strategy zero2": f"zero2.yaml --num_processes 8 --num_machines 1 {TRAIN}",
    "gpus=8 --strategy zero3 --processes 3": f"zero3.yaml --num_processes 3 --num_machines 1 {TRAIN}",
    "gpus=1 --strategy fsdp2": f"fsdp2.yaml --num_processes 1 --num_machines 1 {TRAIN}",
    "gpus=0 --processes 2": "ddp.yaml --num_processes 2 --num_machines 1 --num_cpu_threads_per_process 3 "
    f"{TRAIN} train.use_cpu=true",
    "gpus=8 --machines 1 --machine-rank 0 --main-address x": f"ddp.yaml --num_processes 8 --num_machines 1 {TRAIN}",
    "gpus=8 --machines 4 --machine-rank 3 --main-address n0": "multi_node.yaml --num_processes 32 --num_machines 4 "
    f"--machine_rank 3 --main_process_ip n0 --main_process_port 29500 {TRAIN}",
    "gpus=8 --machines 2 --machine-rank 0 --main-address n0 --main-port 1234 --strategy fsdp2": "fsdp2.yaml "
    "--num_processes 16 --num_machines 2 --machine_rank 0 --main_process_ip n0 "
    f"--main_process_port 1234 {TRAIN}",
    "gpus=2 --resume checkpoint-40 'samples=[\"a b\"]'": "ddp.yaml --num_processes 2 --num_machines 1 "
    f"{TRAIN} 'samples=[\"a b\"]' --resume checkpoint-40",
}


@pytest.mark.parametrize("typed", LINES)
def test_a_dry_run_prints_the_line_and_runs_nothing(
    run: Any, nothing_runs: None, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(REPO)
    words = shlex.split(typed)
    gpus = int(words.pop(0)[5:]) if words and words[0].startswith("gpus=") else 0
    code, out, err = run("quickstart", *words, "--dry-run", gpus=gpus)
    assert (code, out, err) == (0, f"accelerate launch --config_file recipes/accelerate/{LINES[typed]}\n", "")

    args, *_ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(out)[2:]))
    assert f"--num_processes {args.num_processes} --num_machines {args.num_machines} " in out
    assert args.module
    assert [args.training_script, *args.training_script_args[:2]] == ["instructft", "train", "quickstart"]


def test_a_recipe_for_the_cpu_is_not_given_gpus(run: Any, nothing_runs: None) -> None:
    code, out, _ = run("quickstart", "train.use_cpu=true", "--processes", "2", "--dry-run", gpus=8)
    assert code == 0
    assert out.endswith("--num_cpu_threads_per_process 3 -m instructft train quickstart train.use_cpu=true\n")
    assert "--num_processes 1 " in run("quickstart", "train.use_cpu=true", "--dry-run", gpus=8)[1]


@pytest.mark.parametrize(
    ("typed", "gpus", "parts"),
    [
        ("--strategy fdsp", 8, ["--strategy: found fdsp, expected ddp, fsdp2, zero2 or zero3"]),
        ("--processes 0", 8, ["--processes: found 0, expected auto or a whole number from 1"]),
        ("--processes two", 8, ["--processes: found two"]),
        ("--processes -1 --strategy x", 8, ["--processes: found -1", "--strategy: found x"]),
        ("--machines 2", 8, ["--machine-rank is missing", "--main-address is missing"]),
        ("--machines 2 --machine-rank 2 --main-address x", 8, ["--machine-rank: found 2, expected 0 to 1"]),
        ("--processes 3", 2, ["--processes 3: found 2 GPUs", "use --processes 2, or train.use_cpu=true"]),
        ("--context-parallel 2", 8, ["--context-parallel 2: found --strategy ddp, expected fsdp2"]),
        ("--context-parallel 0 --strategy fsdp2", 8, ["--context-parallel: found 0, expected a whole number"]),
        (
            "--context-parallel 3 --strategy zero3 data.packing=true train.loss_type=dft",
            8,
            ["4 problems", "found --strategy zero3", "a multiple of 3", "data.packing: found true", "train.loss_type"],
        ),
        ("--context-parallel 2 --processes 2 --strategy fsdp2", 0, ["--strategy fsdp2: found no GPU"]),
        ("--strategy fsdp2", 0, ["--strategy fsdp2: found no GPU", "use --strategy ddp"]),
        ("--strategy zero2 train.use_cpu=true", 8, ["--strategy zero2: found no GPU to train on"]),
        ("train.max_stepps=1 data.max_length=long", 8, ["2 problems", "train.max_stepps", "data.max_length"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_started(
    run: Any, nothing_runs: None, typed: str, gpus: int, parts: list[str]
) -> None:
    code, out, err = run("quickstart", *typed.split(), gpus=gpus)
    assert (code, out) == (2, "")
    assert [part for part in parts if part not in err] == []
    assert "Traceback" not in err


def test_a_missing_deepspeed_is_named(run: Any, nothing_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run("quickstart", "--strategy", "zero3")
    assert (code, out) == (2, "")
    assert "pip install deepspeed" in err


def test_neither_a_bad_recipe_nor_a_dry_run_waits_for_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("data: {datasets: quickstart}\ntrian: 1\n")
    code = """
import sys
from instructft.errors import RecipeError
from instructft.training.launch.command import launch
try:
    launch("bad.yaml")
except RecipeError as error:
    print(error)
launch("quickstart", ["train.use_cpu=true"], processes="2", dry_run=True)
heavy = {"torch", "transformers", "accelerate", "numpy"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert 'trian: unknown key; did you mean "train"?' in done.stdout
    assert "accelerate launch --config_file" in done.stdout


def test_gpus_are_counted_by_torch_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert command.count_gpus() == torch.cuda.device_count()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")  # there may be some, so torch is asked
    asked: list[list[str]] = []

    def answer(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "a notice\n3\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    assert command.count_gpus() == 3
    assert asked == [[sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]]


# --------------------------------------------------------------------------------------------------------------------
# `instructft train` where there are several
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[str], str]]:
    """Runs `instructft train` on a machine with so many GPUs: what it starts, and what it prints."""

    def train(*arguments: str, gpus: int = 4) -> tuple[list[str], str]:
        started: list[str] = []
        monkeypatch.setattr(command, "count_gpus", lambda: gpus)
        monkeypatch.setattr(command, "_may_have_several_gpus", lambda: True)
        monkeypatch.setattr(command, "run", lambda line: (started.extend(line), 7)[1])
        monkeypatch.setattr("instructft.training.run.train", lambda *args, **kwargs: sys.exit(5))
        monkeypatch.setattr(sys, "argv", ["instructft", "train", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        err = "".join(line for line in err.splitlines(keepends=True) if not line.endswith(" …\n"))  # signs of life
        assert ended.value.code == (7 if started else 2 if err else 5)
        return started, out + err

    return train


def test_train_starts_a_process_for_each_gpu(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started, said = train("quickstart", "train.max_steps=2", "--resume", "never", "--no-rehearsal")
    line = shlex.join(started)
    assert "ddp.yaml --num_processes 4 --num_machines 1 -m instructft train quickstart train.max_steps=2" in line
    assert line.endswith("train.max_steps=2 --resume never --no-rehearsal")
    assert said.startswith("4 GPUs: one process for each (--processes 1 takes one of them)\naccelerate launch ")
    assert "--num_processes 2 " in shlex.join(train("quickstart", "--processes", "2")[0])


def test_train_stays_in_one_process(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("quickstart", gpus=1) == ([], "")
    assert train("quickstart", "train.use_cpu=true") == ([], "")
    assert train("quickstart", "--processes", "1") == ([], "")
    started, said = train("quickstart", "train.auto_find_batch_size=true")
    assert not started
    assert said == "4 GPUs: one of them is used, since train.auto_find_batch_size works in one process alone\n"
    monkeypatch.setenv("RANK", "3")  # a launcher has started this one
    assert train("quickstart") == ([], "")
    assert "a launcher has started this process" in train("quickstart", "--processes", "2")[1]


def test_processes_of_train_in_numbers(train: Any) -> None:
    assert "--processes: found two, expected auto or a whole number from 1" in train("quickstart", "--processes=two")[1]


@pytest.mark.battery  # test_workers.py has the same launch, stopped and resumed
@pytest.mark.timeout(300)
def test_train_in_two_processes_on_the_cpu(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    words = ["train", str(write_recipe()), "train.max_steps=2", "train.report_to=none", "--processes", "2"]
    line = [sys.executable, "-m", "instructft", *words]
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cpu × 2" in done.stdout
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (facts["hardware"]["processes"], facts["train"]["steps"]) == (2, 2)
