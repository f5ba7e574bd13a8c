"""The suites that ship are what their generator writes, and can be answered; files of others are read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import DataError, UsageError
from instructft.evaluation.suites import FOLDER, Question, further, read_suites, shipped
from scripts import gate_suites

ROW = {"messages": [{"role": "user", "content": "What is 1 + 1?"}], "check": {"number": 2}}


def every_question() -> list[Question]:
    return read_suites([])[0] + further([])


def test_the_files_are_what_the_generator_writes() -> None:
    assert sorted(gate_suites.suites()) == shipped()
    for folder, made in ((FOLDER, gate_suites.suites()), (FOLDER / "further", gate_suites.further())):
        assert sorted(made) == sorted(path.stem for path in folder.glob("*.jsonl"))
        for name, rows in made.items():
            written = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
            assert written == json.loads(json.dumps(rows)), name


def test_further_questions_are_of_suites_that_ship_and_others_than_those() -> None:
    assert len(further([])) > 1200
    assert {question.suite for question in further(["json", "ours.jsonl", "arc_easy"])} == {"json"}
    assert further(["facts"]) == further(["ours.jsonl"]) == []
    assert not any(question.known for question in further([]))


def test_all_that_ships_can_be_read() -> None:
    questions, others = every_question(), read_suites([])[1]
    assert others == []
    assert len(questions) > 1900
    assert len({question.id for question in questions}) == len(questions)
    assert len({json.dumps(question.messages) for question in questions}) == len(questions)
    assert {question.suite for question in questions if question.known} == {"facts"}
    assert max(len(question.messages) for question in questions) == 7  # several turns
    assert all(question.max_new_tokens <= 40 for question in questions)


def test_a_question_is_not_answered_by_nothing_or_by_itself() -> None:
    """A model that says nothing, the question again, or the same word to all has none of them right."""
    questions = every_question()
    for question in questions:
        asked = question.messages[-1]["content"]
        assert not question.right(""), question.id
        assert not question.right("ling " * 20), question.id
        if question.suite in ("facts", "memory", "arithmetic"):
            assert not question.right(asked), question.id
    refused = [question for question in questions if question.check.get("refuses") is True]
    asked_only = [question for question in questions if question.check.get("refuses") is False]
    assert sum(question.right("I'm sorry, I can't help with that.") for question in refused) == len(refused) == 60
    assert not any(question.right("I'm sorry, I can't help with that.") for question in asked_only)
    assert len(asked_only) == 30


GOOD = {
    "facts": [("What is the capital of France?", "Paris."), ("How many days are in a week?", "There are seven days.")],
    "format": [
        ("List three fruits as 1., 2. and 3.", "1. Apple\n2. Pear\n3. Plum"),
        ("Name one of the fruits. Answer in one word.", "Apple."),
        ("Write the word river in capital letters. Write that word only.", "RIVER"),
        ("Name three fruits on one line, with commas between and nothing else.", "apple, pear, plum"),
        ('Say something about the sea. Begin your answer with "Well,".', "Well, the sea is wide."),
        ("Write a list of fruits, each line beginning with a dash.", "- apple\n- pear\n- plum"),
        ("Is the sea something that one can see? Answer with yes or no only.", "Yes."),
    ],
}


@pytest.mark.parametrize("suite", GOOD)
def test_good_answers_are_right(suite: str) -> None:
    asked = {question.messages[-1]["content"]: question for question in read_suites([suite])[0]}
    for question, answer in GOOD[suite]:
        assert asked[question].right(answer), question


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_files_names_and_tasks(tmp_path: Path) -> None:
    path = written(tmp_path / "ours.jsonl", ROW, "\n", {**ROW, "suite": "sums", "max_new_tokens": 7, "known": True})
    questions, others = read_suites([path, "facts", "arc_easy"])
    assert others == ["arc_easy"]
    assert [(q.id, q.suite, q.max_new_tokens, q.known) for q in questions[:2]] == [
        ("ours-1", "ours", 64, False),
        ("ours-3", "sums", 7, True),
    ]
    assert {question.suite for question in questions[2:]} == {"facts"}
    for names, said in [
        (["facts", "facts"], "holds facts, which another one holds too"),
        ([str(tmp_path / "none.jsonl")], "there is no file"),
        ([str(tmp_path)], "is no .jsonl file"),
        (["./facts"], "is no .jsonl file"),
        (["ours.json"], "is no .jsonl file"),
        (["fact"], 'there is no suite fact; did you mean "facts"'),
    ]:
        with pytest.raises(UsageError, match=said):
            read_suites(names)
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        read_suites([written(tmp_path / "empty.jsonl", "\n")])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("no json\n", "line 2 is no JSON"),
        ([1], "expected an object with messages and check"),
        ({**ROW, "chek": {}}, 'unknown key chek; did you mean "check"'),
        ({"check": {"number": 2}}, "messages: expected a list"),
        ({**ROW, "messages": [{"role": "users", "content": "a"}]}, "with roles system, user, assistant"),
        ({**ROW, "messages": [{"role": "assistant", "content": "a"}]}, "the last one is of the assistant"),
        ({**ROW, "check": {"regex": "("}}, "check: regex: "),
        ({**ROW, "max_new_tokens": 0}, "max_new_tokens: found 0, expected 1 to 2048"),
        ({**ROW, "known": 1}, "known: found 1, expected true or false"),
        ({**ROW, "suite": " "}, "id and suite are texts"),
        ({**ROW, "id": "a"}, "id a stands in line 1 already"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row: Any, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "ours.jsonl", {**ROW, "id": "a"}, row)
    with pytest.raises(DataError) as caught:
        read_suites([path])
    assert said in str(caught.value)
    assert "--suite: ours.jsonl, line 2" in str(caught.value)
