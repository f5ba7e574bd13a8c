"""Rows that are nearly the same as a held-out one leave training, and no others."""

from __future__ import annotations

import numpy as np
import pytest

import instructft
from instructft.check.audit import audit
from instructft.data import deduplicate
from instructft.data.arrow.store import scratch
from instructft.data.arrow.token_rows import TokenRows, flat_rows
from instructft.data.deduplicate import Known
from instructft.data.prepare import prepare_held_out
from instructft.data.streaming import prepare_stream
from instructft.errors import DataError
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


WIDE = ["data.max_length=1000", "model.config.n_positions=1024"]


def own_test_set(recipe, train, test, name):
    """What is prepared from training rows beside a test set of their own."""
    path = recipe(test, name=f"{name}-test").data.datasets[0].path
    overrides = [*WIDE, f"data.test=[{{path: {path}}}]", "data.splits.validation=0", "data.splits.test=0"]
    return recipe(train, name=name, overrides=overrides)


def test_copies_in_groups_leave_training(recipe):
    rows = long_rows(60)
    copies = [{**rows[7], "output": rows[7]["output"] + f" and {i}"} for i in range(5)]
    made = prepared(own_test_set(recipe, [*rows[:50], *copies], [rows[7], *rows[50:]], "groups"))
    assert made.dropped == {"near_duplicate_of_held_out": 6}
    assert made.rows == {"train": 49, "validation": 0, "test": 11}


def test_a_data_set_that_is_held_out_wholly_leaves_training(recipe):
    rows = long_rows(30)
    both = own_test_set(recipe, rows[:10], rows[:10], "all")
    entries = [both.data.datasets[0].path, recipe(rows[10:], name="other").data.datasets[0].path]
    overrides = [
        *WIDE,
        f"data.test=[{{path: {both.data.test[0].path}}}]",
        "data.splits.validation=0",
        "data.splits.test=0",
    ]
    made = prepared(recipe(*({"path": path} for path in entries), name="two", overrides=overrides))
    assert made.dropped == {"near_duplicate_of_held_out": 10}
    assert made.rows["train"] == 20
    with pytest.raises(DataError, match="every training row is nearly the same as a held-out one"):
        prepared(both)


ONE_IN_TEN = ["data.splits.validation=0.1", "data.splits.test=0"]


def test_a_file_of_one_row_over_and_over_is_trained_and_told(recipe):
    """A first try of many; held out by ourselves, so that no other choice of rows would do."""
    made = prepared(recipe([{"instruction": "Colour?", "output": "red"}] * 20, overrides=ONE_IN_TEN))
    assert made.rows == {"train": 18, "validation": 2, "test": 0}
    assert made.alike
    assert "says nothing of other rows" in dict(made.account(128))["held out"]
    assert not prepared(recipe(long_rows(30), name="other", overrides=ONE_IN_TEN)).alike


def test_a_dialogue_that_extends_a_held_out_one_leaves_training(recipe):
    rows = long_rows(40)

    def talk(*numbers, system=None):
        turns = [{"role": "system", "content": system}] if system else []
        for i in numbers:
            turns += [
                {"role": "user", "content": rows[i]["instruction"]},
                {"role": "assistant", "content": rows[i]["output"]},
            ]
        return {"messages": turns}

    train = [talk(0, 1, 2), talk(3, system="You are kind. " * 20), *(talk(i, i + 1) for i in range(10, 30, 2))]
    made = prepared(own_test_set(recipe, train, [talk(0), talk(3), talk(35)], "talks"))
    assert made.dropped == {"near_duplicate_of_held_out": 2}


def under(row, number):
    """A row under a system message that is its own, and longer than the row."""
    return {**row, "system": " ".join(f"s{number}y{j}" for j in range(60))}


def test_the_same_pair_under_another_system_message_leaves_training(recipe):
    rows = [{**row, "instruction": f"Please tell me all of it: {i}?"} for i, row in enumerate(long_rows(40))]
    alone = {**rows[2], "output": rows[30]["output"]}  # another question, the same answer
    other = {**rows[32], "output": rows[3]["output"]}  # the same question, another answer
    train = [under(row, i) for i, row in enumerate([*rows[:20], rows[30], rows[31], alone, other])]
    held_out = [under(row, 100 + i) for i, row in enumerate(rows[30:34])]
    made = prepared(own_test_set(recipe, train, held_out, "systems"))
    assert made.dropped == {"near_duplicate_of_held_out": 2}
    left = {row["output"] for row in [*rows[:20]]}
    assert left <= set(answers(made.splits["train"], instructft.load_tokenizer(recipe(rows))))


def test_check_train_and_a_stream_count_the_same_leaks(recipe):
    """Copies in a group, a data set that is held out whole, a dialogue that goes on, a pair under another system."""
    rows = long_rows(60)
    copies = [{**rows[7], "output": rows[7]["output"] + f" and {i}"} for i in range(5)]
    longer = {**rows[51], "output": rows[51]["output"] + "\n\n" + rows[30]["output"]}
    train = [*rows[:50], *copies, longer, under(rows[52], 1), *rows[56:]]
    asked = own_test_set(recipe, train, [rows[7], rows[51], under(rows[52], 2), *rows[56:]], "same")
    tokenizer = instructft.load_tokenizer(asked)
    found = audit(asked, tokenizer)["total"]["findings"]["leaks"]["rows"]
    assert found == prepared(asked).dropped["near_duplicate_of_held_out"] == 12
    entry = asked.data.datasets[0].model_copy(update={"streaming": True})
    data = asked.data.model_copy(update={"datasets": (entry,)})
    stream = prepare_stream(asked.model_copy(update={"data": data}), tokenizer, prepare_held_out(asked, tokenizer))
    assert len(list(stream.splits["train"])) == len(train) - 12
    assert stream.dropped == {"near_duplicate_of_held_out": 12}


def test_a_large_index_in_a_file_and_rows_in_blocks_give_the_same_matches(monkeypatch, tmp_path):
    rng = np.random.default_rng(3)
    held = [rng.integers(0, 50, rng.integers(3, 60)) for _ in range(80)]
    rows = [held[i % 80].copy() for i in range(60)] + [rng.integers(0, 50, rng.integers(3, 60)) for _ in range(100)]
    for row in rows[:60]:
        row[-1] = 50
    sets = [of_tokens(held[:50]), of_tokens(held[50:])]
    whole = Known(sets).matches(of_tokens(rows))
    assert (whole[:60] >= 0).sum() > 20
    assert (whole[60:] < 0).all()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(deduplicate, "_SORTED_AT_ONCE", 100)
    monkeypatch.setattr(deduplicate, "scratch", lambda count, dtype: scratch(count, dtype, in_memory=10))
    monkeypatch.setattr(TokenRows.blocks, "__defaults__", (200,))
    known = Known(sets)
    assert isinstance(known._runs, np.memmap)
    assert known.matches(of_tokens(rows)).tolist() == whole.tolist()


def of_tokens(rows):
    ids = np.concatenate(rows).astype(np.int32)
    return flat_rows({"input_ids": ids, "labels": ids}, np.array(list(map(len, rows))))
