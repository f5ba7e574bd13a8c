"""Conversations to rows: what is cut, dropped and trained is exact, and a cache is never met by other settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import instructft
from instructft.data import tokenize
from instructft.data.load import load_parts
from instructft.data.prepare import prepare, prepare_dataset
from instructft.errors import DataError, TemplateError
from instructft.prompt.loss_mask import encode_conversation
from tests.helpers.rows import answers, made_up, prepared


def lengths(recipe):
    """Tokens in each row of a recipe's first part, encoded one by one: independent of `prepare`."""
    tokenizer = instructft.load_tokenizer(recipe)
    part = load_parts(recipe)[0]
    return [encode_conversation(part.conversation(row), tokenizer) for row in part.raw]


LONG = [
    {"instruction": "Count.", "output": " ".join([f"one{i}", f"two{i}"] * (i % 9))} for i in range(1, 45)
]  # no copies


LONG = [row for row in LONG if row["output"]]


def test_cut_rows_and_tokens_are_counted_exactly(recipe):
    mine = recipe(LONG, overrides=["data.max_length=30"])
    whole, made = lengths(mine), prepared(mine)
    too_long = [len(row["input_ids"]) - 30 for row in whole if len(row["input_ids"]) > 30]
    assert len(too_long) > 5
    assert (made.cut, made.cut_tokens) == (len(too_long), sum(too_long))
    assert not made.dropped
    splits = load_parts(mine)[0].rows
    for name, split in made.splits.items():
        expected = [{key: values[:30] for key, values in whole[i].items()} for i in splits[name]]
        assert list(split) == expected
        assert made.tokens[name] == sum(len(row["input_ids"]) for row in expected)
        assert made.supervised_tokens[name] == sum(label != -100 for row in expected for label in row["labels"])
    stop = instructft.load_tokenizer(mine).eos_token_id
    ended = [row["labels"][-1] == stop for split in made.splits.values() for row in split]
    assert ended.count(False) == made.cut


def test_on_too_long_drop_leaves_the_long_rows_out_and_counts_them(recipe):
    mine = recipe(LONG, overrides=["data.max_length=30", "data.on_too_long=drop"])
    made = prepared(mine)
    whole = lengths(mine)
    assert made.dropped == {"too_long": sum(len(row["input_ids"]) > 30 for row in whole)}
    assert (made.cut, made.cut_tokens) == (0, 0)
    assert sum(made.tokens.values()) == sum(len(r["input_ids"]) for r in whole if len(r["input_ids"]) <= 30)


def test_on_too_long_error_names_the_row_of_the_file(recipe):
    rows = made_up(30)
    rows[22]["output"] = "long " * 200
    mine = recipe(rows, overrides=["data.on_too_long=error"])
    with pytest.raises(
        DataError,
        match=r"data\.datasets\[0\]: row 23 of .*rows0\.jsonl has \d+ tokens, more than data\.max_length \(128\)",
    ):
        prepared(mine)
    drawn = recipe({"path": mine.data.datasets[0].path, "rows": 29}, overrides=["data.on_too_long=error"], name="drawn")
    with pytest.raises(DataError, match=r"row 23 of "):  # also when only some rows were drawn
        prepared(drawn)


def test_an_answer_that_is_cut_away_whole_is_dropped_and_counted(recipe):
    long_question = {"instruction": "word " * 200, "output": "Yes."}
    two_turns = {
        "instruction": "hi",
        "output": "Yes.",
    }
    mine = recipe([*made_up(20), long_question, two_turns, long_question])
    made = prepared(mine)
    assert made.dropped == {"answer_cut_away": 2}
    assert (made.cut, made.cut_tokens) == (0, 0)
    assert all(any(label != -100 for label in row["labels"]) for split in made.splits.values() for row in split)


TWO_TURNS = [
    {
        "messages": [
            {"role": "user", "content": f"Add {i} and 1."},
            {"role": "assistant", "content": f"first {i}"},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": f"second {i}"},
        ]
    }
    for i in range(10)
]


