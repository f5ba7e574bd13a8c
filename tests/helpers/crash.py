"""Runs that are killed, or whose disk is full: imports once, then forks a child for every attempt.

    python tests/helpers/crash.py RECIPE OUT HITS SEED kill|fill

Started by `test_resume.py` as a program. Trains RECIPE once without harm, counting the moments at which a run can be
hit (each training step, and each call that writes, syncs, renames or removes). Then, HITS times, a run is hit at a
moment drawn by SEED, and gone on with by the same command until it ends. `kill` sends SIGKILL, at the moment or in the
middle of the file that is written then. `fill` has the run folder on a disk of its own, a small tmpfs, and leaves no
byte of it free; there is room again before the run goes on. Prints a line of JSON for each run: what hit it, how it
ended, from which step it went on, and a hash of its final weights and of what it logged.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console

import instructft
import instructft.training.callbacks
import instructft.training.run
import instructft.training.trainer
from instructft.checkpoints.manifest import MANIFEST, folders, verify
from instructft.errors import CheckpointError


class Moments:
    """Counts the moments of a run, and kills the process, or fills its disk, at one of them."""

    def __init__(self, hit_at: int | None, halfway: bool, fill: Path | None):
        self.count, self.hit_at, self.halfway, self.fill = 0, hit_at, halfway, fill
        self.names: list[str] = []
        self._counting = threading.Lock()

    def watch(self, owner: Any, name: str, file: Callable[..., Any] | None = None) -> None:
        """Count calls of `owner.name`; `file` finds the path that such a call writes, among its arguments."""
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._counting:  # checkpoints may be written by a thread
                self.count += 1
                self.names.append(name)
                hit = self.count == self.hit_at
            if hit and self.fill:
                fill_up(self.fill)
            elif hit:
                if self.halfway and file is not None:
                    real(*args, **kwargs)
                    path = Path(file(*args))
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, watched)


FILLER = "filler"


def fill_up(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / FILLER).open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def run(recipe: str, out: Path, hit_at: int | None, halfway: bool, fill: Path | None, report: Path) -> None:
    """Train in this process, hit or not; writes the number of moments to `report` at the end."""
    torch.set_num_threads(1)
    moments = Moments(hit_at, halfway, fill)
    moments.watch(instructft.training.trainer.Trainer, "training_step")
    moments.watch(torch, "save", lambda content, path, *_: path)
    moments.watch(safetensors.torch, "save_file", lambda content, path, *_: path)
    moments.watch(Path, "write_text", lambda path, *_: path)
    moments.watch(instructft.training.callbacks.MetricsFile, "on_log")
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rmdir"), (Path, "unlink"), (Path, "mkdir")):
        moments.watch(owner, name)
    result = instructft.train(instructft.load_recipe(recipe, [f"output_dir={out}"]), console=Console(quiet=True))
    facts = {"moments": moments.names, "resumed": result.facts["train"]["resumed"], "imported": list(sys.modules)}
    report.write_text(json.dumps(facts))


def own_mounts() -> None:
    """What `unshare --map-root-user --mount` does: what this process mounts is seen by it alone, and goes with it."""
    new_mounts, new_user, user, group = 0x00020000, 0x10000000, os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_user | new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def child(*args: Any) -> int:
    """Run in a fork; its exit status as `os.waitpid` gives it."""
    process = os.fork()
    if process == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run(*args)
        except BaseException as error:
            (args[-1].with_suffix(".error")).write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1]


def ending(out: Path) -> dict[str, str]:
    """Hashes of the final weights and of the training losses as they were logged."""
    weights = next(path for path in (out / "model.safetensors", out / "adapter_model.safetensors") if path.exists())
    tensors = safetensors.torch.load_file(weights)
    content = b"".join(
        name.encode() + tensor.view(torch.uint8).numpy().tobytes() for name, tensor in sorted(tensors.items())
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "num_tokens", "train_loss")
    logged = json.dumps([{key: line[key] for key in kept if key in line} for line in lines])
    return {"weights": hashlib.sha256(content).hexdigest(), "logged": hashlib.sha256(logged.encode()).hexdigest()}


def sealed(run: Path) -> dict[str, str]:
    """The checkpoints that verify, each with the hash of its manifest, which has the hash of every file."""
    found = {}
    for folder in folders(run):
        with contextlib.suppress(CheckpointError):
            verify(folder)
            found[folder.name] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return found


def main() -> None:
    recipe, out, hits, seed, how = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    report, error = out / "report.json", out / "report.error"
    disk = out / "disk"
    disk.mkdir(parents=True)
    if how == "fill":
        own_mounts()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)

    def whole() -> dict[str, Any]:
        shutil.rmtree(disk / "whole", ignore_errors=True)
        assert child(recipe, disk / "whole", None, False, None, report) == 0, error.read_text()
        told: dict[str, Any] = json.loads(report.read_text())
        return told

    for name in whole()["imported"]:  # once, here: it is half of the time of a run
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    moments = whole()["moments"]  # now: some modules make folders as they are imported, and runs to come will not
    print(json.dumps({"hit": None, "moments": len(moments), **ending(disk / "whole")}), flush=True)
    rng = random.Random(seed)
    writing = [i for i, name in enumerate(moments, 1) if name != "training_step"]
    # a full disk: at each writing moment if there are hits enough; a kill: two of three while something is written
    spread = [writing[i * len(writing) // hits] for i in range(hits)] if hits < len(writing) else writing
    for i in range(min(hits, len(spread)) if how == "fill" else hits):
        at = spread[i] if how == "fill" else rng.choice(writing) if i % 3 else rng.randint(1, len(moments))
        folder = disk / f"hit-{i}"
        error.unlink(missing_ok=True)
        hit = child(recipe, folder, at, i % 2 == 0, disk if how == "fill" else None, report)
        if how == "kill":
            assert hit == signal.SIGKILL, f"run {i} was to be killed at moment {at} of {len(moments)}, ended with {hit}"
        said = error.read_text() if error.exists() else ""
        (disk / FILLER).unlink(missing_ok=True)
        left = sealed(folder)
        status = child(recipe, folder, None, False, None, report)
        line = {"hit": f"{at} {moments[at - 1]}", "ended": hit, "said": said, "left": left, "status": status}
        if status == 0:
            line |= {"from": [entry["step"] for entry in json.loads(report.read_text())["resumed"]], **ending(folder)}
        else:
            line["error"] = error.read_text()
        print(json.dumps(line), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
