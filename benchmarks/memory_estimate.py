"""The memory that `instructft check` estimates beside the peak of the real run: `python benchmarks/memory_estimate.py`.

Each case is a recipe on made-up rows that fill `max_length`. `check --json` and a training run of four steps on the
CPU are two processes of their own; the peak is the kernel's VmHWM (on macOS ru_maxrss). "without base" leaves out
what the libraries hold before the model is there. `--only NAME` runs the cases whose names hold NAME.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 1 << 20
TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "assets" / "gpt2"

GPT2 = "model_type: gpt2, vocab_size: 50257, n_positions: 1024"
LLAMA = "model_type: llama, vocab_size: 50257, tie_word_embeddings: false"
# name: model config, rows of a batch, tokens of a row, more overrides
CASES: dict[str, tuple[str, int, int, list[str]]] = {
    "gpt2 4x256, 8x256": (f"{GPT2}, n_layer: 4, n_embd: 256, n_head: 4", 8, 256, []),
    "gpt2 6x512, 8x256": (f"{GPT2}, n_layer: 6, n_embd: 512, n_head: 8", 8, 256, []),
    "gpt2 12x768 (124M), 2x512": (f"{GPT2}, n_layer: 12, n_embd: 768, n_head: 12", 2, 512, []),
    "124M, checkpointing": (
        f"{GPT2}, n_layer: 12, n_embd: 768, n_head: 12",
        2,
        512,
        ["train.gradient_checkpointing=true"],
    ),
    "gpt2 6x512, accumulation 2": (
        f"{GPT2}, n_layer: 6, n_embd: 512, n_head: 8",
        8,
        256,
        ["train.gradient_accumulation_steps=2"],
    ),
    "gpt2 6x512, eager, sgd": (
        f"{GPT2}, n_layer: 6, n_embd: 512, n_head: 8",
        8,
        256,
        ["train.optim=sgd", "model.attn_implementation=eager"],
    ),
    "llama 6x512, packed": (
        f"{LLAMA}, num_hidden_layers: 6, hidden_size: 512, intermediate_size: 1376, num_attention_heads: 8",
        8,
        256,
        ["data.packing=true"],
    ),
    "LoRA on gpt2 6x512": (f"{GPT2}, n_layer: 6, n_embd: 512, n_head: 8", 8, 256, ["adapter=lora"]),
    "LoRA on 124M": (f"{GPT2}, n_layer: 12, n_embd: 768, n_head: 12", 2, 512, ["adapter=lora"]),
    "LoRA on llama 6x512, packed": (
        f"{LLAMA}, num_hidden_layers: 6, hidden_size: 512, intermediate_size: 1376, num_attention_heads: 8",
        8,
        256,
        ["adapter={type: lora, r: 64}", "data.packing=true"],
    ),
}

# Makes the base that an adapter is trained on: a recipe's random model, saved.
BASE = """
import sys, instructft
recipe = instructft.load_recipe(sys.argv[1])
tokenizer = instructft.load_tokenizer(recipe)
instructft.load_model(recipe, tokenizer).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""

# Trains, then prints the bytes held before the model was made, and the most held at any time.
CHILD = """
import importlib, json, resource, sys
def status(key):
    try:
        return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train = importlib.import_module("instructft.training.run")
from instructft.recipe.load import load_recipe
from rich.console import Console
load, before = train.load_model, []
train.load_model = lambda *args, **more: before.append(status("VmRSS")) or load(*args, **more)
train.train(load_recipe(sys.argv[1], sys.argv[2:]), console=Console(quiet=True))
print(json.dumps({"base": before[0], "peak": status("VmHWM")}))
"""


def recipe(folder: Path, config: str, batch: int, width: int) -> Path:
    """Write rows that fill `width` tokens, and the recipe that trains on them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(3000)]
    rows = [
        {"instruction": " ".join(rng.choices(words, k=10)), "output": " ".join(rng.choices(words, k=width))}
        for _ in range(4 * batch)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = folder / "memory.yaml"
    path.write_text(
        f"model: {{config: {{{config}}}, tokenizer: {TOKENIZER}}}\n"
        f"data: {{datasets: [{{path: {folder / 'rows.jsonl'}}}], template: instruction, max_length: {width}, "
        "splits: {validation: 0}}\n"
        f"train: {{max_steps: 4, per_device_train_batch_size: {batch}, use_cpu: true, save_strategy: 'no', "
        f"report_to: []}}\noutput_dir: {folder / 'run'}\n",
        encoding="utf-8",
    )
    return path


def measure(config: str, batch: int, width: int, overrides: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """(parts of the estimate, base and peak of the run), in bytes."""
    with tempfile.TemporaryDirectory(prefix="instructft-memory-") as name:
        path = recipe(Path(name), config, batch, width)
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        answers = []
        commands = [
            ["-m", "instructft", "check", str(path), *overrides, "--json"],
            ["-c", CHILD, str(path), *overrides],
        ]
        if any(override.startswith("adapter=") for override in overrides):
            base = str(Path(name) / "base")
            subprocess.run([sys.executable, "-c", BASE, str(path), base], env=environment, check=True)
            for command in commands:
                command.append(f"model={{name_or_path: {base}}}")
        for command in commands:
            done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
            answers.append(done.stdout)
        run: dict[str, int] = json.loads(answers[1].splitlines()[-1])
        return json.loads(answers[0])["estimate"]["memory"], run


def main() -> None:
    """Print a line for each case, and the largest error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose names hold this")
    only = parser.parse_args().only
    from importlib.metadata import version

    print(
        f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}, ",
        end="",
    )
    print(f"trl {version('trl')}, {platform.platform()}\n")
    print(f"{'MiB':28} {'estimate':>9} {'measured':>9} {'error':>7}   without base: estimate measured  error")
    errors = []
    for name, case in CASES.items():
        if only not in name:
            continue
        parts, run = measure(*case)
        bare = parts["total"] - parts["framework"] + 50 * MIB, run["peak"] - run["base"]
        error, bare_error = parts["total"] / run["peak"] - 1, bare[0] / bare[1] - 1
        errors.append(max(abs(error), abs(bare_error)))
        print(
            f"{name:28} {parts['total'] / MIB:9,.0f} {run['peak'] / MIB:9,.0f} {error:+7.1%} "
            f"{bare[0] / MIB:23,.0f} {bare[1] / MIB:8,.0f} {bare_error:+7.1%}",
            flush=True,
        )
    print(f"\nlargest error: {max(errors):.1%}")


if __name__ == "__main__":
    main()
