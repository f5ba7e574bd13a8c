"""From files to ids: every row of the data is trained, held out or counted, and the account is exact."""

from __future__ import annotations

import gc
from collections import Counter

import pytest

import instructft
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


def test_the_collector_is_left_as_it_was_found(recipe):
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
