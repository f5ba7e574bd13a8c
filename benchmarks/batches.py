"""From rows to a batch: what a data loader fetches and the collator makes of it, as lists of numbers and as slices.

    python benchmarks/batches.py [--repeats 5] [--batch 32] [--width 1024]

Rows and packs of random tokens, documents of about 170 tokens, in one thread. "Lists" is the road of a loop of one's
own: `datasets` gives each row as Python lists. "Slices" is the road of training: views into Arrow's columns, counted on
the host, packs end to end in one row of a fixed shape too. Milliseconds of processor time, the median; before the table
both roads are compared, number by number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

STEPS = 8  # batches in a round


def data(rows: int, width: int) -> tuple[Any, Any]:
    """Documents of unequal lengths, and the packs that they fill."""
    from datasets import Dataset

    from instructft.data.packing import pack

    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(5, 0.6, rows).astype(int), 8, width)
    ids = [draw.integers(1, 50_000, n).tolist() for n in lengths]
    labels = [[-100] * (len(one) // 3) + one[len(one) // 3 :] for one in ids]
    documents = Dataset.from_dict({"input_ids": ids, "labels": labels})
    return documents, pack(documents, width)


def milliseconds(work: Callable[[Sequence[int]], Any], steps: list[list[int]], repeats: int) -> float:
    """The median over all batches of all rounds, after one that does not count."""
    taken = []
    for turn in range(repeats + 1):
        for step in steps:
            began = time.process_time()
            work(step)
            if turn:
                taken.append(time.process_time() - began)
    return statistics.median(taken) * 1e3


def main() -> None:
    """Compare, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="rows or packs")
    parser.add_argument("--width", type=int, default=1024, help="tokens of a pack, and of the longest row")
    parser.add_argument("--tiny", action="store_true", help="sizes at which the figures say nothing: to try the script")
    args = parser.parse_args()
    if args.tiny:
        args.repeats, args.batch, args.width = 1, 2, 64

    import torch

    from instructft.data.arrow.token_rows import tokens_of
    from instructft.data.batches.counts import Counting
    from instructft.data.batches.flat_packs import FlatPacks
    from instructft.data.collator import CompletionOnlyCollator

    torch.set_num_threads(1)
    documents, packs = data(STEPS * args.batch * max(8, args.width // 64), args.width)
    steps = [list(range(i * args.batch, (i + 1) * args.batch)) for i in range(STEPS)]
    rows = CompletionOnlyCollator(0)
    flat = FlatPacks.of(tokens_of(packs), 0, args.width, args.batch)
    roads = [
        ("rows, padded", "lists", documents, rows),
        ("rows, padded", "slices", tokens_of(documents), Counting(rows)),
        ("packs", "lists", packs, rows),
        ("packs", "slices", tokens_of(packs), Counting(rows)),
        ("packs end to end", "lists", packs, CompletionOnlyCollator(0, flatten=True)),
        ("packs end to end", "slices, of a fixed shape", tokens_of(packs), Counting(flat)),
    ]
    for (_, _, source, collate), (_, _, slices, counting) in ((roads[0], roads[1]), (roads[2], roads[3])):
        for step in steps:
            one, two = collate(source.__getitems__(step)), counting(slices.__getitems__(step))
            if not all(torch.equal(value, two[name]) for name, value in one.items()):
                raise SystemExit(f"rows {step[0]} to {step[-1]} are another batch as slices than as lists")
    print(f"{args.batch} rows or packs of {args.width:,} tokens: the same numbers on both roads\n")
    print("| a batch of | as | fetch, ms | fetch and collate, ms |\n| --- | --- | ---: | ---: |")
    for what, how, source, collate in roads:
        fetch = source.__getitems__
        both = milliseconds(lambda step, c=collate, f=fetch: c(f(step)), steps, args.repeats)  # type: ignore[misc]
        print(f"| {what} | {how} | {milliseconds(fetch, steps, args.repeats):.2f} | {both:.2f} |")


if __name__ == "__main__":
    main()
