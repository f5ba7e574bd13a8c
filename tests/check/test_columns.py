"""Columns under any names are mapped where a guess is clear, and named where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from instructft.check.columns import reading_of
from instructft.errors import DataError

ASKED = ["How do I reset it?", "Where is my parcel?", "Can I pay later?", "Why twice?", "What is your address?"]
SAID = ["Open the settings.", "It left on Monday.", "Yes, above 50 euros.", "One is a hold.", "Main street 5, Oslo."]


def rows(**columns: Any) -> list[dict[str, Any]]:
    return [{name: value(i) if callable(value) else value for name, value in columns.items()} for i in range(5)]


def asked(i: int) -> str:
    return ASKED[i]


def said(i: int) -> str:
    return SAID[i]


def turns(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": ASKED[i]}, {"role": "assistant", "content": SAID[i]}]


CLEAR = {
    "known": (rows(instruction=asked, input="", output=said, id=1), "alpaca", {}),
    "German": (
        rows(nr=7, Kundenfrage=asked, Antwort_Support=said),
        "question-answer",
        ("Kundenfrage", "Antwort_Support"),
    ),
    "another case": (rows(Question=asked, Answer=said), "question-answer", ("Question", "Answer")),
    "one is known": (rows(question=asked, reply=said), "question-answer", ("question", "reply")),
    "answer first": (rows(bot_reply=said, user_msg=asked), "question-answer", ("user_msg", "bot_reply")),
    "Chinese": (rows(问题=asked, 回答=said), "question-answer", ("问题", "回答")),
    "by content": (rows(c2=asked, c1=said, n=3), "question-answer", ("c2", "c1")),
    "a label": (rows(review=lambda i: SAID[i] * 3, verdict=lambda i: "good"), "question-answer", ("review", "verdict")),
    "text and summary": (rows(text=lambda i: SAID[i] * 5, summary=said), "question-answer", ("text", "summary")),
    "a log": (rows(day="2024-01-01", log=turns), "messages", {"messages": "log"}),
    "a log as JSON": (rows(log=lambda i: json.dumps(turns(i))), "messages", {"messages": "log"}),
    "documents": (rows(body=lambda i: SAID[i] * 9, id=3), "text", {"text": "body"}),
}


@pytest.mark.parametrize("case", CLEAR)
def test_a_clear_file_is_read(case: str) -> None:
    found, fmt, columns = CLEAR[case]
    reading = reading_of(found, "rows.csv")
    expected = dict(zip(("question", "answer"), columns, strict=True)) if isinstance(columns, tuple) else columns
    assert (reading.format, reading.columns, reading.usable) == (fmt, expected, 1.0)
    assert bool(reading.because) == bool(columns)  # what is known is no guess


def test_context_and_system_are_found_and_the_rest_is_named() -> None:
    found = rows(Ticket=asked, Reply=said, Context=lambda i: "From the " + SAID[i], Persona="Be kind.", mood="glad")
    reading = reading_of(found, "rows.csv")
    assert reading.columns == {"question": "Ticket", "answer": "Reply", "context": "Context", "system": "Persona"}
    assert reading.ignore == ("mood",)
    assert reading.unread(list(found[0])) == ["mood"]


UNCLEAR = {
    "two answers": (rows(question=asked, answer=said, response=lambda i: "No: " + SAID[i]), ["response", "answer"]),
    "three languages": (rows(en=said, fr=lambda i: "Le " + SAID[i], de=lambda i: "Der " + SAID[i]), ["en", "fr", "de"]),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_an_unclear_file_is_asked_about_or_refused(case: str) -> None:
    found, candidates = UNCLEAR[case]
    with pytest.raises(DataError, match="it is not clear which column") as error:
        reading_of(found, "rows.csv")
    assert all(f"\n  {name}: " in str(error.value) for name in candidates)
    assert "Say it: --columns " in str(error.value)
    questions: list[str] = []

    def choose(question: str, names: list[str]) -> str:
        questions.append(question)
        return names[-1]

    reading = reading_of(found, "rows.csv", choose=choose)
    assert set(reading.columns) == {"question", "answer"}
    assert reading.columns["question"] != reading.columns["answer"]
    assert questions


def test_what_somebody_says_of_columns_is_taken_or_refused() -> None:
    found = rows(en=said, fr=asked)
    assert reading_of(found, "r", {"question": "fr", "answer": "en"}).because == ()
    with pytest.raises(DataError, match="has no column nl; its columns are en, fr"):
        reading_of(found, "r", {"question": "fr", "answer": "nl"})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (rows(prompt=asked, chosen=said, rejected=said), "rows that compare answers"),
        (rows(x=lambda i: i, y=lambda i: 2 * i), "no known format has the columns x, y"),
        ([{}], "its rows have no columns"),
    ],
)
def test_rows_of_another_kind_are_refused(found: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reading_of(found, "rows.csv")
