"""Each kind of error ends the command line with the exit code of the contract."""

from __future__ import annotations

import inspect

import pytest

from instructft import errors

CODES = {
    "InstructftError": 1,
    "UsageError": 2,
    "RecipeError": 2,
    "DataError": 2,
    "TemplateError": 2,
    "ResumeError": 2,
    "AdapterError": 2,
    "ModelFileError": 2,
    "NotFiniteError": 1,
    "DivergedError": 1,
    "OutOfMemoryError": 1,
    "CheckpointError": 1,
    "HubError": 1,
    "ModelError": 1,
}
KINDS = dict(inspect.getmembers(errors, inspect.isclass))


def test_every_error_has_its_exit_code_and_is_one_of_ours() -> None:
    assert set(KINDS) == {*CODES, "Stopped"}
    assert {name: KINDS[name].exit_code for name in CODES} == CODES
    assert all(issubclass(kind, errors.InstructftError) for kind in KINDS.values())
    assert errors.Stopped("by SIGTERM", errors.EXIT_SIGTERM).exit_code == 143


def test_the_tree_in_the_docstring_names_them_all() -> None:
    assert [name for name in KINDS if name not in (errors.__doc__ or "")] == []


@pytest.mark.parametrize(("problems", "count"), [(["a"], "1 problem"), (["a", "b"], "2 problems")])
def test_a_recipe_error_holds_its_problems_line_by_line(problems: list[str], count: str) -> None:
    error = errors.RecipeError("mine.yaml", problems)
    assert str(error).splitlines() == [f"mine.yaml: {count}", *(f"  {problem}" for problem in problems)]
    assert error.problems == problems


def test_of_thousands_of_problems_the_first_are_shown() -> None:
    text = str(errors.RecipeError("mine.yaml", [f"key {i}" for i in range(3000)]))
    assert text.splitlines()[0] == "mine.yaml: 3000 problems"
    assert text.splitlines()[-2:] == ["  key 19", "  and 2,980 more"]
