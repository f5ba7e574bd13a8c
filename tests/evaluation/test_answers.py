"""Figures of one answer beside its reference, and a user's own function with all that may be wrong with it."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

import pytest

from instructft.errors import UsageError
from instructft.evaluation import answers
from instructft.evaluation.answers import FIGURES, Answered, Own, calls_in
from instructft.recipe.schema import ANSWER_FIGURES


def worth(name: str, prediction: str, reference: str, *calls: tuple[str, object]) -> float | None:
    return FIGURES[name](Answered(prediction, reference, True, calls))


def test_the_examples_in_the_docstrings() -> None:
    found = doctest.testmod(answers)
    assert found.attempted >= 4
    assert found.failed == 0


def test_a_recipe_knows_the_same_names() -> None:
    assert tuple(FIGURES) == ANSWER_FIGURES


def test_thoughts_are_no_part_of_an_answer() -> None:
    assert worth("exact_match", "<think>\nhm\n</think>\n\nOslo", "<think>\nelse\n</think>\n\nOslo") == 1
    assert worth("exact_match", "hm</think>\n\nOslo", "Oslo") == 1  # the prompt has opened it
    assert worth("exact_match", "<think>\nOslo, and on", "Oslo") == 0


def test_words_in_any_script() -> None:
    assert worth("token_f1", "Das ist Oslo", "oslo!") == 0.5
    assert worth("token_f1", "", "Oslo") == 0
    assert worth("token_f1", ">=", "> =") == 1  # no words, but characters
    assert worth("token_f1", "東京", "東京都") == pytest.approx(0.8)


def test_json_is_asked_where_the_reference_is_json() -> None:
    assert worth("valid_json", "[1, 2", "[1]") == 0
    assert worth("valid_json", '```json\n{"b": 2}\n```', '{"a": 1}') == 1
    assert worth("valid_json", '{"b": 2}', "Oslo") is None
    assert worth("valid_json", "12", "12") is None  # a number is a text like any other
    assert worth("valid_json", "[" * 100_000, "[1]") == 0


@pytest.mark.parametrize(
    ("around", "given"),
    [
        ("<tool_call>\n{}\n</tool_call>", '{"name": "f", "arguments": {"a": 1}}'),
        ("[TOOL_CALLS][{}]", '{"name": "f", "arguments": {"a": 1}}'),
        ("{}", '{"name": "f", "parameters": {"a": 1}}'),  # Llama 3
        ("{}", '{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}'),
    ],
)
def test_calls_in_the_marks_of_any_template(around: str, given: str) -> None:
    text = around.replace("{}", given)
    assert calls_in(f"I look it up. {text}") == [("f", {"a": 1})]
    for changed, names, calls in ((text, 1, 1), (text.replace("1", "2"), 1, 0), (text.replace('"f"', '"g"'), 0, 0)):
        assert worth("tool_calls", changed, text, ("f", {"a": 1})) == calls
        assert worth("tool_names", changed, text, ("f", {"a": 1})) == names


def test_a_call_that_is_only_thought_of_is_none() -> None:
    call = '{"name": "f", "arguments": {"a": 1}}'
    for said in (f"<think>Shall I {call}?</think>{call}", f"Shall I {call}?</think>\n{call}"):
        assert worth("tool_calls", said, call, ("f", {"a": 1})) == 1
        assert worth("tool_names", call, said, ("f", {"a": 1})) == 1
    assert worth("tool_calls", f"<think>{call}</think>Oslo", call, ("f", {"a": 1})) == 0


def test_calls_that_are_no_json_are_compared_as_text() -> None:
    reference = "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>"
    assert worth("tool_calls", reference.replace("\n", " "), reference, ("f", {"a": 1})) == 1
    assert worth("tool_calls", reference.replace("1", "2"), reference, ("f", {"a": 1})) == 0
    assert worth("tool_calls", "Oslo", "Oslo") is None
    assert calls_in('{"a": ' * 1_000) == []


# ------------------------------------------------------------------------------------------------------- a user's own


def own(tmp_path: Path, text: str) -> Own:
    (tmp_path / "mine.py").write_text(text)
    return Own(str(tmp_path / "mine.py"), "score")


def test_a_function_of_the_user_gets_prediction_reference_and_row(tmp_path: Path) -> None:
    score = own(tmp_path, "def score(prediction, reference, row):\n    return prediction == reference + row['end']\n")
    assert score("a!", "a", {"end": "!"}) == 1
    assert not any(name.startswith("instructft_metric") for name in sys.modules)


def test_a_file_of_the_user_is_run_as_a_script_is(tmp_path: Path) -> None:
    """It may import what lies beside it, and hold dataclasses with texts as annotations, which look for their file."""
    (tmp_path / "beside_it.py").write_text("def norm(text): return text.lower()\n")
    score = own(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_it import norm\n"
        "@dataclass\nclass Weights:\n    right: int = 2\n"
        "def score(prediction, reference, row): return Weights().right * (norm(prediction) == norm(reference))\n",
    )
    sys.modules.pop("beside_it")
    assert score("A", "a", {}) == 2
    assert str(tmp_path) not in sys.path


def test_what_a_function_does_to_its_row_is_undone(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}]}
    score = own(tmp_path, "def score(prediction, reference, row):\n    return len(row['messages'].pop()['content'])\n")
    assert [score("", "", row), score("", "", row)] == [2, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_to_be_found\n", "the file does not run: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "the file does not run: SystemExit"),
        ("def scores(): pass\n", "no such function; expected def score"),
        ("score = 3\n", "no such function"),
    ],
)
def test_a_file_that_has_no_function(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        own(tmp_path, text)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("None", "found None"),
        ("'1'", "found '1'"),
        ("float('nan')", "found nan"),
        ("10**400", "found 1000"),
    ],
)
def test_a_function_that_gives_no_number(tmp_path: Path, result: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        own(tmp_path, f"def score(prediction, reference, row):\n    return {result}\n")("a", "a", {})
