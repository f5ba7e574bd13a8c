"""Batches made token by token, in plain PyTorch: what a collator must give, whatever it does to be fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def random_rows(count: int, packed: bool, longest: int = 40, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of up to `longest` tokens, or packs of up to three documents as `packing.pack` makes them."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        lengths = draw.integers(2, longest // 3 + 1, size=draw.integers(1, 4) if packed else 1).tolist()
        ids = draw.integers(1, 90, size=sum(lengths))
        labels = np.where(draw.random(len(ids)) < 0.6, ids, -100)
        labels[-1] = ids[-1]
        starts = np.cumsum(lengths) - lengths
        labels[starts] = -100
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        rows.append({**row, "seq_lengths": lengths} if packed else row)
    return rows


def plain_batch(rows: list[dict[str, Any]], pad: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows (B, T), each on the left; packs with positions that count each document from 0."""
    width = width or max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for row in rows:
        n = len(row["input_ids"])
        rest = width - n
        batch["input_ids"].append([*row["input_ids"], *[pad] * rest])
        batch["labels"].append([*row["labels"], *[-100] * rest])
        batch["attention_mask"].append([*[1] * n, *[0] * rest])
        batch["position_ids"].append([i for length in row.get("seq_lengths", []) for i in range(length)] + [0] * rest)
    del batch["attention_mask" if "seq_lengths" in rows[0] else "position_ids"]
    return {name: torch.tensor(values) for name, values in batch.items()}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Equal in keys, dtypes, shapes and numbers."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype
        if isinstance(value, torch.Tensor) else found[name] == value
        for name, value in wanted.items()
    )  # fmt: skip


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
    """The mean over all supervised tokens of all batches, by a plain forward."""
    model.zero_grad()
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / tokens
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters()]
