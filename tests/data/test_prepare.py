"""From files to ids: every row of the data is trained, held out or counted, and the account is exact."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import islice

import pytest

import instructft
from instructft.data.prepare import prepare_dataset
from instructft.errors import DataError
from tests.data.test_readers import write
from tests.helpers.rows import SHAPES, answers, made_up, prepared

FAULTS = [
    ({"messages": [{"role": "user", "content": "a"}]}, "no_assistant_turn"),
    ({"messages": []}, "no_assistant_turn"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "empty_answer"),
    ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}, "empty_prompt"),
    ({"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]}, "not_text"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "no_assistant_turn"),
    ({"messages": "a"}, "not_a_dialogue"),
    ({"other": "a"}, "not_a_dialogue"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}, "no_loss"),
]


def test_every_planted_fault_is_found_and_nothing_else(recipe):
    good = SHAPES["messages"]
    rows = [row for i, (fault, _) in enumerate(FAULTS * 2) for row in (fault, good[i % len(good)])]
    mine = recipe([*good[:1], *rows], overrides=["check.max_dropped_share=0.5"])
    made = prepared(mine)
    assert made.dropped == Counter(reason for _, reason in FAULTS * 2)
    assert sum(made.rows.values()) + sum(made.dropped.values()) == len(rows) + 1
    tokenizer = instructft.load_tokenizer(mine)
    found = [answer for split in made.splits.values() for answer in answers(split, tokenizer)]
    expected = [good[0], *(good[i % len(good)] for i in range(len(FAULTS) * 2))]
    assert sorted(found) == sorted(row["messages"][1]["content"] for row in expected)


def test_the_collector_is_left_as_it_was_found(recipe, monkeypatch):
    monkeypatch.setattr("instructft.data.prepare._LEFT_BY_OTHERS", [])
    gc.unfreeze()
    prepared(recipe(SHAPES["messages"]))
    assert gc.get_freeze_count() == 0
    gc.freeze()  # as somebody else may have done, who wants it to stay so
    prepared(recipe(SHAPES["messages"]))
    assert gc.get_freeze_count() > 0


def test_what_nothing_reads_is_one_error_with_all_of_it(recipe):
    good = SHAPES["messages"]
    rows = [*good, {**good[0], "label": False}, {**good[1], "label": True, "mood": "x"}]
    with pytest.raises(DataError) as caught:
        prepared(recipe(rows))
    message = str(caught.value)
    assert f"column `label`, 2 rows ({len(rows) - 1}, {len(rows)}), such as false: rows that compare answers" in message
    assert f"column `mood`, 1 row ({len(rows)})" in message
    assert "data.ignore: [label, mood]" in message
    made = prepared(recipe(rows, overrides=["data.ignore=[label, mood]", "data.splits.validation=0"], name="again"))
    assert sum(made.rows.values()) + made.dropped["near_duplicate_of_held_out"] == len(rows)


def test_what_a_users_message_says_is_left_out_for_users_alone(recipe):
    turns = [{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b", "train": False}]
    rows = [{"messages": [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}]
    none = "data.splits={validation: 0, test: 0}"
    with pytest.raises(DataError, match=r"What does not matter: data.ignore: \[user.train\]\."):
        prepared(recipe(rows, overrides=[none]))
    found = prepared(recipe(rows, overrides=[none, "data.ignore=[user.train]"]))
    assert found.supervised_tokens["train"] == 2 * len(found.splits["train"])  # "d" and the end


def test_a_data_set_that_loses_too_many_rows_is_refused_with_their_columns(recipe):
    rows = [*made_up(4), *[{"title": "t", "body": "b"}] * 6]
    with pytest.raises(DataError, match=r"(?s)60\.0% of the 10 rows .*value: title, body.*max_dropped_share"):
        prepared(recipe(rows, overrides=["data.splits.validation=0"]))


def test_a_long_document_is_divided_and_none_of_it_is_lost(recipe):
    rows = [{"text": f"word {number} " * 40} for number in range(4)]
    mine = recipe(rows, overrides=["data.max_length=32", "data.splits={validation: 0, test: 0}"])
    tokenizer, made = instructft.load_tokenizer(mine), prepared(mine).splits["train"]
    ids = [token for row in made for token in row["input_ids"]]
    ended = [[*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for row in rows]
    assert ids == [token for document in ended for token in document]
    assert all(row["labels"] == row["input_ids"] and len(row["input_ids"]) <= 32 for row in made)


def test_the_fingerprint_changes_when_and_only_when_an_id_or_label_changes(recipe):
    base = prepared(recipe(made_up(40)))
    same = prepared(recipe(made_up(40), overrides=["train.seed=9", "data.max_length=100"], name="again"))
    assert same.fingerprint == base.fingerprint
    others = [
        prepared(recipe(made_up(40), overrides=[override])).fingerprint
        for override in (
            "data.seed=9",
            "data.train_on=everything",
            "data.template=chatml",
            "data.max_length=28",
            "data.splits.test=0.1",
        )
    ]
    changed = made_up(40)
    changed[17]["output"] = "Answer 17!"
    others.append(prepared(recipe(changed)).fingerprint)
    others.append(prepared(recipe(made_up(40)[::-1])).fingerprint)
    assert len({base.fingerprint, *others}) == len(others) + 1


def test_the_fingerprint_knows_where_a_row_ends():
    from datasets import Dataset, DatasetDict

    from instructft.data.prepare import Prepared

    def fingerprint(*rows, split="train"):
        made = Dataset.from_list([{"input_ids": list(row), "labels": list(row)} for row in rows])
        return Prepared(DatasetDict({split: made}), {split: len(made)}).fingerprint

    assert fingerprint([1, 2], [3]) == fingerprint([1, 2], [3])
    assert (
        len(
            {
                fingerprint([1, 2], [3]),
                fingerprint([1], [2, 3]),
                fingerprint([1, 2, 3]),
                fingerprint([1, 2], [3], split="test"),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("saved", "words"),
    [(0.04, "save 4% of the slots"), (0.0, "save 0% of the slots"), (-0.34, "take 34% more slots")],
)
def test_why_auto_took_no_packs_is_told_without_a_negative_share(saved, words):
    from datasets import Dataset, DatasetDict

    from instructft.data.prepare import Prepared

    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    made = Prepared(DatasetDict({"train": rows}), {"train": 2}, saved=saved)
    assert dict(made.account(8))["packed"] == f"no: packs would {words}, and auto begins where they save 10%"


def test_a_mix_by_weight_repeats_no_row_and_counts_what_it_leaves_out(recipe, tmp_path):
    def entries(*weights):
        made = []
        for i, (count, weight) in enumerate(zip((60, 30), weights, strict=True)):
            rows = [
                {"instruction": f"Ask {i} {j * 7919}?", "output": f"Set {i} says {j * 104729}."} for j in range(count)
            ]
            made.append({"path": str(write(tmp_path / f"{i}", ".jsonl", rows)), "weight": weight})
        return made

    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
    no_splits = ["data.splits={validation: 0.0, test: 0.0}"]
    plain = prepared(recipe(*entries(1, 1), overrides=no_splits, name="plain"))
    assert plain.rows["train"] == 90
    assert not plain.dropped
    asked = recipe(*entries(1, 3), overrides=no_splits, name="weighed")
    made = prepared(asked)
    tokenizer = instructft.load_tokenizer(asked)
    said = Counter(answer.split(" ")[1] for answer in answers(made.splits["train"], tokenizer))
    assert said == {"0": 10, "1": 30}
    assert len(set(answers(made.splits["train"], tokenizer))) == 40
    assert made.dropped == {"left_out_by_weight": 50}
    other = prepared(recipe(*entries(1, 3), overrides=[*no_splits, "data.seed=1"], name="weighed"))
    assert other.fingerprint != made.fingerprint


@pytest.mark.parametrize(
    ("repeat", "times"), [(1, [1] * 20), (2, [2] * 20), (2.5, [2] * 10 + [3] * 10), (0.5, [0] * 10 + [1] * 10)]
)
def test_rows_are_trained_as_often_as_their_entry_says(recipe, tmp_path, repeat, times):
    few = [{"instruction": f"Ask {i * 7919}?", "output": f"few {i}"} for i in range(20)]
    rest = [{"instruction": f"Say {i * 7919}.", "output": f"rest {i}"} for i in range(10)]
    entries = [{"path": str(write(tmp_path, ".jsonl", few)), "repeat": repeat}, rest]
    asked = recipe(*entries, overrides=["data.splits={validation: 0, test: 0}"])
    made = prepared(asked)
    said = Counter(answers(made.splits["train"], instructft.load_tokenizer(asked)))
    assert sorted(said[f"few {i}"] for i in range(20)) == times
    assert all(said[f"rest {i}"] == 1 for i in range(10))
    assert made.rows["train"] == sum(times) + 10
    assert made.dropped == ({"left_out_by_repeat": 10} if repeat < 1 else {})


def test_a_repeated_row_is_neither_held_out_nor_a_leak_of_itself(recipe, tmp_path):
    rows = [{"instruction": f"Ask {i * 7919}?", "output": f"answer {i * 104729} of it all"} for i in range(40)]
    once = {"path": str(write(tmp_path, ".jsonl", rows))}
    plain, twice = (prepared(recipe({**once, "repeat": n}, name=f"r{n}")) for n in (1, 2))
    assert twice.rows == {**plain.rows, "train": 2 * plain.rows["train"]}
    assert not twice.dropped


def test_shares_of_a_mix_may_be_of_tokens(recipe, tmp_path):
    """Sets of long and of short rows: by rows the long ones are nearly all that is trained."""
    long = [{"instruction": f"Ask {i * 7919}?", "output": "long " + f"{i} " * 40} for i in range(40)]
    short = [{"instruction": f"Say {i * 7919}.", "output": f"short {i}"} for i in range(200)]
    for name, rows in (("long", long), ("short", short)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, ".jsonl", rows)

    def share(weights, *overrides, streaming=False):
        paths = [str(next((tmp_path / name).iterdir())) for name in ("long", "short")]
        entries = [{"path": p, "weight": w, "streaming": streaming} for p, w in zip(paths, weights, strict=True)]
        asked = recipe(*entries, overrides=["data.splits={validation: 0, test: 0}", *overrides], name="mix")
        tokenizer = instructft.load_tokenizer(asked)
        train = prepare_dataset(asked, tokenizer)["train"]
        sizes = {"long": 0, "short": 0}
        for row in islice(train, 150 if streaming else None):
            text = tokenizer.decode([label for label in row["labels"] if label != -100])
            sizes[text.split()[0]] += len(row["input_ids"])
        return sizes["long"] / sum(sizes.values())

    assert share((1, 1.5)) > 0.7
    assert abs(share((1, 1.5), "data.mix_by=tokens") - 0.4) < 0.03
    assert abs(share((1, 1.5), "data.mix_by=tokens", "train.max_steps=1", streaming=True) - 0.4) < 0.03


@pytest.mark.parametrize(("turns", "count"), [("all", 6), ("last", 3)])
def test_a_template_that_rewrites_history_gives_each_turn_a_row(recipe, tmp_path, turns, count):
    template = tmp_path / "rewrites.jinja"
    template.write_text(
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "<A>{{ '!' if loop.last else '' }}{{ m.content + eos_token }}{%- else -%}<U>{{ m.content }}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}<A>{%- endif -%}"
    )
    chat = [{"role": r, "content": f"{r} {n}"} for n in (1, 2) for r in ("user", "assistant")]
    rows = [{"messages": [{**m, "content": f"{m['content']} of {i}"} for m in chat]} for i in range(3)]
    asked = recipe(
        {"path": str(write(tmp_path, ".jsonl", rows))},
        overrides=["data.splits={validation: 0.0, test: 0.0}", f"data.template={template}", f"data.turns={turns}"],
    )
    train = prepared(asked).splits["train"]
    assert len(train) == count
    tokenizer = instructft.load_tokenizer(asked)
    said = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in train]
    wanted = [f"!assistant {n} of {i}{tokenizer.eos_token}" for i in range(3) for n in ((1, 2) if count == 6 else (2,))]
    assert said == wanted
