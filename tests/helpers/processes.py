"""Child processes that need not import torch and its kin: forked from a server that has, once in a session of tests.

A process of its own takes longer to import than to train a tiny model. What starts one for real, through the command or
the launcher, is tested where that is the matter: `tests/training/launch`, `tests/test_cli.py`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from subprocess import CompletedProcess

# What a run has imported by its end. The server passes over what is not installed.
PRELOADED = [
    "bitsandbytes", "datasets", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf",
    "matplotlib.backends.backend_svg", "matplotlib.figure", "peft", "rich.console", "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2", "trl.trainer.sft_trainer",
    "instructft.report.page", "instructft.training.callbacks", "instructft.training.rehearsal.rehearse",
    "instructft.training.run", "instructft.training.trainer",
]  # fmt: skip
_GRACE = 20.0  # seconds that a process has once another one of its group has failed

_FORKS = multiprocessing.get_context("forkserver")


def python(command: Sequence[str], folder: Path, **environment: str) -> CompletedProcess[str]:
    """What `python PROGRAM ARGUMENTS` or `python -m MODULE ARGUMENTS` does; its output lies in `folder` meanwhile."""
    return _together(command, folder, [environment])


def launch(
    config: str, command: Sequence[str], folder: Path, processes: int | None = None, **environment: str
) -> CompletedProcess[str]:
    """What `accelerate launch --config_file CONFIG PROGRAM ARGUMENTS` does, on one machine.

    The environment of the workers comes from accelerate, and they meet at a store that this process holds, as with
    torch's launcher. The exit code is that of the first worker that failed.
    """
    from accelerate.commands import launch as accelerate
    from torch.distributed import TCPStore

    number = ["--num_processes", str(processes)] if processes else []
    arguments = ["--config_file", config, *number, *command]
    parsed, _, _ = accelerate._validate_launch_command(accelerate.launch_command_parser().parse_args(arguments))
    given = {**accelerate.prepare_multi_gpu_env(parsed), **environment}
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    world = int(parsed.num_processes)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
             "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}  # fmt: skip
    return _together(
        command, folder, [{**given, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    )


def _together(command: Sequence[str], folder: Path, environments: Sequence[Mapping[str, str]]) -> CompletedProcess[str]:
    _FORKS.set_forkserver_preload(PRELOADED)
    said = [folder / f"rank-{rank}" for rank in range(len(environments))]
    group = [
        _FORKS.Process(target=_program, args=(list(command), {**os.environ, **environment}, str(Path.cwd()), str(file)))
        for environment, file in zip(environments, said, strict=True)
    ]
    try:
        for process in group:
            process.start()
        deadline = float("inf")
        while any(process.is_alive() for process in group) and time.monotonic() < deadline:
            if deadline == float("inf") and any(process.exitcode for process in group):
                deadline = time.monotonic() + _GRACE
            time.sleep(0.02)
    finally:
        for process in group:
            if process.is_alive():
                process.kill()
            if process.pid:
                process.join()
    code = next((process.exitcode for process in group if process.exitcode), 0) or 0
    out, err = ("".join(Path(f"{file}.{end}").read_text() for file in said) for end in ("out", "err"))
    return CompletedProcess(list(command), code, out, err)


def _program(command: list[str], environment: dict[str, str], folder: str, said: str) -> None:
    """In the child: be the program."""
    multiprocessing.set_start_method(None, force=True)  # of a fork server's child it is `forkserver`
    gc.freeze()  # else every full collection goes over all that the server has imported
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
