"""A recipe that is written with comments says what it was given, whatever texts and numbers that is."""

from __future__ import annotations

import pytest

from instructft.recipe.commented import WIDTH, commented, flow
from instructft.recipe.yaml_reader import read_document

TEXTS = [
    "no",
    "1e-5",
    "Grüße 👋",
    "two\nlines",
    "  spaces ",
    "null",
    "~",
    "~/models",
    "- a",
    "#",
    "a # b",
    "1:30",
    "0x10",
]
TEXTS += [
    "a: b",
    "{x}",
    "[1",
    "",
    "'",
    '"',
    "C:\\rows.jsonl",
    "\x07",
    "\u2028",
    ".5",
    ".inf",
    ".nan",
    "1_000",
    "=",
    "a,b",
]
TEXTS += ["./rows.jsonl", "../rows.jsonl", "org/name", "@x", "%y", "&a", "*b", "!c", "|", ">", "?", "True", "-"]


def read(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    document = read_document(path)
    assert document.problems == []
    return document.values


def test_values_come_back_as_they_were(tmp_path):
    values = {
        "texts": TEXTS,
        "keys": {text: i for i, text in enumerate(TEXTS) if text},
        "numbers": [1, -1, 0, 2e-5, 0.1, 1e-8, 1 / 3, 5.0, 1e300, True, False, None],
        "deep": {"list": [{"path": "a", "columns": {"question": "Q #1"}}, {"hub": "a/b"}, "x", {}, []], "none": {}},
    }
    reasons = {
        "texts": "why " * 60,
        "texts.3": "this one",
        "deep.list.0.path": "a\nb",
        "deep.list.1": "",
        "numbers": "n",
    }
    text = commented(values, reasons, ["Mine.", "", "long " * 50])
    assert read(tmp_path, text) == values
    assert "  - two" not in text
    assert any(line.endswith('"two\\nlines"  # this one') for line in text.splitlines())


def test_a_comment_stands_behind_its_key_or_above_it_and_never_leaves_it():
    text = commented({"data": {"a": 1, "b": 2}}, {"data.a": "short", "data.b": "evil\nhub: {push: end}\r" + "x " * 70})
    lines = text.splitlines()
    assert lines[:2] == ["data:", "  a: 1  # short"]
    assert all(line.startswith("  #") for line in lines[2:-1])
    assert lines[-1] == "  b: 2"
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize(("number", "text"), [(2e-4, "0.0002"), (2e-5, "2e-5"), (3.0, "3.0"), (0.05, "0.05")])
def test_numbers_are_written_as_people_write_them(number, text):
    assert flow(number) == text
