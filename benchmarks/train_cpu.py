"""Training on a CPU: ours, TRL's SFTTrainer and a plain PyTorch loop, on the same rows and model, each in a process.

    python benchmarks/train_cpu.py [--repeats 3] [--steps 8] [--cases padded,shuffled,packed] [--max-length 512]

A GPT-2 shape of 4 layers × 256 with GPT-2's 50,257 tokens, float32, AdamW; batches of 8 rows in Alpaca's shape
behind the template `instruction`, only answers carry loss. Cases:

- padded: batches in our default order, the same for all three; ours divides them in parts of like length. TRL also
  without padding (`padding_free`).
- shuffled: batches in any order, as TRL takes rows by default.
- packed: ours and the loop train our packs as 8 rows. TRL makes its own packs and gets three settings, of which the
  best counts: 8 packs flattened into one row (its default), 1 pack at a time with 8 accumulated, and `wrapped`.

The contestants take turns; tokens that are not padding count; the medians are printed as a table in Markdown. Losses of
each step are held against each other: ours and the loop's in every case, TRL's where it has the same batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from contestants import Task, make, run, source_and_tokenizer

SHAPE = {"model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 1024}
TINY = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOLERANCE = 1e-4  # of a step's loss

# case -> name of a contestant -> what it changes
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "padded": {
        "instructft": {"which": "ours"},
        "plain loop": {"which": "plain"},
        "TRL": {"which": "trl"},
        "TRL, padding_free": {"which": "trl", "options": {"padding_free": True}},
    },
    "shuffled": {
        "instructft": {"which": "ours", "sampling": "sequential"},
        "plain loop": {"which": "plain", "sampling": "sequential"},
        "TRL": {"which": "trl", "sampling": "sequential"},
    },
    "packed": {
        "instructft": {"which": "ours", "packing": True, "sampling": "sequential"},
        "plain loop": {"which": "plain", "packing": True, "sampling": "sequential"},
        "TRL, 8 packs flattened": {"which": "trl", "packing": True},
        "TRL, 1 pack, 8 accumulated": {"which": "trl", "packing": True, "batch": 1, "accumulation": 8},
        "TRL, wrapped": {"which": "trl", "packing": True, "options": {"packing_strategy": "wrapped"}},
    },
}


def compare(case: str, found: dict[str, dict[str, Any]]) -> str:
    """How far losses (and TRL's entropy and accuracy) of the same batches are apart; beyond the tolerance an error."""
    mine, lines = found["instructft"], []
    for name, other in found.items():
        if name == "instructft" or (case == "packed" and name.startswith("TRL")):  # TRL's packs hold other rows
            continue
        gap = max(abs(a - b) for a, b in zip(mine["losses"], other["losses"], strict=True))
        lines.append(f"{name} {gap:.1e}")
        if gap > TOLERANCE:
            raise SystemExit(f"{case}: losses differ.\ninstructft {mine['losses']}\n{name} {other['losses']}")
        for metric in ("entropy", "mean_token_accuracy"):
            pairs = zip(mine[metric], other.get(metric, mine[metric]), strict=True)
            if max(abs(a - b) for a, b in pairs) > 10 * TOLERANCE:
                raise SystemExit(f"{case}: {metric} differs.\ninstructft {mine[metric]}\n{name} {other[metric]}")
    return f"{case}: the largest difference of a step's loss from ours: {', '.join(lines)}"


def table(case: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Rows of Markdown: tokens a second, the ratios to TRL at its best and to the loop, seconds a step, memory."""

    def median(name: str, key: str) -> float:
        return statistics.median(one[key] for one in found[name])

    speed = {name: median(name, "tokens_per_second") for name in found}
    loop = speed["plain loop"]
    best = max((value for name, value in speed.items() if name.startswith("TRL")), default=float("nan"))
    return [
        f"| {case} | {name} | {speed[name]:,.0f} | {speed[name] / best:.2f} | {speed[name] / loop:.0%} | "
        f"{median(name, 'step_seconds'):.2f} | {median(name, 'peak_mib'):,.0f} |"
        for name in found
    ]


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of which two are not timed")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--max-length", type=int, default=512, help="tokens per row or pack")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--without", default="", help="names of contestants to leave out, such as TRL")
    parser.add_argument("--tiny", action="store_true", help="sizes at which the figures say nothing: to try the script")
    args = parser.parse_args()
    if args.tiny:
        args.repeats, args.steps, args.max_length, args.batch = 1, 3, 64, 2
    with tempfile.TemporaryDirectory() as name:
        source, tokenizer = source_and_tokenizer(Path(name), bundled=args.tiny)
        task = Task(
            name, tokenizer=tokenizer, max_length=args.max_length, batch=args.batch, steps=args.steps,
            here=args.tiny, shape={**(TINY if args.tiny else SHAPE), **NO_DROPOUT},
        )  # fmt: skip
        made = make(task, source, 60 if args.tiny else 999)
        print(f"{made['parameters']:,} parameters, {args.steps} steps, median of {args.repeats}, {platform_line()}\n")
        rows, checks = [], []
        for case in args.cases.split(","):
            contestants = {who: settings(task, args.batch, change) for who, change in CASES[case].items()
                           if not args.without or args.without not in who}  # fmt: skip
            run(dataclasses.replace(contestants["instructft"], which="prepare"))
            found: dict[str, list[dict[str, Any]]] = {who: [] for who in contestants}
            for _ in range(args.repeats):  # in turn, so that a slower spell of the machine meets them all
                for who, one in contestants.items():
                    found[who].append(run(one))
                    speed = found[who][-1]["tokens_per_second"]
                    print(f"{case} · {who}: {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
            checks.append(compare(case, {who: runs[0] for who, runs in found.items()}))
            mine = found["instructft"][0]
            checks.append(f"  {mine['padding']:.1%} padding, {mine['supervised_share']:.1%} of tokens carry loss")
            rows += table(case, found)
    print("| case | | tokens/s | × TRL at its best | of the plain loop | s/step | peak MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join([*rows, "", *checks]))


def settings(task: Task, batch: int, change: dict[str, Any]) -> Task:
    """The task of a contestant; where packs are accumulated, as many as a batch has rows."""
    accumulation = batch if change.get("accumulation") else 1
    return dataclasses.replace(task, **{**change, "accumulation": accumulation})


def platform_line() -> str:
    """Machine and versions."""
    import os
    import platform
    from importlib.metadata import version

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    return f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {libraries}"


if __name__ == "__main__":
    main()
