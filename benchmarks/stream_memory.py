"""Memory of a streamed data set: a JSONL file of a million short rows is read, shuffled and encoded, then trained on.

    python benchmarks/stream_memory.py [--rows 1000000] [--packing]

Prints rows, seconds and resident memory at every hundred thousand rows, then the same for a training run that sees
every row once: memory after a tenth of it, at its end, and at most in between.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil

RECIPE = """
model:
  config: {{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 16, n_positions: 128}}
  tokenizer: quickstart
data:
  datasets: [{{path: {data}, streaming: true}}]
  template: instruction
  max_length: 128
  packing: {packing}
  splits: {{validation: 0, test: 0}}
train: {{max_steps: {steps}, per_device_train_batch_size: 64, use_cpu: true, logging_steps: 100, save_strategy: "no"}}
output_dir: {out}
"""


def resident() -> float:
    """MiB of this process."""
    return psutil.Process(os.getpid()).memory_info().rss / 2**20


class Watch(threading.Thread):
    """Notes the memory of this process ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[float] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.1):
            self.seen.append(resident())


def write_rows(path: Path, rows: int) -> None:
    """Rows of about ten tokens, no two the same."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(f'{{"instruction": "Say {i * 7919 % 1000003}.", "output": "{i * 104729 % 999983} it is."}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--packing", action="store_true")
    given = parser.parse_args()

    from rich.console import Console

    import instructft
    from instructft.data.streaming import prepare_stream

    with tempfile.TemporaryDirectory() as folder:
        data, path = Path(folder) / "rows.jsonl", Path(folder) / "stream.yaml"
        write_rows(data, given.rows)
        print(f"file: {data.stat().st_size / 2**20:.0f} MiB, {given.rows:,} rows")
        path.write_text(
            RECIPE.format(data=data, out=f"{folder}/run", packing=str(given.packing).lower(), steps=given.rows // 64)
        )
        recipe = instructft.load_recipe(path)
        stream = prepare_stream(recipe, instructft.load_tokenizer(recipe))
        began, settled, told, most = time.perf_counter(), 0.0, 0, 0.0
        for _ in stream.splits["train"]:
            rows = stream.rows["train"]
            if not settled and rows >= 50_000:
                settled = resident()
                print(f"{rows:>9,} rows  {time.perf_counter() - began:6.1f} s  {settled:6.0f} MiB")
            if rows // 100_000 > told:
                told, now = rows // 100_000, resident()
                most = max(most, now)
                print(f"{rows:>9,} rows  {time.perf_counter() - began:6.1f} s  {now:6.0f} MiB", flush=True)
        seconds = time.perf_counter() - began
        print(f"{stream.rows['train']:,} rows, {stream.tokens['train']:,} tokens in {seconds:.1f} s: ", end="")
        print(f"{stream.tokens['train'] / seconds:,.0f} tokens/s; growth after 50,000 rows {most - settled:+.0f} MiB")

        watch = Watch()
        watch.start()
        facts = instructft.train(recipe, console=Console(quiet=True)).facts
        watch.done.set()
        settled, last = watch.seen[len(watch.seen) // 10], watch.seen[-1]
        print(f"training: {facts['train']['steps']:,} steps, {facts['data']['rows']['train']:,} rows ", end="")
        print(
            f"in {facts['train']['seconds']:.0f} s; after a tenth {settled:.0f} MiB, at the end {last:.0f} MiB, ",
            end="",
        )
        print(f"at most {max(watch.seen[len(watch.seen) // 10 :]):.0f} MiB")


if __name__ == "__main__":
    main()
