"""Training on one GPU: ours, TRL's SFTTrainer and a plain PyTorch loop, on packs of rows of many lengths.

    make bench-gpu      (python benchmarks/gpu.py [--repeats 3] [--steps 20] [--only gpt2] [--lengths 1024,2048])

GPT-2 124M and the shape of Qwen3-0.6B in full, the shape of Llama-3.1-8B by LoRA and QLoRA; random weights, rows in
Alpaca's shape in packs of 1,024 and 2,048 tokens, bfloat16 autocast over float32 weights or a frozen bfloat16 base.
Settings that need a library that is not installed (flash-attention, Liger, torchao) are left out, and it says so. A
setting that fails, such as one that runs out of memory, is told and does not end the comparison.

Prints tokens/s, the ratio to TRL at its best and to the loop, the share of the GPU's peak, and memory. Operations per
token are 6 for each matrix weight that is trained (4 where it is frozen), the head counted for supervised tokens only
and attention not at all: the share is a lower bound.

`--tiny` runs the same road on a CPU at sizes at which the figures say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from contestants import Task, make, run, source_and_tokenizer

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
# name -> shape, and what the task changes
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2 124M, full": (
        {"model_type": "gpt2", "n_positions": 2048, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {},
    ),
    "qwen3 0.6B, full": (
        {
            "model_type": "qwen3",
            "num_hidden_layers": 28,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        {},
    ),
    "llama 8B, LoRA": (LLAMA, {"adapter": True}),
    "llama 8B, QLoRA": (LLAMA, {"adapter": True, "quantized": True}),
}
TINY = {
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2},
    "other": {
        "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32,  # whole blocks of 64, as 4-bit weights want them
    },
}  # fmt: skip

# Dense bfloat16 (V100 and T4: float16) operations a second, from the vendor's data sheets; the first name that fits.
PEAK = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def contestants(task: Task) -> dict[str, tuple[Task, str]]:
    """Name -> task, and the library that it needs or ""."""

    def with_options(which: str, needs: str = "", **options: Any) -> tuple[Task, str]:
        return dataclasses.replace(task, which=which, options={**task.options, **options}), needs

    width = task.max_length
    found = {
        "instructft": with_options("ours"),
        "plain loop": with_options("plain"),
        "TRL, packs flattened": with_options("trl"),
        "TRL, one pack at a time": (
            dataclasses.replace(with_options("trl")[0], batch=1, accumulation=task.batch * task.accumulation), ""
        ),
        "TRL, wrapped": with_options("trl", packing_strategy="wrapped"),
    }  # fmt: skip
    if task.gpu:
        found |= {
            "instructft, flash-attention": (dataclasses.replace(task, attention="flash_attention_2"), "flash_attn"),
            "instructft, flex-attention": (dataclasses.replace(task, attention="flex_attention"), ""),
            "instructft, compiled": with_options("ours", torch_compile=True, pad_to_multiple_of=width),
            "TRL, flash-attention": (
                dataclasses.replace(task, which="trl", attention="flash_attention_2"), "flash_attn"
            ),
            "TRL, Liger": with_options("trl", "liger_kernel", use_liger_kernel=True),
        }  # fmt: skip
        if not task.adapter:
            found["instructft, fp8"] = with_options("ours", "torchao", fp8=True)
    return found


def operations(weights: dict[str, Any], adapter: bool, supervised_share: float) -> float:
    """Operations per token of forward and backward, attention left out."""
    body, head = weights["body"], weights["head"]
    return (4 if adapter else 6) * (body + head * supervised_share)


def peak_of(device: str) -> float | None:
    """The GPU's dense bfloat16 peak, if its name is known."""
    return next((value for name, value in PEAK.items() if all(word in device for word in name.split())), None)


def table(name: str, found: dict[str, list[dict[str, Any]]], weights: dict[str, Any], adapter: bool) -> list[str]:
    """Rows of Markdown."""
    speed = {who: statistics.median(one["tokens_per_second"] for one in runs) for who, runs in found.items()}
    best = max((value for who, value in speed.items() if who.startswith("TRL")), default=float("nan"))
    share = found["instructft"][0]["supervised_share"] if "instructft" in found else 1.0
    rows = []
    for who, runs in found.items():
        peak = peak_of(runs[0]["device"])
        used = f"{speed[who] * operations(weights, adapter, share) / peak:.1%}" if peak else ""
        loop = f"{speed[who] / speed['plain loop']:.0%}" if "plain loop" in speed else ""
        memory = statistics.median(one["peak_mib"] for one in runs)
        rows.append(
            f"| {name} | {who} | {speed[who]:,.0f} | {speed[who] / best:.2f} | {loop} | {used} | {memory:,.0f} |"
        )
    return rows


def measure(name: str, task: Task, repeats: int, say: Any) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """All contestants in turn; what failed or was left out comes back in words."""
    notes, found = [], {}
    entered = contestants(task)
    run(dataclasses.replace(entered["instructft"][0], which="prepare"))
    for who, (_, needs) in list(entered.items()):
        if needs and importlib.util.find_spec(needs) is None:
            notes.append(f"{name}: {who} left out, {needs} is not installed")
            del entered[who]
    for _ in range(repeats):
        for who, (one, _) in list(entered.items()):
            try:
                found.setdefault(who, []).append(run(one))
                say(f"{name} · {who}: {found[who][-1]['tokens_per_second']:,.0f} tokens/s")
            except RuntimeError as error:
                notes.append(f"{name}: {who} failed: {str(error).strip().splitlines()[-1]}")
                say(notes[-1])
                del entered[who]
    return {who: runs for who, runs in found.items() if runs}, notes


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of which five are not timed")
    parser.add_argument("--batch", type=int, default=8, help="packs")
    parser.add_argument("--lengths", default="1024,2048", help="tokens per pack")
    parser.add_argument("--only", default="", help="models whose names hold this")
    parser.add_argument("--json", help="write all figures into this file")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at sizes at which the figures say nothing")
    args = parser.parse_args()
    if args.tiny:
        args.repeats, args.steps, args.batch, args.lengths = 1, 2, 2, "64"
    else:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU here; --tiny tries the script on a CPU")
    rows, notes, everything = [], [], {}
    for model, (shape, changes) in MODELS.items():
        if args.only not in model:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, tokenizer = source_and_tokenizer(Path(folder), bundled=args.tiny)
            if args.tiny:
                shape = {**shape, **TINY["gpt2" if "gpt2" in model else "other"], "vocab_size": 1490}
            task = Task(
                folder, here=args.tiny, tokenizer=tokenizer, packing=True, sampling="sequential", steps=args.steps,
                warmup=1 if args.tiny else 5, batch=args.batch, gpu=not args.tiny, low=not args.tiny, shape=shape,
                **changes,
            )  # fmt: skip
            enough = 80 if args.tiny else args.steps * args.batch * max(map(int, args.lengths.split(","))) // 100
            weights = make(task, source, enough)
            for length in map(int, args.lengths.split(",")):
                name = f"{model}, {length:,}"
                one = dataclasses.replace(task, max_length=length)
                found, said = measure(name, one, args.repeats, lambda text: print(text, file=sys.stderr, flush=True))
                rows += table(name, found, weights, one.adapter)
                notes += said
                everything[name] = found
    print("| model, tokens per pack | | tokens/s | × TRL at its best | of the plain loop | share of peak | MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join([*rows, "", *notes]))
    if args.json:
        Path(args.json).write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
