"""How time grows: a step against sequence length, batch, model size and processes; data preparation against rows.

    python benchmarks/scaling.py [--only length,batch,size,processes,data,gpus] [--steps 4] [--plots FOLDER]

Ours, each point in a process of its own; a GPT-2 shape of 4 layers × 256 on packs of rows in Alpaca's shape unless a
curve varies it. Prints a table for each curve, with the exponent between neighbours: 1 means that time grows as fast as
what was varied. `--plots` draws each as a small PNG. `gpus` is measured nowhere: it is what `instructft check`
estimates for 64 GPUs that divide a model by FSDP2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import data_prep
from contestants import Task, make, recipe_of, run, source_and_tokenizer
from train_cpu import NO_DROPOUT

LENGTHS, BATCHES, ROWS = (128, 256, 512, 1024), (1, 2, 4, 8, 16), (1000, 4000, 16000, 64000)
SIZES = ((2, 128), (4, 256), (6, 384), (8, 512))  # layers, width
GPUS = {
    "Llama 8B": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Llama 70B": {
        "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip

Point = tuple[float, float, str]  # what was varied, seconds, more to say


def shape(layers: int = 4, width: int = 256) -> dict[str, Any]:
    """A GPT-2 of so many layers."""
    size = {"n_layer": layers, "n_embd": width, "n_head": max(1, width // 64), "n_positions": 1024}
    return {"model_type": "gpt2", **size, **NO_DROPOUT}


def step(task: Task) -> Point:
    """Seconds of a step."""
    found = run(task)
    return 0.0, found["step_seconds"], f"{found['tokens_per_second']:,.0f} tokens/s"


def lengths(task: Task) -> list[Point]:
    """A step of as many tokens, in packs of growing length."""
    most = max(LENGTHS)
    return [
        (n, *step(dataclasses.replace(task, max_length=n, batch=max(1, 2 * most // n)))[1:])
        for n in LENGTHS
        if n <= task.max_length
    ]


def batches(task: Task) -> list[Point]:
    """A step of more packs of 256 tokens."""
    wide = min(256, task.max_length)
    return [(n, *step(dataclasses.replace(task, max_length=wide, batch=n))[1:]) for n in BATCHES if n <= task.batch]


def sizes(task: Task, source: Path, rows: int, tiny: bool) -> list[Point]:
    """A step of larger models; what is varied is the weights that a token meets."""
    points = []
    for layers, width in ((1, 16), (2, 16)) if tiny else SIZES:
        one = dataclasses.replace(task, shape=shape(layers, width), max_length=min(256, task.max_length))
        made = make(one, source, rows)
        points.append((made["body"] + made["head"], *step(one)[1:]))
    return points


def processes(task: Task) -> list[Point]:
    """As many rows in a step, divided among processes by `instructft launch`; the data and the start are not timed."""
    points = []
    for count in (1, 2):
        recipe = recipe_of(dataclasses.replace(task, batch=max(1, task.batch // count)))
        subprocess.run(
            [sys.executable, "-m", "instructft", "launch", str(recipe), "--processes", str(count)],
            check=True, stdout=subprocess.DEVNULL, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )  # fmt: skip
        out = Path(json.loads(recipe.read_text())["output_dir"])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        speeds = sorted(line["tokens_per_second"] for line in lines[1:] if "tokens_per_second" in line)
        tokens = lines[-1]["num_tokens"] / len(lines)
        middle = speeds[len(speeds) // 2]
        points.append((count, tokens / middle, f"{middle:,.0f} tokens/s"))
    return points


def preparation(source: Path, tokenizer: str, most: int) -> list[Point]:
    """Seconds of `prepare`, packed, without a cache."""
    points = []
    given = argparse.Namespace(tokenizer=tokenizer, max_length=512)
    for rows in [n for n in ROWS if n <= most] or [most]:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.json"
            data_prep.build_rows(source, data, rows)
            found = data_prep.run("ours", data, given, True, Path(folder) / "cache")
        points.append((rows, found["seconds"], f"{found['tokens'] / found['seconds']:,.0f} tokens/s"))
    return points


def gpus(folder: Path, source: Path, tokenizer: str, tiny: bool) -> list[str]:
    """What 64 GPUs would need, as `instructft check` estimates it."""
    parts = ("weights", "gradients", "optimizer", "activations", "communication")
    lines = [f"| full, packs of 2,048, 1 a GPU | parameters | GiB a GPU | {' | '.join(parts)} |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * len(parts))
    for name, size in list(GPUS.items())[: 1 if tiny else None]:
        if tiny:
            size = {**size, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256}
        config = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, **size}
        content = {
            "model": {"config": {**config, "tie_word_embeddings": False}, "tokenizer": tokenizer},
            "data": {
                "datasets": [{"path": str(source)}], "template": "instruction", "max_length": 2048, "packing": True
            },
            "train": {
                "per_device_train_batch_size": 1, "bf16": True, "gradient_checkpointing": True, "use_cpu": True
            },  # `--device` says what is reckoned with; without `use_cpu` bf16 would be refused where there is no GPU
            "output_dir": str(folder / "run"),
        }  # fmt: skip
        path = folder / "gpus.yaml"
        path.write_text(json.dumps(content), encoding="utf-8")
        asked = ["check", str(path), "--device", "cuda", "--processes", "64", "--strategy", "fsdp2", "--json"]
        done = subprocess.run([sys.executable, "-m", "instructft", *asked], capture_output=True, text=True)
        if not done.stdout.startswith("{"):
            raise SystemExit(f"instructft {' '.join(asked)}:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout)["estimate"]
        memory = {part: f"{held / 2**30:.1f}" for part, held in found["memory"].items()}
        cells = [memory["total"], *(memory[part] for part in parts)]
        lines.append(f"| {name} | {found['parameters']['all'] / 1e9:.1f} billion | {' | '.join(cells)} |")
    return lines


def table(what: str, points: list[Point]) -> str:
    """A curve in Markdown; the exponent is that of the growth since the line before."""
    lines = [f"| {what} | seconds | | grows with the power |", "| ---: | ---: | ---: | ---: |"]
    for i, (varied, seconds, more) in enumerate(points):
        power = ""
        if i:
            before = points[i - 1]
            power = f"{math.log(seconds / before[1]) / math.log(varied / before[0]):.2f}"
        lines.append(f"| {varied:,.0f} | {seconds:.3f} | {more} | {power} |")
    return "\n".join(lines)


def _plain(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number:,.0f}"


def draw(path: Path, what: str, points: list[Point]) -> None:
    """A curve on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4, 3), dpi=80)
    axes.loglog([p[0] for p in points], [p[1] for p in points], "o-")
    axes.set(xlabel=what, ylabel="seconds")
    axes.minorticks_off()
    axes.set_xticks([p[0] for p in points], [_plain(p[0]) for p in points])
    axes.set_yticks([p[1] for p in points], [f"{p[1]:.3g}" for p in points])
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="length,batch,size,processes,data,gpus")
    parser.add_argument("--steps", type=int, default=6, help="of which two are not timed")
    parser.add_argument("--plots", type=Path, help="a folder for a PNG of each curve")
    parser.add_argument("--tiny", action="store_true", help="the smallest points only: to try the script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, tokenizer = source_and_tokenizer(folder, bundled=args.tiny)
        rows = 150 if args.tiny else 999
        task = Task(
            name, here=args.tiny, tokenizer=tokenizer, packing=True, sampling="sequential",
            max_length=128 if args.tiny else 1024, batch=2 if args.tiny else 16, steps=3 if args.tiny else args.steps,
            shape=shape(1, 16) if args.tiny else shape(),
        )  # fmt: skip
        make(task, source, rows)
        curves = {
            "length": ("tokens per pack, as many in a step", lambda: lengths(task)),
            "batch": ("packs of 256 tokens in a step", lambda: batches(task)),
            "processes": (
                "processes, as many tokens in a step",
                lambda: processes(dataclasses.replace(task, max_length=min(256, task.max_length), batch=8)),
            ),
            "data": (
                "rows, prepared and packed",
                lambda: preparation(source, tokenizer, 500 if args.tiny else ROWS[-1]),
            ),
            "size": ("weights of body and head", lambda: sizes(task, source, rows, args.tiny)),
        }
        for curve, (what, measure) in curves.items():
            if curve in args.only.split(","):
                points = measure()
                print(table(what, points) + "\n", flush=True)
                if args.plots:
                    args.plots.mkdir(parents=True, exist_ok=True)
                    draw(args.plots / f"{curve}.png", what, points)
        if "gpus" in args.only.split(","):
            print(
                "\n".join(
                    ["Estimated, not measured, 64 GPUs by FSDP2:", "", *gpus(folder, source, tokenizer, args.tiny)]
                )
            )


if __name__ == "__main__":
    main()
