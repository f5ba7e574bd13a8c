"""What is not training: commands that must be quick, the way to the first step, checkpoints, evaluation, logging.

    python benchmarks/overheads.py [--repeats 3] [--steps 0] [--only commands,first,shares,held]

- commands: seconds of `--help`, and of a recipe that is wrong; neither waits for torch.
- first: seconds from `instructft train quickstart` to the end of its first step; the aim is 15.
- shares: one epoch of a GPT-2 shape of 4 layers × 256 on 999 rows in Alpaca's shape with every default of a
  recipe (a checkpoint and a validation at every quarter and tenth of the run), and the share of its time that each
  takes; the aim for checkpoints is 5%. A checkpoint here is the model, AdamW's state and the hashes of all files,
  brought to the disk.
- held: seconds that a checkpoint of a GPT-2 shape of 8 layers × 512 holds training up, where training waits for it
  and where it is written beside (`train.save_in_background`); each run saves at every sixth of 24 steps. The last
  save, with which training ends, is waited for in both and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contestants import source_and_tokenizer
from data_prep import build_rows

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **os.environ}
FIRST_STEP, CHECKPOINTS = 15.0, 0.05  # aims: seconds, share


def commands(repeats: int) -> dict[str, float]:
    """Seconds of commands that load no torch."""
    found = {}
    for name, given, code in [
        ("--help", ["--help"], 0),
        ("train --help", ["train", "--help"], 0),
        ("a recipe with a wrong key", ["train", "quickstart", "train.learning_rat=1"], 2),
    ]:
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "instructft", *given], env=ENVIRONMENT, capture_output=True)
            seconds.append(time.perf_counter() - began)
            if done.returncode != code:
                raise SystemExit(f"instructft {' '.join(given)} ended with {done.returncode}, expected {code}")
        found[name] = statistics.median(seconds)
    return found


def first_step(repeats: int) -> float:
    """Seconds from the command to the first line of `metrics.jsonl`, which is written when the first step is logged."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            given = ["train", "quickstart", f"output_dir={run}", "train.logging_steps=1"]
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "instructft", *given], env=ENVIRONMENT, stdout=subprocess.DEVNULL
            )
            metrics = run / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit(f"instructft train quickstart ended with {process.returncode} before a step")
                time.sleep(0.02)
            seconds.append(time.perf_counter() - began)
            process.kill()
            process.wait()
    return statistics.median(seconds)


@contextlib.contextmanager
def timing(parts: dict[str, str]) -> Iterator[dict[str, list[float]]]:
    """Inside, methods of the trainer are timed: name -> seconds of each call."""
    from instructft.training.trainer import Trainer

    spent: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent.setdefault(name, []).append(time.perf_counter() - began)

        return call

    own = {method: Trainer.__dict__.get(method) for method in parts}
    for method, name in parts.items():
        setattr(Trainer, method, timed(name, getattr(Trainer, method)))
    try:
        yield spent
    finally:
        for method, function in own.items():
            if function is None:
                delattr(Trainer, method)
            else:
                setattr(Trainer, method, function)


def shares(steps: int, tiny: bool) -> dict[str, Any]:
    """A run in this process, with its parts timed: seconds of the whole, and of each part."""
    from rich.console import Console

    from instructft.recipe.load import load_recipe

    road = importlib.import_module("instructft.training.run")
    parts = {"_save_checkpoint": "checkpoints", "_evaluate": "evaluation", "log": "logging", "train": "training in all"}
    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer = source_and_tokenizer(Path(folder), bundled=tiny)
        rows = Path(folder) / "rows.json"
        build_rows(source, rows, 999)
        size = {"n_layer": 1, "n_embd": 16, "n_head": 2} if tiny else {"n_layer": 4, "n_embd": 256, "n_head": 4}
        recipe = {
            "model": {"config": {"model_type": "gpt2", "n_positions": 512, **size}, "tokenizer": tokenizer},
            "data": {"datasets": [{"path": str(rows)}], "template": "instruction", "max_length": 512},
            "train": {"num_train_epochs": 1, "use_cpu": True, **({"max_steps": steps} if steps else {})},
            "output_dir": str(Path(folder) / "run"),
        }
        path = Path(folder) / "overheads.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        with timing(parts) as spent, open(os.devnull, "w") as nowhere:
            facts = road.train(load_recipe(path), console=Console(file=nowhere)).facts
    whole = spent.pop("training in all")[0]
    parts_of = {name: {"times": len(took), "seconds": sum(took), "share": sum(took) / whole}
                for name, took in spent.items()}  # fmt: skip
    return {"steps": facts["train"]["steps"], "seconds": whole, "parts": parts_of}


