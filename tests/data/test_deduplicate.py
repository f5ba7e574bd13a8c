"""Rows that are nearly the same as a held-out one leave training, and no others."""

from __future__ import annotations

import instructft
from tests.helpers.rows import answers, held, prepared


def long_rows(count):
    kinds = ["old", "young", "tired", "clever", "shy", "proud", "lazy", "quick"]
    words = [f"w{i}x{j}" for i in range(count) for j in range(30)]
    return [
        {"instruction": f"Write {kinds[i % 8]} text {i}.", "output": " ".join(words[30 * i : 30 * i + 30])}
        for i in range(count)
    ]


def test_rows_nearly_the_same_as_held_out_ones_leave_training_and_are_counted(recipe):
    rows = long_rows(40)
    asked = recipe(rows, overrides=["data.max_length=1000", "model.config.n_positions=1024"])
    where = held(asked)
    planted = where["train"][:5]
    for train_row, test_row in zip(planted[:3], where["test"], strict=False):
        copied = dict(rows[test_row])
        first, *rest = copied["output"].split(" ")
        copied["output"] = " ".join([first + "!", *rest])  # nearly, not exactly
        rows[train_row] = copied
    rows[planted[3]] = dict(rows[where["validation"][0]])  # exactly
    rows[planted[4]] = {**rows[planted[4]], "instruction": rows[where["test"][0]]["instruction"]}  # the question only
    made = prepared(recipe(rows, name="planted", overrides=["data.max_length=1000", "model.config.n_positions=1024"]))
    assert made.dropped == {"near_duplicate_of_held_out": 4}
    assert made.rows["train"] == len(where["train"]) - 4
    left = answers(made.splits["train"], instructft.load_tokenizer(asked))
    assert left == [rows[i]["output"] for i in where["train"] if i not in planted[:4]]