@pytest.mark.parametrize("train_on", ["responses", "last_response", "everything"])
def test_train_on_decides_what_carries_loss(recipe, train_on):
    mine = recipe(TWO_TURNS, overrides=[f"data.train_on={train_on}", "data.splits.validation=0", "data.splits.test=0"])
    made = prepared(mine)
    tokenizer = instructft.load_tokenizer(mine)
    assert list(made.splits) == ["train"]
    for i, (row, text) in enumerate(zip(made.splits["train"], answers(made.splits["train"], tokenizer), strict=True)):
        prompts = [
            f"### Instruction:\nAdd {i} and 1.\n\n### Response:\n",
            "### Instruction:\nAgain.\n\n### Response:\n",
        ]
        assert (
            text
            == {
                "responses": f"first {i}second {i}",
                "last_response": f"second {i}",
                "everything": f"{prompts[0]}first {i}{prompts[1]}second {i}",
            }[train_on]
        )
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_a_system_prompt_stands_before_every_conversation_that_has_none(recipe):
    rows = [{"instruction": "a", "output": "b"}, {"system": "Mine.", "instruction": "a", "output": "b"}]
    mine = recipe(rows, overrides=["data.system_prompt=Be brief.", "data.splits.validation=0", "data.splits.test=0"])
    tokenizer = instructft.load_tokenizer(mine)
    texts = [tokenizer.decode(row["input_ids"]) for row in prepare_dataset(mine, tokenizer)["train"]]
    turn = "### Instruction:\na\n\n### Response:\nb" + tokenizer.eos_token
    assert texts == [f"Be brief.\n\n{turn}", f"Mine.\n\n{turn}"]


def test_a_template_that_refuses_a_row_names_it(recipe, tmp_path):
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        encoding="utf-8",
    )
    rows = made_up(20)
    rows[12]["system"] = "Be brief."
    rows.insert(3, {"instruction": "", "output": ""})  # dropped before the template sees it
    with pytest.raises(
        TemplateError,
        match=r"(?s)data\.datasets\[0\]: 4\.8% of the 21 rows of .*rows0\.jsonl .*row 14: .*no system turns here",
    ):
        prepared(recipe(rows, overrides=[f"data.template={strict}"]))


@pytest.mark.parametrize(
    "override",
    [
        "data.template=alpaca",
        "data.template=chatml",
        "data.train_on=everything",
        "data.max_length=28",
        "data.system_prompt=Hi.",
    ],
)
def test_a_cache_made_with_other_settings_is_never_used(recipe, override):
    first = recipe(made_up(30))
    made = prepared(first)
    other = recipe(made_up(30), overrides=[override])
    again = prepared(other)
    tokenizer = instructft.load_tokenizer(other)
    parts = load_parts(other)
    for name, split in again.splits.items():
        messages = [parts[0].conversation(parts[0].raw[int(i)]) for i in parts[0].rows[name]]
        expected = [encode_conversation(m, tokenizer, other.data.train_on) for m in messages]
        cut = [{key: values[: other.data.max_length] for key, values in row.items()} for row in expected]
        assert list(split) == cut
    assert prepared(first).fingerprint == made.fingerprint != again.fingerprint


def test_a_second_run_takes_the_cache(recipe, monkeypatch):
    mine = recipe(made_up(30))
    first = prepared(mine)
    tokenizer = instructft.load_tokenizer(mine)
    monkeypatch.setattr(
        instructft.prompt.loss_mask.Encoder, "encode", lambda *args, **kwargs: pytest.fail("encoded again")
    )
    assert prepare(mine, tokenizer).fingerprint == first.fingerprint


@pytest.fixture
def code():
    """The key of our code and of what it calls, never from a cache."""
    tokenize._code.cache_clear()
    yield tokenize._code.__wrapped__
    tokenize._code.cache_clear()


@pytest.mark.parametrize("file", ["prompt/render.py", "prompt/jinja/alpaca.jinja", "data/sources.py", "data/new.py"])
def test_one_changed_byte_of_our_code_gives_another_key(tmp_path, code, file):
    package = Path(tokenize.__file__).parents[1]
    for folder in ("prompt", "data"):
        shutil.copytree(package / folder, tmp_path / folder)
    before = code(tmp_path)
    assert before == code(package)
    (tmp_path / "prompt" / "render.pyc").write_bytes(b"compiled")
    assert code(tmp_path) == before
    with (tmp_path / file).open("a", encoding="utf-8") as changed:
        changed.write(" ")
    assert code(tmp_path) != before


@pytest.mark.parametrize("library", ["tokenizers", "tiktoken", "jinja2", "transformers"])
def test_another_version_of_a_library_gives_another_key(recipe, monkeypatch, code, library):
    mine = recipe(made_up(20))
    (part,), tokenizer = load_parts(mine), instructft.load_tokenizer(mine)
    before = tokenize.shaped_by("rows", part, mine, tokenizer, "")
    assert tokenize.shaped_by("rows", part, mine, tokenizer, "") == before
    installed = tokenize.version
    monkeypatch.setattr(tokenize, "version", lambda name: "0.0" if name == library else installed(name))
    tokenize._code.cache_clear()
    assert tokenize.shaped_by("rows", part, mine, tokenizer, "") != before
