"""Rows to evaluate on, and the loss of a model over them by a plain loop."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.device import on

ROWS: list[dict[str, Any]] = [
    {"instruction": "Name the capital of France.", "output": "Paris"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello there, you. \n"}]},
    {"instruction": "Who wrote it?", "context": "Ada wrote it in London.", "response": "Ada"},
    {"instruction": "Add.", "input": "1 2", "output": "1 + 2 = 3"},
    {"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["a", "b c", "d", "e f"])]},  # noqa: B905
]
FIGURES = {"loss", "perplexity", "exact_match", "rougeL", "bleu", "cut", "rows", "answer_tokens", "reference_tokens"}
FIGURES |= {"stopped", "repeated", "intervals", "groups", "metrics"}


def conversations() -> list[list[dict[str, Any]]]:
    """`ROWS` as conversations."""
    return [
        [{"role": "user", "content": "Name the capital of France."}, {"role": "assistant", "content": "Paris"}],
        ROWS[1]["messages"],
        [
            {"role": "user", "content": "Who wrote it?", "context": "Ada wrote it in London."},
            {"role": "assistant", "content": "Ada"},
        ],
        [{"role": "user", "content": "Add.", "input": "1 2"}, {"role": "assistant", "content": "1 + 2 = 3"}],
        ROWS[4]["messages"],
    ]  # fmt: skip


def plain_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """One row at a time, one token at a time, no batch and no padding."""
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(on(model, torch.tensor([row["input_ids"]]))).logits[0].double()
        for position in range(1, len(row["input_ids"])):
            if row["labels"][position] != -100:
                total -= float(logits[position - 1].log_softmax(-1)[row["labels"][position]])
                tokens += 1
    return total / tokens


def row(nll: float = 1.0, tokens: int = 2, **more: Any) -> dict[str, Any]:
    """An evaluated row: answered rightly, unless `more` says otherwise."""
    known = {"prompt": "?", "prediction": "a", "reference": "a", "finish_reason": "stop", "rougeL": 1.0}
    return {**known, "nll": nll, "supervised_tokens": tokens, "answer_tokens": 1, "repeated": 0.0, **more}
