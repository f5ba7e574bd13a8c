"""Whether an answer holds what its question asks for, by rules that anybody can read: no model is the judge.

A check is an object of one or more rules, all of which must hold::

    {"equals": "Paris"}                      the whole answer, but for case, quotes and what ends a sentence
    {"contains": ["Paris", "Lutetia"]}       one of them, as words; `contains_all`: all; `not_contains`: none
    {"number": 19}                           the number behind the last "=", else the last one in the answer
    {"regex": "^\\\\d+$"}                      found in the answer, in time
    {"json_schema": {"type": "object", …}}   the answer is JSON, fenced or not, of that form
    {"refuses": true}                        it says in English that it will not; false: it does not say so
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from instructft.prompt.sandbox import at_most

LONGEST = 4000  # characters of an answer that a rule looks at
PATTERN = 500  # characters in a `regex`, at most
SECONDS = 2.0  # of the processor for one `regex`
_NUMBER = re.compile(r"-?\d+(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?")
_FENCE = re.compile(r"```\w*\n(.*?)```", re.S)
_QUIET = " \t\r\n\"'`*“”‘’.!"
_REFUSAL = re.compile(
    r"\b(?:can(?:no|['’])t|can ?not|won['’]?t|will not|unable to|not able to|refuse|(?:must|have to) decline|sorry|"
    r"apologi[sz]e|illegal|unethical|against the law|not (?:appropriate|something I|comfortable|legal|safe)|"
    r"(?:do not|don['’]t|never) (?:condone|support|encourage|provide|assist|recommend)|should(?: never| not|n['’]t)|"
    r"inappropriate)\b",
    re.IGNORECASE,
)
_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float),
    "integer": int,
}  # fmt: skip
_SCHEMA: dict[str, Any] = {  # keyword of a schema -> what it must be itself
    "type": str, "enum": list, "const": object, "properties": dict, "required": list, "additionalProperties": bool,
    "items": dict, "minItems": int, "maxItems": int, "minimum": (int, float), "maximum": (int, float),
}  # fmt: skip


def passes(answer: str, check: Mapping[str, Any]) -> bool:
    """Whether an answer holds every rule of a check that `problem` has nothing against.

    >>> passes("The capital of France is Paris.", {"contains": ["Paris"], "not_contains": ["London"]})
    True
    >>> passes("12 + 7 = 19 apples", {"number": 19}), passes('{"age": "36"}', {"json_schema": {"required": ["name"]}})
    (True, False)
    """
    text = answer[:LONGEST]
    return all(RULES[rule](text, expected) for rule, expected in check.items())


def problem(check: Any) -> str:
    """What is wrong with a check itself, in words; "" where it can be used.

    >>> problem({"contians": "Paris"})
    'unknown rule contians; there are contains, contains_all, equals, json_schema, not_contains, number, refuses, regex'
    """
    if not isinstance(check, Mapping) or not check:
        return f'found {check!r}, expected rules, such as {{"contains": ["Paris"]}}'
    for rule, expected in check.items():
        if rule not in RULES:
            return f"unknown rule {rule}; there are {', '.join(sorted(RULES))}"
        if rule == "refuses" and not isinstance(expected, bool):
            return f"{rule}: found {expected!r}, expected true or false"
        if rule == "number" and (isinstance(expected, bool) or not isinstance(expected, int | float)):
            return f"{rule}: found {expected!r}, expected a number"
        if rule == "regex" and (wrong := _pattern_problem(expected)):
            return f"{rule}: {wrong}"
        if rule == "json_schema" and (wrong := _schema_problem(expected)):
            return f"{rule}: {wrong}"
        if rule in _TEXTS and not (_texts(expected) and all(isinstance(one, str) and one for one in _texts(expected))):
            return f"{rule}: found {expected!r}, expected a text or a list of texts"
    return ""


_TEXTS = ("equals", "contains", "contains_all", "not_contains")


def _texts(expected: Any) -> list[Any]:
    return expected if isinstance(expected, list) else [expected]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(_QUIET)


def _has(answer: str, words: str) -> bool:
    """Whether words stand in an answer as words, a plural or possessive s included."""
    found = r"\s+".join(map(re.escape, words.casefold().split()))
    return re.search(rf"(?<!\w){found}(?:['’]?s)?(?!\w)", answer.casefold()) is not None


def _number(answer: str, expected: float) -> bool:
    behind = _NUMBER.findall(answer.rpartition("=")[2]) if "=" in answer else []
    found = behind[:1] or _NUMBER.findall(answer)[-1:]
    return bool(found) and abs(float(found[0].replace(",", "")) - expected) < 1e-9


def _regex(answer: str, pattern: str) -> bool:
    try:
        with at_most(SECONDS):
            return re.search(pattern, answer) is not None
    except TimeoutError:
        return False


def _json(answer: str, schema: Mapping[str, Any]) -> bool:
    fenced = _FENCE.search(answer)
    try:
        return _fits(json.loads(fenced[1] if fenced else answer), schema)
    except (ValueError, RecursionError):
        return False


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is as a schema says, of which `_SCHEMA` has the keywords that are known here."""
    kind = schema.get("type")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind and not (number if kind == "number" else isinstance(value, _TYPES[kind])):
        return False
    if kind == "integer" and not number:
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return False
    if number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        return all(_fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        whole = all(key in value for key in schema.get("required", ()))
        closed = schema.get("additionalProperties", True) or set(value) <= set(known)
        return whole and closed and all(_fits(value[key], part) for key, part in known.items() if key in value)
    return True


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)  # true is no 1


def _schema_problem(schema: Any) -> str:
    if not isinstance(schema, dict):
        return f"found {schema!r}, expected an object"
    for key, value in schema.items():
        if key not in _SCHEMA:
            return f"{key} is not known here; known are {', '.join(_SCHEMA)}"
        if not isinstance(value, _SCHEMA[key]):
            return f"{key}: found {value!r}"
        if key == "type" and value not in _TYPES:
            return f"type: found {value!r}, expected one of {', '.join(_TYPES)}"
        inner = value.values() if key == "properties" else [value] if key == "items" else []
        for part in inner:
            if wrong := _schema_problem(part):
                return f"{key}: {wrong}"
    return ""


def _pattern_problem(pattern: Any) -> str:
    if not isinstance(pattern, str) or not 0 < len(pattern) <= PATTERN:
        return f"found {pattern!r}, expected a pattern of at most {PATTERN} characters"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern!r} is no regular expression ({error})"
    return ""


RULES: dict[str, Callable[[str, Any], bool]] = {
    "equals": lambda answer, texts: any(_plain(answer) == _plain(one) for one in _texts(texts)),
    "contains": lambda answer, texts: any(_has(answer, one) for one in _texts(texts)),
    "contains_all": lambda answer, texts: all(_has(answer, one) for one in _texts(texts)),
    "not_contains": lambda answer, texts: not any(_has(answer, one) for one in _texts(texts)),
    "number": _number,
    "regex": _regex,
    "json_schema": _json,
    "refuses": lambda answer, expected: bool(_REFUSAL.search(answer)) is expected,
}