def held_up(repeats: int, tiny: bool) -> dict[str, Any]:
    """Seconds that each checkpoint but the last holds training up, of runs that wait and of runs that do not."""
    from rich.console import Console

    from instructft.recipe.load import load_recipe

    road = importlib.import_module("instructft.training.run")
    found: dict[str, Any] = {name: {"saves": [], "training": []} for name in ("waited for", "beside")}
    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer = source_and_tokenizer(Path(folder), bundled=tiny)
        rows = Path(folder) / "rows.json"
        build_rows(source, rows, 200)
        size = {"n_layer": 1, "n_embd": 16, "n_head": 2} if tiny else {"n_layer": 8, "n_embd": 512, "n_head": 8}
        train = {"max_steps": 24, "save_steps": 4, "save_total_limit": 2, "eval_strategy": "no", "use_cpu": True}
        train |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        for number in range(2 * repeats):
            name = list(found)[number % 2]
            recipe = {
                "model": {"config": {"model_type": "gpt2", "n_positions": 256, **size}, "tokenizer": tokenizer},
                "data": {"datasets": [{"path": str(rows)}], "template": "instruction", "max_length": 256},
                "train": {**train, "save_in_background": name == "beside"},
                "output_dir": str(Path(folder) / f"run-{number}"),
            }
            path = Path(folder) / "held.yaml"
            path.write_text(json.dumps(recipe), encoding="utf-8")
            with timing({"_save_checkpoint": "saves", "train": "train"}) as spent, open(os.devnull, "w") as nowhere:
                road.train(load_recipe(path), console=Console(file=nowhere))
            found[name]["saves"] += spent["saves"][:-1]
            found[name]["training"] += spent["train"]
            newest = Path(recipe["output_dir"]) / "checkpoint-24"
            found["bytes"] = sum(file.stat().st_size for file in newest.iterdir())
            shutil.rmtree(recipe["output_dir"])
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="of the run whose parts are timed; 0: one epoch")
    parser.add_argument("--only", default="commands,first,shares,held")
    parser.add_argument("--tiny", action="store_true", help="once, and a tiny model: to try the script")
    args = parser.parse_args()
    if args.tiny:
        args.repeats, args.steps = 1, 8
    if "commands" in args.only:
        for name, seconds in commands(args.repeats).items():
            print(f"{name}: {seconds:.2f} s")
    if "first" in args.only:
        seconds = first_step(args.repeats)
        print(
            f"from the command to the end of quickstart's first step: {seconds:.1f} s {verdict(seconds < FIRST_STEP)}"
        )
    if "shares" in args.only:
        found = shares(args.steps, args.tiny)
        print(f"{found['steps']} steps, {found['seconds']:.1f} s:")
        for name, part in sorted(found["parts"].items()):
            met = verdict(part["share"] < CHECKPOINTS) if name == "checkpoints" else ""
            print(f"  {name}: {part['times']} times, {part['seconds']:.2f} s, {part['share']:.1%} {met}".rstrip())
    if "held" in args.only:
        found = held_up(args.repeats, args.tiny)
        print(f"checkpoints of {found.pop('bytes') / 2**20:,.0f} MiB, {args.repeats} runs of 24 steps each:")
        for name, times in found.items():
            saves, training = times["saves"], statistics.median(times["training"])
            print(
                f"  {name}: training held up for {statistics.median(saves):.2f} s ({min(saves):.2f} to "
                f"{max(saves):.2f}) each, {training:.1f} s in all"
            )


def verdict(met: bool) -> str:
    """Whether an aim is met."""
    return "(aim met)" if met else "(aim missed)"


if __name__ == "__main__":
    main()
