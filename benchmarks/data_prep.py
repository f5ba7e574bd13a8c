"""Data preparation: ours and TRL's on the same rows, cold, each in a process of its own, packed and unpacked.

    python benchmarks/data_prep.py [--rows 50000] [--repeats 3] [--max-length 1024] [--data FILE] [--tokenizer FOLDER]
    python benchmarks/data_prep.py --scale 25000 100000 400000

Prints tokens a second, the ratio, the share of the bare tokenizer's speed, seconds on the clock and of all processors,
peak memory, how full our packs are, and the time from the cache; with `--scale` ours alone, packed and with rows held
out, for numbers of rows.
TRL gets prompt and completion as ready text; ours renders its chat template as well. Both read the same JSON file.
What a library imports is on nobody's clock. Memory is that of all processes together, looked at ten times a second:
what they share counts once, and pages of mapped files, which the system drops when it wants, do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
DATA = REPO / "tests" / "assets"


def build_rows(source: Path, target: Path, rows: int) -> None:
    """Repeat the rows of an Alpaca file until there are enough, each made unique by a number in its texts."""
    given = json.loads(source.read_text(encoding="utf-8"))
    made = []
    for i in range(rows):
        row = given[i % len(given)]
        mark = f" ({i})"
        made.append({"instruction": row["instruction"] + mark, "input": row["input"], "output": row["output"] + mark})
    target.write_text(json.dumps(made), encoding="utf-8")


class Clock:
    """Seconds on the clock, and of all processors by this process and those that it waited for."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._used()

    @staticmethod
    def _used() -> float:
        return sum(map(sum, (os.times()[:2], os.times()[2:4])))

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._wall, "cpu": self._used() - self._cpu}


def ours(data: str, tokenizer_name: str, packing: bool, max_length: int, held_out: float = 0.0) -> dict[str, float]:
    """`prepare` of a recipe, the file read included."""
    import datasets
    import torch

    from instructft.data.prepare import prepare
    from instructft.models.tokenizer import load_tokenizer
    from instructft.recipe.load import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.yaml"
        path.write_text(
            f"model: {{config: {{model_type: gpt2}}, tokenizer: {tokenizer_name}}}\n"
            f"data: {{datasets: [{{path: {data}}}], template: instruction, max_length: {max_length}, "
            f"packing: {str(packing).lower()}, splits: {{validation: {held_out}}}}}\n"
        )
        recipe = load_recipe(path)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(recipe)
    clock = Clock()
    prepared = prepare(recipe, tokenizer)
    measured = clock.read()
    rows = len(prepared.splits["train"])  # packs, when packed
    return {
        **measured,
        "tokens": prepared.tokens["train"],
        "fill": prepared.tokens["train"] / rows / max_length,
    }


def theirs(data: str, tokenizer_name: str, packing: bool, max_length: int) -> dict[str, float]:
    """TRL's preparation of prompt-completion rows, in as many processes as serve it best here (two are slower)."""
    import datasets
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    tokenizer.pad_token = tokenizer.eos_token
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8))
    torch.set_num_threads(1)

    def render(row: dict[str, str]) -> dict[str, str]:
        extra = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        return {
            "prompt": f"### Instruction:\n{row['instruction']}\n\n{extra}### Response:\n",
            "completion": row["output"],
        }

    raw = datasets.load_dataset("json", data_files=data, split="train")
    ready = raw.map(render, remove_columns=raw.column_names)  # not timed: TRL is given its own format
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, max_length=max_length, packing=packing, use_cpu=True, bf16=False, report_to="none")
        clock = Clock()
        trainer = SFTTrainer(model, args, train_dataset=ready, processing_class=tokenizer)
        measured = clock.read()
    tokens = sum(map(len, trainer.train_dataset.with_format("arrow")["input_ids"].to_pylist()))
    return {**measured, "tokens": tokens}


