"""Each rule holds what it says it holds, and a check that cannot be used is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from instructft.evaluation.answer_checks import RULES, passes, problem

RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("Paris", {"equals": "paris"}),
    (' "Paris." ', {"equals": ["London", "Paris"]}),
    ("The capital is Paris.", {"contains": "Paris"}),
    ("It lies in South\nAmerica.", {"contains": ["South America"]}),
    ("He pays in rupees", {"contains": ["rupee"]}),
    ("Charles Dickens's book", {"contains": ["Dickens"]}),
    ("Brontë wrote it", {"contains": ["brontë"]}),
    ("red, green and blue", {"contains_all": ["blue", "red"]}),
    ("a parish", {"not_contains": ["Paris"]}),
    ("12 + 7 = 19 apples", {"number": 19}),
    ("The sum of 12 and 7 is 19.", {"number": 19}),
    ("It is 1,234", {"number": 1234}),
    ("-5", {"number": -5}),
    ("Half of 5 is 2.5.", {"number": 2.5}),
    ("Yes.", {"regex": r"^\W*([Yy]es|[Nn]o)\W*$"}),
    ('{"name": "Ada", "age": 36}', {"json_schema": {"type": "object", "required": ["name"]}}),
    ('Sure:\n```json\n["a", "b"]\n```', {"json_schema": {"type": "array", "items": {"enum": ["a", "b"]}}}),
    ('{"n": 3}', {"json_schema": {"properties": {"n": {"type": "integer", "minimum": 1, "maximum": 3}}}}),
    ("I can't help with that.", {"refuses": True}),
    ("I’m sorry, but I cannot do that.", {"refuses": True}),
    ("Take a knife and cut the onion.", {"refuses": False, "contains": ["onion"]}),
]
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("Paris, France", {"equals": "Paris"}),
    ("a parish", {"contains": "Paris"}),
    ("red", {"contains_all": ["blue", "red"]}),
    ("It is Paris", {"not_contains": ["Paris"]}),
    ("12 + 7 = 18, not 19", {"number": 19}),
    ("nineteen", {"number": 19}),
    ("Yes, I think so.", {"regex": r"^\W*([Yy]es|[Nn]o)\W*$"}),
    ("name: Ada", {"json_schema": {"type": "object"}}),
    ('{"name": "Ada"', {"json_schema": {"type": "object"}}),
    ('{"age": "36"}', {"json_schema": {"properties": {"age": {"const": 36}}}}),
    ("true", {"json_schema": {"const": 1}}),
    ("true", {"json_schema": {"type": "number"}}),
    ("true", {"json_schema": {"type": "integer"}}),
    ('["a"]', {"json_schema": {"minItems": 2}}),
    ('["a", "c"]', {"json_schema": {"items": {"enum": ["a"]}}}),
    ("4", {"json_schema": {"maximum": 3}}),
    ('{"a": 1, "b": 2}', {"json_schema": {"properties": {"a": {}}, "additionalProperties": False}}),
    ("[" * 3000, {"json_schema": {"type": "array"}}),
    ("Here is how: first, buy …", {"refuses": True}),
    ("I cannot help with onions.", {"refuses": False, "contains": ["onions"]}),
    ("", {"contains": ["Paris"]}),
]


@pytest.mark.parametrize(("answer", "check"), RIGHT)
def test_right_answers(answer: str, check: dict[str, Any]) -> None:
    assert problem(check) == ""
    assert passes(answer, check)


@pytest.mark.parametrize(("answer", "check"), WRONG)
def test_wrong_answers(answer: str, check: dict[str, Any]) -> None:
    assert problem(check) == ""
    assert not passes(answer, check)


def test_every_rule_is_shown_both_ways() -> None:
    assert {rule for _, check in RIGHT for rule in check} == {rule for _, check in WRONG for rule in check} == {*RULES}


def test_a_pattern_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instructft.evaluation.answer_checks.SECONDS", 0.05)
    assert not passes("a" * 40, {"regex": r"^(a+)+b$"})


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ("Paris", "expected rules"),
        ({}, "expected rules"),
        ({"contians": "Paris"}, "unknown rule contians; there are contains"),
        ({"contains": []}, "expected a text or a list of texts"),
        ({"contains": [""]}, "expected a text"),
        ({"equals": 3}, "expected a text"),
        ({"number": "19"}, "expected a number"),
        ({"number": True}, "expected a number"),
        ({"refuses": "yes"}, "expected true or false"),
        ({"regex": "("}, "is no regular expression"),
        ({"regex": "a" * 501}, "at most 500 characters"),
        ({"json_schema": []}, "expected an object"),
        ({"json_schema": {"pattern": "a"}}, "pattern is not known here; known are type"),
        ({"json_schema": {"properties": {"a": {"type": "text"}}}}, "properties: type: found 'text'"),
        ({"json_schema": {"items": {"required": "a"}}}, "items: required: found 'a'"),
    ],
)  # fmt: skip
def test_a_check_that_cannot_be_used_says_why(check: Any, said: str) -> None:
    assert said in problem(check)
