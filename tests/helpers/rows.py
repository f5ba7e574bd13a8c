"""Rows of every format, and what a recipe makes of rows."""

from __future__ import annotations

import instructft
from instructft.data.load import load_parts
from instructft.data.prepare import prepare


def made_up(count):
    return [
        {"instruction": f"Question {i}?", "input": f"{i}" * (i % 3), "output": f"Answer {i}."} for i in range(count)
    ]


def held(recipe, part=0):
    """split -> row numbers of one part of a recipe."""
    return {name: rows.tolist() for name, rows in load_parts(recipe)[part].rows.items()}


def prepared(recipe):
    return prepare(recipe, instructft.load_tokenizer(recipe))


def answers(split, tokenizer):
    """The texts that carry loss, row by row, without the stop token."""
    kept = [[label for label in row["labels"] if label != -100] for row in split]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]


ODD = [("What is 1?", "One"), ("And 2?", "Two"), ("42", "NA"), ('"a", b', "two\nlines"), ("2024-05-01", "1.50")]


PAIRS = [(q + i, a + i) for i in ("", " red", " blue", " green") for q, a in ODD]  # all different


SHAPES = {
    "alpaca": [{"instruction": q, "output": a} for q, a in PAIRS],
    "dolly": [{"instruction": q, "context": "", "response": a, "category": "c"} for q, a in PAIRS],
    "hh": [{"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": ""} for q, a in PAIRS],
    "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS],
    "messages": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS],
    "prompt-completion": [{"prompt": q, "completion": a} for q, a in PAIRS],
}
