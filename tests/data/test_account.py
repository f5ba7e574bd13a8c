"""What a template hides of rows that are trained is counted and said: turns as rows, parts left out, greetings."""

from __future__ import annotations

import doctest
import json
import re
from types import SimpleNamespace

import pytest

import instructft
from instructft.data import account
from instructft.data.account import Hidden, notes_of
from instructft.data.prepare import prepare
from instructft.data.streaming import prepare_stream

# Marks the last answer, so that each turn is a row; leaves out what stands before a bar; wants a question first.
TEMPLATE = """
{%- if messages[0].role == 'assistant' and messages|length == 1 and not add_generation_prompt -%}<A>{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}<A>{{ '!' if loop.last else '' }}{{ m.content.split('|')[-1] + eos_token }}
  {%- else -%}<U>{{ m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<A>{%- endif -%}
"""


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


ROWS = [
    {"messages": [user("one?"), answer("1"), user("two?"), answer("2"), user("three?"), answer("3")]},
    {"messages": [user("four?"), answer("as three is before|4")]},
    {"messages": [answer("Welcome!"), user("five?"), answer("5")]},
    {"messages": [user("nothing?"), answer("")]},
]


@pytest.fixture
def asked(recipe, tmp_path):
    """Makes a recipe over `ROWS` and the template."""
    (tmp_path / "rewrites.jinja").write_text(TEMPLATE)
    template = f"data.template={tmp_path / 'rewrites.jinja'}"

    def asked(*overrides):
        whole = ["data.splits={validation: 0.0, test: 0.0}", "check.max_dropped_share=0.3"]
        return recipe(ROWS, overrides=[*whole, template, *overrides])

    return asked


def account_of(recipe, made):
    return dict(made.account(recipe.data.max_length))


def test_the_examples_in_the_docstrings() -> None:
    found = doctest.testmod(account)
    assert (found.attempted, found.failed) == (1, 0)


def test_unrolled_turns_are_said_with_what_they_cost(asked):
    """The figures are those of the rows themselves."""
    recipe = asked()
    made = prepare(recipe, instructft.load_tokenizer(recipe))
    lengths = [len(row["input_ids"]) for row in made.splits["train"]][:3]
    said = account_of(recipe, made)["turns"]
    assert said.startswith("1 conversations are 3 rows")
    assert f"{sum(lengths):,} tokens in place of {lengths[-1]:,}" in said
    assert f"({sum(lengths) / lengths[-1]:.1f} ×)" in said
    assert "data.turns: last" in said
    last = asked("data.turns=last")
    assert "turns" not in account_of(last, prepare(last, instructft.load_tokenizer(last)))


def test_what_the_template_leaves_out_and_what_is_only_read_is_said(asked):
    recipe = asked()
    lines = account_of(recipe, prepare(recipe, instructft.load_tokenizer(recipe)))
    assert lines["not shown"].startswith("content of 1 rows")
    assert lines["only read"].startswith("1 answers before any question")
    assert "left_out" not in lines["dropped"]  # the note of a row that is dropped is its reason


def test_a_stream_says_so_of_the_rows_it_looked_at(asked, tmp_path):
    recipe = asked(f"data.datasets=[{{path: {tmp_path / 'rows0.jsonl'}, streaming: true}}]", "train.max_steps=1")
    lines = account_of(recipe, prepare_stream(recipe, instructft.load_tokenizer(recipe)))
    assert lines["not shown"].startswith("content of 1 rows")
    assert lines["only read"].startswith("1 answers")


def test_rows_that_hide_nothing_have_no_line(recipe):
    plain = recipe([{"instruction": f"Say {n}.", "output": str(n)} for n in range(20)])
    made = prepare(plain, instructft.load_tokenizer(plain))
    assert made.hidden == Hidden()
    assert not {"turns", "not shown", "only read"} & set(account_of(plain, made))


def test_rows_that_are_held_out_are_not_counted(asked, tmp_path):
    """The lines are about what is trained."""
    held_out, trained = tmp_path / "held-out.jsonl", tmp_path / "trained.jsonl"
    held_out.write_text(json.dumps(ROWS[0]) + "\n")
    trained.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:3]))
    places = [f"data.datasets=[{{path: {trained}}}]", f"data.validation=[{{path: {held_out}}}]"]
    recipe = asked(*places, "data.splits={validation: 0, test: 0}")
    made = prepare(recipe, instructft.load_tokenizer(recipe))
    assert len(made.splits["validation"]) == 3
    assert (made.hidden.unrolled, made.hidden.left_out, made.hidden.only_read) == (0, {"content": 1}, 1)


def test_check_says_the_same(asked, capsys):
    from rich.console import Console

    from instructft.check.report import check, show

    report = check(asked())
    hidden = report["training"]["hidden"]
    assert (hidden["unrolled"], hidden["turns"]) == (1, 3)
    assert (hidden["left_out"], hidden["only_read"]) == ({"content": 1}, 1)
    json.dumps(report)
    show(report, Console(width=200, highlight=False))
    out = capsys.readouterr().out
    for line in (
        "1 conversations have 3 turns, each as it is served, folded into 1 rows",
        "content of 1 rows",
        "1 answers before any question",
    ):
        assert re.search(line, out)


def test_inspect_says_the_same(asked, capsys):
    from rich.console import Console

    from instructft.check.rows import inspect_rows

    inspect_rows(asked("data.fold_turns=false"), console=Console(width=200, highlight=False))
    out = capsys.readouterr().out
    for line in ("1 conversations are 3 rows", "content of 1 rows", "1 answers before any question"):
        assert re.search(line, out)


def test_the_notes_of_rows_name_each_part_once():
    rows = SimpleNamespace(left_out=[(3, "reasoning"), (3, "reasoning"), (3, "content")], only_read=[(1, 2)])
    found = {place: json.loads(note) for place, note in notes_of(rows).items()}
    assert found == {
        1: {"left_out": [], "only_read": 2},
        3: {"left_out": ["content", "reasoning"], "only_read": 0},
    }
