"""One command for several processes: checks the recipe, prints the `accelerate launch` line it stands for, runs it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from instructft.checkpoints import pickles
from instructft.checkpoints.run_folder import own
from instructft.errors import InstructftError, UsageError
from instructft.progress import RANKS
from instructft.recipe.load import load_recipe
from instructft.recipe.schema import Recipe
from instructft.training.launch import context
from instructft.training.launch.workers import run
from instructft.weights import remote_code

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")


def launch(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    processes: str = "auto",
    strategy: str = "ddp",
    context_parallel: int = 1,
    machines: int = 1,
    machine_rank: int | None = None,
    main_address: str | None = None,
    main_port: int = 29500,
    resume: str = "auto",
    rehearsal: bool = True,
    dry_run: bool = False,
) -> int:
    """Print the `accelerate launch` line of a training on several processes, and run it; returns its exit code.

    Args:
        processes: on each machine; `auto` is one for each GPU of this one, and one where there is none.
        strategy: `ddp` (every process holds the whole model), `fsdp2`, `zero2` or `zero3` (it is divided among them).
        context_parallel: how many processes share each row, with `fsdp2`: for rows too long for one GPU.
        machines: that train together; the same command runs on each, with its own `machine_rank`, from 0.
        main_address: of the machine of rank 0, as the others reach it.

    >>> launch("quickstart", processes="2", strategy="fsdp2", dry_run=True)
    accelerate launch --config_file ...fsdp2.yaml --num_processes 2 ... -m instructft train quickstart
    0

    Raises:
        UsageError: the recipe or what was asked for is wrong, or this machine cannot do it; nothing was started.
    """
    loaded = load_recipe(recipe, overrides)
    _check(strategy, processes, machines, machine_rank, main_address)
    gpus = 0 if loaded.train.get("use_cpu") else count_gpus()
    per_machine = max(gpus, 1) if processes == "auto" else int(processes)
    if context_parallel != 1:
        asked = context.asked_problems(context_parallel, per_machine * machines, strategy)
        context.refuse([*asked, *context.recipe_problems(loaded)])
    if not dry_run:
        _refuse_what_this_machine_cannot(strategy, per_machine, gpus)
    arguments = [
        *_accelerate_options(
            strategy, per_machine, machines, machine_rank or 0, main_address, main_port, gpus, context_parallel
        ),
        *("-m", "instructft", "train", recipe, *overrides, *_trust()),
    ]
    if gpus == 0 and strategy == "ddp" and per_machine * machines > 1 and not loaded.train.get("use_cpu"):
        # without it accelerate finds no device to divide the work over, and each process trains on its own
        arguments.append("train.use_cpu=true")
    if resume != "auto":
        arguments += ["--resume", resume]
    if not rehearsal:
        arguments.append("--no-rehearsal")
    if not dry_run and not machine_rank:
        with own(loaded, resume):  # said at once; the first process takes it for good
            pass
    print(shlex.join(["accelerate", "launch", *arguments]), flush=True)
    return 0 if dry_run else run(arguments)


def processes_of_train(recipe: Recipe, asked: str = "auto") -> tuple[int, str]:
    """In how many processes `instructft train` trains here, and why, in words; "" where there is nothing to say.

    One process for each GPU: a single one would use the first alone (TRL refuses `nn.DataParallel`).

    Example::

        processes_of_train(load_recipe("quickstart"))  # eight GPUs
        # (8, '8 GPUs: one process for each (--processes 1 takes one of them)')

    Raises:
        UsageError: `asked` is no number, or a launcher has started this process.
    """
    if problem := _processes_problem(asked):
        raise UsageError(problem)
    if any(name in os.environ for name in (*RANKS, "LOCAL_RANK")):
        if asked != "auto":
            raise UsageError(f"--processes {asked}: a launcher has started this process; its own option says how many")
        return 1, ""
    if asked != "auto":
        return int(asked), ""
    gpus = count_gpus() if not recipe.train.get("use_cpu") and _may_have_several_gpus() else 1
    if gpus < 2:
        return 1, ""
    if recipe.train.get("auto_find_batch_size"):
        return 1, f"{gpus} GPUs: one of them is used, since train.auto_find_batch_size works in one process alone"
    return gpus, f"{gpus} GPUs: one process for each (--processes 1 takes one of them)"


def _may_have_several_gpus() -> bool:
    """Whether it is worth to ask torch, which takes seconds."""
    if "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        return False
    others = [Path("/dev/kfd"), Path("/dev/dxg")]  # AMD's, and those of Windows beneath
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1 or any(path.exists() for path in others)


def _processes_problem(asked: str) -> str:
    if asked == "auto" or (asked.isascii() and asked.isdigit() and int(asked) > 0):
        return ""
    return f"--processes: found {asked}, expected auto or a whole number from 1"


def _trust() -> list[str]:
    """What this command line trusts, for its processes."""
    said = {remote_code.FLAG: remote_code.allowed(), pickles.FLAG: pickles.trusted()}
    return [flag for flag, yes in said.items() if yes]


def _check(strategy: str, processes: str, machines: int, rank: int | None, address: str | None) -> None:
    problems = []
    if strategy not in STRATEGIES:
        problems.append(f"--strategy: found {strategy}, expected {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}")
    if problem := _processes_problem(processes):
        problems.append(problem)
    if machines > 1 and rank is None:
        problems.append(f"--machine-rank is missing: which of the {machines} machines is this one, from 0?")
    if rank is not None and not 0 <= rank < machines:
        problems.append(f"--machine-rank: found {rank}, expected 0 to {machines - 1}; --machines is {machines}")
    if machines > 1 and not address:
        problems.append("--main-address is missing: the host name or address of the machine of rank 0")
    if problems:
        raise UsageError("\n".join(problems))


def _refuse_what_this_machine_cannot(strategy: str, processes: int, gpus: int) -> None:
    from importlib.util import find_spec

    if strategy != "ddp" and not gpus:
        raise UsageError(
            f"--strategy {strategy}: found no GPU to train on here. accelerate divides a model over GPUs only, and "
            "would train it undivided without a word; use --strategy ddp"
        )
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        raise UsageError(f"--strategy {strategy} needs DeepSpeed: pip install deepspeed; or use --strategy fsdp2")
    if 0 < gpus < processes:
        raise UsageError(
            f"--processes {processes}: found {gpus} GPU{'s' if gpus > 1 else ''}, expected one for each process; "
            f"use --processes {gpus}, or train.use_cpu=true"
        )


def _accelerate_options(
    strategy: str,
    per_machine: int,
    machines: int,
    rank: int,
    address: str | None,
    port: int,
    gpus: int,
    shares: int,
) -> list[str]:
    """The options of `accelerate launch`. A config file always: without, a default one of the user's would count."""
    total = per_machine * machines
    name = strategy if strategy != "ddp" else "multi_node" if machines > 1 else "ddp" if total > 1 else "single"
    if shares > 1:
        name = f"{name}_context"
    options = ["--config_file", _shown(accelerate_config(name)), "--num_processes", str(total)]
    options += ["--num_machines", str(machines)]
    if shares > 1:
        options += context.options(shares, total)
    if machines > 1:
        options += ["--machine_rank", str(rank), "--main_process_ip", str(address), "--main_process_port", str(port)]
    if gpus == 0 and strategy == "ddp" and "OMP_NUM_THREADS" not in os.environ:
        # of itself accelerate gives a process one thread
        options += ["--num_cpu_threads_per_process", str(max(1, _cores() // per_machine))]
    return options


def accelerate_config(name: str) -> Path:
    """The file of a shipped accelerate config.

    >>> accelerate_config("fsdp2").name
    'fsdp2.yaml'
    """
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "recipes", package.parent / "recipes"):  # an installed wheel, a checkout
        path = folder / "accelerate" / f"{name}.yaml"
        if path.is_file():
            return path
    raise InstructftError(f"accelerate/{name}.yaml is not where it was installed ({package}); install instructft again")


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def count_gpus() -> int:
    """GPUs that a training would see here.

    Where there is any sign of one, torch is asked in a process of its own: it alone knows what it can use, and this one
    must hold no part of a GPU while it waits.
    """
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd"), *Path("/dev").glob("dxg")]
    if not devices and not shutil.which("nvidia-smi"):
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise InstructftError(f"torch, asked for the number of GPUs: {why}")
    return int(done.stdout.split()[-1])
