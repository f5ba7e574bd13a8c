"""Runs that are killed: imports once, then forks a child for every attempt. Started by `test_resume.py` as a program.

    python tests/crash.py RECIPE OUT KILLS SEED

Trains RECIPE once without harm, counting the moments at which a run can be hit (each training step, and each call that
writes, syncs, renames or removes). Then, KILLS times, a run is killed with SIGKILL at a moment drawn by SEED, or in the
middle of the file that it writes then, and gone on with by the same command until it ends. Prints a line of JSON for
each run: what hit it, from which step it went on, and a hash of its final weights and of what it logged.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console

import instructft
import instructft.lasting
import instructft.train
import instructft.trainer


class Moments:
    """Counts the moments of a run, and kills the process at one of them."""

    def __init__(self, kill_at: int | None, halfway: bool):
        self.count, self.kill_at, self.halfway = 0, kill_at, halfway
        self.names: list[str] = []

    def watch(self, owner: Any, name: str, file: Callable[..., Any] | None = None) -> None:
        """Count calls of `owner.name`; `file` finds the path that such a call writes, among its arguments."""
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.names.append(name)
            if self.count == self.kill_at:
                if self.halfway and file is not None:
                    real(*args, **kwargs)
                    path = Path(file(*args))
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, watched)


def run(recipe: str, out: Path, kill_at: int | None, halfway: bool, report: Path) -> None:
    """Train in this process, hit or not; writes the number of moments to `report` at the end."""
    torch.set_num_threads(1)
    moments = Moments(kill_at, halfway)
    moments.watch(instructft.lasting.LastingTrainer, "training_step")
    moments.watch(torch, "save", lambda content, path, *_: path)
    moments.watch(safetensors.torch, "save_file", lambda content, path, *_: path)
    moments.watch(Path, "write_text", lambda path, *_: path)
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rmdir"), (Path, "unlink"), (Path, "mkdir")):
        moments.watch(owner, name)
    result = instructft.train(instructft.load_recipe(recipe, [f"output_dir={out}"]), console=Console(quiet=True))
    report.write_text(json.dumps({"moments": moments.names, "resumed": result.facts["train"]["resumed"]}))


def child(*args: Any) -> int:
    """Run in a fork; its exit status as `os.waitpid` gives it."""
    process = os.fork()
    if process == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run(*args)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1]


def ending(out: Path) -> dict[str, str]:
    """Hashes of the final weights and of the training losses as they were logged."""
    weights = next(path for path in (out / "model.safetensors", out / "adapter_model.safetensors") if path.exists())
    tensors = safetensors.torch.load_file(weights)
    content = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(tensors.items()))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "num_tokens", "train_loss")
    logged = json.dumps([{key: line[key] for key in kept if key in line} for line in lines])
    return {"weights": hashlib.sha256(content).hexdigest(), "logged": hashlib.sha256(logged.encode()).hexdigest()}


def main() -> None:
    recipe, out, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    report = out / "report.json"
    out.mkdir(parents=True, exist_ok=True)
    assert child(recipe, out / "whole", None, False, report) == 0
    moments = json.loads(report.read_text())["moments"]
    print(json.dumps({"hit": None, "moments": len(moments), **ending(out / "whole")}), flush=True)
    rng = random.Random(seed)
    writing = [i for i, name in enumerate(moments, 1) if name != "training_step"]
    for i in range(kills):
        # two of three while something is written
        at = rng.choice(writing) if i % 3 else rng.randint(1, len(moments))
        folder = out / f"killed-{i}"
        hit = child(recipe, folder, at, i % 2 == 0, report)
        assert hit == signal.SIGKILL, f"run {i} was to be killed at moment {at} of {len(moments)}, and ended with {hit}"
        status = child(recipe, folder, None, False, report)
        line = {"hit": f"{at} {moments[at - 1]}", "status": status}
        if status == 0:
            line |= {"from": [entry["step"] for entry in json.loads(report.read_text())["resumed"]], **ending(folder)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