def bare(data: str, tokenizer_name: str, packing: bool, max_length: int) -> dict[str, float]:
    """The tokenizer alone, on ready texts in batches: the ceiling."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name).backend_tokenizer
    rows = json.loads(Path(data).read_text(encoding="utf-8"))
    texts = [
        f"### Instruction:\n{r['instruction']}\n\n"
        + (f"### Input:\n{r['input']}\n\n" if r["input"] else "")
        + f"### Response:\n{r['output']}<|endoftext|>"
        for r in rows
    ]
    clock = Clock()
    tokens = 0
    for start in range(0, len(texts), 1000):
        tokens += sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts[start : start + 1000]))
    return {**clock.read(), "tokens": tokens}


def worker(which: str, *asked: Any) -> None:
    found = {"ours": ours, "scale": partial(ours, held_out=0.05), "trl": theirs, "bare": bare}[which](*asked)
    print("RESULT " + json.dumps(found))


def memory(process: int) -> float:
    """MiB of a process and all below it."""
    found, total = [process], 0
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith(("Pss_Anon:", "Pss_Shmem:")) else 0
        except OSError:  # it has ended
            continue
    return total / 1024


def run(which: str, data: Path, given: argparse.Namespace, packing: bool, cache: Path) -> dict[str, float]:
    """One measurement in a process of its own, with `cache` as its Hugging Face home."""
    command = [sys.executable, __file__, "--worker", which, "--data", str(data), "--tokenizer", given.tokenizer]
    command += ["--max-length", str(given.max_length)]
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "CI": "1"}
    command += ["--packing"] if packing else []
    peak = 0.0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.1)
        said.seek(0)
        text = said.read()
    line = next((line for line in text.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{which} failed:\n{text[-6000:]}")
    return {**json.loads(line.removeprefix("RESULT ")), "peak_mib": peak}


def scale(given: argparse.Namespace) -> None:
    """Ours alone, packed and with rows held out: how time and memory grow with the rows."""
    print("| rows | tokens | seconds | processor seconds | peak MiB | from the cache, seconds |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for rows in given.scale:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.json"
            build_rows(Path(given.data), data, rows)
            cold, warm = (run("scale", data, given, True, Path(folder) / "cache") for _ in range(2))
        print(
            f"| {rows:,} | {cold['tokens']:,} | {cold['seconds']:.1f} | {cold['cpu']:.1f} | {cold['peak_mib']:,.0f} | "
            f"{warm['seconds']:.1f} |",
            flush=True,
        )


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", default=str(DATA / "rows.json"))
    parser.add_argument("--tokenizer", default=str(DATA / "gpt2"))
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--scale", type=int, nargs="+")
    parser.add_argument("--worker", choices=["ours", "scale", "trl", "bare"])
    parser.add_argument("--packing", action="store_true")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.data, args.tokenizer, args.packing, args.max_length)
        return
    if args.scale:
        scale(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        build_rows(Path(args.data), data, args.rows)
        found: dict[tuple[str, bool], list[dict[str, float]]] = {}
        cached: list[float] = []
        for i in range(args.repeats):  # interleaved, so that a slower spell of the machine meets them all
            for packing in (False, True):
                for which in ("ours", "trl", "bare"):
                    cache = Path(folder) / f"cache-{which}-{packing}-{i}"
                    found.setdefault((which, packing), []).append(run(which, data, args, packing, cache))
                    if which == "ours":
                        cached.append(run(which, data, args, packing, cache)["seconds"])

    def median(which: str, packing: bool, key: str) -> float:
        return statistics.median(one[key] for one in found[which, packing])

    print(f"{args.rows:,} rows, {median('ours', False, 'tokens'):,.0f} tokens, median of {args.repeats}\n")
    print("| | tokens/s | × TRL | share of bare tokenizer | seconds | processor seconds | × TRL | peak MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for packing in (False, True):
        speed = {w: median(w, packing, "tokens") / median(w, packing, "seconds") for w in ("ours", "trl", "bare")}
        for which in ("ours", "trl"):
            name = f"{'instructft' if which == 'ours' else 'TRL'}, {'packed' if packing else 'unpacked'}"
            print(
                f"| {name} | {speed[which]:,.0f} | {speed[which] / speed['trl']:.1f} | "
                f"{speed[which] / speed['bare']:.0%} | {median(which, packing, 'seconds'):.1f} | "
                f"{median(which, packing, 'cpu'):.1f} | "
                f"{median('trl', packing, 'cpu') / median(which, packing, 'cpu'):.1f} | "
                f"{median(which, packing, 'peak_mib'):,.0f} |"
            )
    print(f"\nPacks of {args.max_length:,} tokens: {median('ours', True, 'fill'):.2%} full.")
    print(f"From the cache: {statistics.median(cached):.2f} s")


if __name__ == "__main__":
    main()
