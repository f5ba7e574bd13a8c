"""`instructft launch`: its line, real processes that are stopped and go on, and the recipes for clusters."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from instructft import cli
from instructft.checkpoints.manifest import verify
from instructft.launch import command
from instructft.launch.workers import exit_code
from instructft.recipe.schema import shipped_recipes
from tests.conftest import OWN_PORT

REPO = Path(__file__).resolve().parents[2]
ACCELERATE = REPO / "recipes" / "accelerate"
CLUSTER = REPO / "recipes" / "cluster"
NAMES = sorted(path.stem for path in ACCELERATE.iterdir())
ENVIRONMENT = {**os.environ, **OWN_PORT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
COMMAND = [sys.executable, "-m", "instructft", "launch"]


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
from instructft.launch.command import launch
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
# Processes
# --------------------------------------------------------------------------------------------------------------------

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
    """Real workers on the CPU: SIGTERM to the launcher is 143 and a sealed checkpoint; the same command ends with 0."""
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

    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
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
        f"import sys; from instructft.launch.workers import run; sys.exit(run({arguments!r}))",
    ]


@pytest.mark.parametrize("case", ENDS)
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
    monkeypatch.setattr(signals, "_AGAIN", 0.3)
    with signals.Stop() as stopping:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stopping.signal, ends) == (signal.SIGTERM, [])
        time.sleep(0.35)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends == [143]


# --------------------------------------------------------------------------------------------------------------------
# Configs of accelerate
# --------------------------------------------------------------------------------------------------------------------


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = lines[lines[0].startswith("#!") :]
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("# ") and line != "#")])


def validated(name: str, *options: str) -> Any:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = str(ACCELERATE / f"{name}.yaml")
    words = ["--config_file", file, *options, "-m", "instructft", "train", "quickstart"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def test_all_are_there_and_none_is_taken_for_a_recipe() -> None:
    assert set(NAMES) == {"single", "ddp", "fsdp2", "zero2", "zero3", "fp8", "multi_node"}
    assert {path.name for path in CLUSTER.iterdir()} == {"slurm.sh", "kubernetes.yaml", "skypilot.yaml"}
    files = {path.relative_to(REPO / "recipes").parts[0] for path in (REPO / "recipes").rglob("*") if path.is_file()}
    assert files == {"accelerate", "cluster", *(path.name for path in shipped_recipes().values())}


@pytest.mark.parametrize("path", [*ACCELERATE.iterdir(), *CLUSTER.iterdir()], ids=lambda path: path.name)
def test_a_header_says_when_how_and_on_what(path: Path) -> None:
    said = header(path)
    for word in ["Launch:", "Hardware:", *(["Costs:"] if path.parent == ACCELERATE else ["Stopping:", "Tried:"])]:
        assert re.search(rf"^# {word} +\S", said, re.M), word
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert config.mixed_precision == ("fp8" if name == "fp8" else "no")
    parser = launch_command_parser()
    for section, prefix in (("fsdp_config", "fsdp_"), ("fp8_config", "fp8_"), ("deepspeed_config", "")):
        for key, value in getattr(config, section).items():
            # accelerate takes any key of a section without a word; as an option it is checked, and its value too
            option = f"--{key if key.startswith(prefix) else prefix + key}"
            parser.parse_args([option, str(value).lower() if option != "--fsdp_state_dict_type" else value, "x"])
    args = validated(name)
    kinds = ("multi_gpu", "use_fsdp", "use_deepspeed")
    kind = {"single": None, "fsdp2": "use_fsdp", "zero2": "use_deepspeed", "zero3": "use_deepspeed"}
    assert {key for key in kinds if getattr(args, key)} == {kind.get(name, "multi_gpu")} - {None}
    assert args.num_processes == {"single": 1, "multi_node": 16}.get(name, 2)
    assert validated(name, "--num_processes", "8").num_processes == 8


def test_what_fsdp2_comes_to() -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
    from accelerate.utils.launch import prepare_multi_gpu_env

    environment = prepare_multi_gpu_env(validated("fsdp2"))
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    assert (environment["ACCELERATE_USE_FSDP"], plugin.fsdp_version) == ("true", 2)
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


@pytest.mark.parametrize("stage", [2, 3])
def test_what_zero_comes_to(stage: int) -> None:
    from accelerate.utils import DeepSpeedPlugin, patch_environment
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args = validated(f"zero{stage}")
    args.deepspeed_fields_from_accelerate_config = ""
    command, environment = prepare_deepspeed_cmd_env(args)
    assert command is None  # torch starts the processes, with no pdsh
    with patch_environment(**environment):
        config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert config[key] == "auto", key  # the recipe says it


def test_several_machines_come_to_the_same_meeting_point() -> None:
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = validated("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.7")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert (args.rdzv_endpoint, args.rdzv_backend) == ("10.0.0.7:29500", "static")


def test_an_installed_wheel_finds_them(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPO, capture_output=True, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    environment = {**ENVIRONMENT, "PYTHONPATH": str(installed)}

    def said(*words: str) -> str:
        command = [sys.executable, "-m", "instructft", *words]
        return subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
        ).stdout

    line = said("launch", "quickstart", "train.use_cpu=true", "--processes", "2", "--dry-run")
    file = Path(shlex.split(line)[3])
    assert file == installed / "instructft" / "recipes" / "accelerate" / "ddp.yaml"
    assert file.read_bytes() == (ACCELERATE / "ddp.yaml").read_bytes()
    assert {row.split()[0] for row in said("recipes").splitlines()} == set(shipped_recipes())


# --------------------------------------------------------------------------------------------------------------------
# Clusters
# --------------------------------------------------------------------------------------------------------------------


class Stage:
    """A PATH on which `instructft` notes what it was asked, and then really prints its line; and other stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.put("instructft", f'"{sys.executable}" -m instructft "$@" --dry-run >>"$LOG"; exit ${{END:-0}}')

    def put(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, command: list[str], **environment: str) -> tuple[int, list[str], str]:
        """(exit code, the lines that would have been run, stderr)"""
        log = self.folder / "log"
        log.write_text("")
        environment = {**ENVIRONMENT, "PATH": f"{self.bin}:{os.environ['PATH']}", "LOG": str(log), **environment}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode, log.read_text().splitlines(), done.stderr


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_slurm_starts_one_launcher_a_node_and_queues_a_stopped_job_again(stage: Stage) -> None:
    script = str(CLUSTER / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    stage.put("scontrol", '[ "$1" = show ] && printf "n7\\nn8\\n" || echo "$@" >>requeued')
    stage.put("squeue", 'echo "$STATE"')
    # a task on each node, told which it is, like the real one
    loop = 'shift; code=0; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || code=$?; done; exit $code'
    stage.put("srun", loop)
    job = {"SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "40123", "STATE": "RUNNING"}

    typed = ["bash", script, "quickstart", 'samples=["a b"]', "--strategy", "fsdp2", "--processes", "4"]
    code, lines, err = stage.run(typed, **job)
    assert code == 0, err
    for rank, line in enumerate(lines):
        assert "fsdp2.yaml --num_processes 8 --num_machines 2 " in line
        assert f"--machine_rank {rank} --main_process_ip n7 --main_process_port 20123 " in line
        assert line.endswith("""-m instructft train quickstart 'samples=["a b"]'""")
    assert len(lines) == 2
    assert not (stage.folder / "requeued").exists()

    assert stage.run(typed, **job, END="1")[0] == 1
    assert stage.run(typed, **{**job, "STATE": "COMPLETING"}, END="143")[0] == 143  # what scancel leaves
    assert not (stage.folder / "requeued").exists()
    assert stage.run(typed, **job, END="143")[0] == 143
    assert (stage.folder / "requeued").read_text() == "requeue 40123\n"
    code, lines, err = stage.run(["bash", script], **job)
    assert (code, lines) == (2, [])
    assert err.startswith(f"usage: sbatch {script} RECIPE")


def test_slurm_asks_for_what_its_script_needs() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", (CLUSTER / "slurm.sh").read_text(encoding="utf-8"), re.M))
    assert asked["ntasks-per-node"] == "1"
    assert re.fullmatch(r"TERM@\d{3}", asked["signal"])  # to the steps, not to the script
    assert {"requeue", "nodes", "gpus-per-node", "time"} <= set(asked)
    assert asked["open-mode"] == "append"


def test_kubernetes_tells_each_node_which_it_is(stage: Stage) -> None:
    claim, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert set(trainer) == {"image", "numNodes", "command", "args", "env", "resourcesPerNode"}
    # what the runtime sets on every node, as kubeflow/trainer's plugin for torch writes it
    given = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "instructft-node-0-0.instructft", "MASTER_PORT": "29400"}
    assert not any(variable["name"].startswith("PET_") for variable in trainer["env"])  # it refuses them
    words = [re.sub(r"\$\(PET_(\w+)\)", lambda found: given[found[1]], word) for word in trainer["args"]]
    code, lines, err = stage.run([*trainer["command"], *words, "--processes=8"])
    assert code == 0, err
    (line,) = lines
    assert "--num_processes 16 --num_machines 2 --machine_rank 1 " in line
    assert "--main_process_ip instructft-node-0-0.instructft --main_process_port 29400 " in line
    # the volume reaches the container of the runtime, and the run folder lies on it
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (volume,), (container,) = pod["volumes"], pod["containers"]
    assert (node["name"], container["name"]) == ("node", "node")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert f"output_dir={mount['mountPath']}/runs/tinyllama-lora" in trainer["args"]
    assert pod["terminationGracePeriodSeconds"] > 30


def test_skypilot_keeps_the_run_in_a_bucket(stage: Stage) -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    known = {"name", "num_nodes", "resources", "envs", "secrets", "workdir", "file_mounts", "setup", "run"}
    assert set(task) == known
    assert set(task["resources"]) == {"accelerators", "use_spot", "disk_size"}
    (folder,) = task["file_mounts"]
    assert task["file_mounts"][folder]["mode"] == "MOUNT_CACHED"
    assert "constraints.txt ." in task["setup"]
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    (stage.folder / "instructft" / "bin").mkdir(parents=True)
    (stage.folder / "instructft" / "bin" / "activate").touch()
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.1.1.1\n10.1.1.2"}
    code, lines, err = stage.run(["bash", "-c", task["run"]], HOME=str(stage.folder), **task["envs"], **given)
    assert code == 0, err
    (line,) = lines
    assert "--num_machines 2 --machine_rank 1 --main_process_ip 10.1.1.1 " in line
    assert f"output_dir={folder}/{task['envs']['RECIPE']}" in line
