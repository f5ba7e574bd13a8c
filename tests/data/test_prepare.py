"""From files to ids: every row of the data is trained, held out or counted, and the account is exact."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

import instructft
from instructft.data.load import conversations, file_conversations, load_parts
from instructft.data.prepare import prepare, prepare_dataset
from instructft.data.readers import SUFFIXES
from instructft.errors import DataError, TemplateError
from instructft.prompt.loss_mask import encode_conversation
from tests.data.test_readers import write

RECIPE = """
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128}}, tokenizer: quickstart}}
data:
  datasets: {datasets}
  template: instruction
  max_length: 128
  splits: {{validation: 0.1, test: 0.2}}
"""


def made_up(count):
    return [
        {"instruction": f"Question {i}?", "input": f"{i}" * (i % 3), "output": f"Answer {i}."} for i in range(count)
    ]


@pytest.fixture
def recipe(tmp_path):
    """Makes a recipe over data sets that are given as rows (written to a file) or as recipe entries."""

    def recipe(*datasets, overrides=(), name="rows"):
        entries = []
        for i, entry in enumerate(datasets):
            if isinstance(entry, list):
                path = tmp_path / f"{name}{i}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in entry), encoding="utf-8")
                entry = {"path": str(path)}
            entries.append(entry)
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(datasets=json.dumps(entries)), encoding="utf-8")
        return instructft.load_recipe(path, overrides)

    return recipe


def held(recipe, part=0):
    """split -> row numbers of one part of a recipe."""
    return {name: rows.tolist() for name, rows in load_parts(recipe)[part].rows.items()}


def prepared(recipe):
    return prepare(recipe, instructft.load_tokenizer(recipe))


def answers(split, tokenizer):
    """The texts that carry loss, row by row, without the stop token."""
    kept = [[label for label in row["labels"] if label != -100] for row in split]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]


# --------------------------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------------------------


def test_splits_have_their_sizes_share_no_row_and_are_together_all_rows(recipe):
    splits = held(recipe(made_up(1100)))
    assert {name: len(numbers) for name, numbers in splits.items()} == {"train": 770, "validation": 110, "test": 220}
    assert sorted(number for numbers in splits.values() for number in numbers) == list(range(1100))
    for numbers in splits.values():
        assert numbers == sorted(numbers)
    assert splits["test"] != list(range(220))  # drawn, not cut off


def test_splits_depend_on_the_data_seed_alone(recipe):
    def splits(*overrides):
        return held(recipe(made_up(60), overrides=overrides))

    first = splits()
    for same in ("data.template=chatml", "data.max_length=20", "train.seed=7", "data.train_on=everything"):
        assert splits(same) == first, same
    assert splits("data.seed=43") != first
    assert splits("data.seed=43") == splits("data.seed=43")
    # a larger test split takes from training: what validates stays what it was
    assert splits("data.splits.test=0.5")["validation"] == first["validation"]


def test_two_parts_of_the_same_size_are_split_apart(recipe):
    both = recipe(made_up(60), made_up(60))
    assert held(both, 0) != held(both, 1)


def test_another_process_makes_the_same_rows_in_the_same_order(recipe, tmp_path):
    mine = recipe(made_up(60), {"name": "quickstart", "rows": 40})
    code = f"""
import instructft, instructft.data.prepare as data
recipe = instructft.load_recipe({mine.source!r})
made = data.prepare(recipe, instructft.load_tokenizer(recipe))
tests = [list(part.rows["test"]) for part in data.load_parts(recipe)]
print(made.fingerprint, tests == {[held(mine, i)["test"] for i in (0, 1)]})
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "another-cache"), "PYTHONHASHSEED": "5"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert ran.stdout.split() == [prepared(mine).fingerprint, "True"], ran.stderr


def test_rows_draws_by_the_seed_and_keeps_the_order_of_the_file(recipe):
    def questions(**entry):
        path = {"path": str(Path(recipe(made_up(60)).data.datasets[0].path))}
        part = load_parts(recipe({**path, **entry}, overrides=overrides, name="drawn"))[0]
        return [part.row(row)["instruction"] for row in part.raw]

    overrides: list[str] = []
    everything = questions()
    drawn = questions(rows=20)
    assert len(set(drawn)) == 20
    assert [q for q in everything if q in drawn] == drawn != everything[:20]
    assert questions(rows=60) == everything
    overrides = ["data.seed=7"]
    assert questions(rows=20) != drawn


# --------------------------------------------------------------------------------------------------------------------
# Where rows come from
# --------------------------------------------------------------------------------------------------------------------

ODD = [("What is 1?", "One"), ("And 2?", "Two"), ("42", "NA"), ('"a", b', "two\nlines"), ("2024-05-01", "1.50")]
PAIRS = [(q + i, a + i) for i in ("", " red", " blue", " green") for q, a in ODD]  # all different
SHAPES = {
    "alpaca": [{"instruction": q, "output": a} for q, a in PAIRS],
    "dolly": [{"instruction": q, "context": "", "response": a, "category": "c"} for q, a in PAIRS],
    "hh": [{"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": ""} for q, a in PAIRS],
    "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS],
    "messages": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS],
    "prompt-completion": [{"prompt": q, "completion": a} for q, a in PAIRS],
}


def test_every_format_gives_the_same_ids_for_the_same_conversation(recipe):
    found = {name: prepared(recipe(rows, name=name)) for name, rows in SHAPES.items()}
    for name, made in found.items():
        assert made.fingerprint == found["alpaca"].fingerprint, name
        assert made.rows == {"train": 14, "validation": 2, "test": 4}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_type_of_file_gives_the_same_ids(recipe, tmp_path, suffix):
    made = prepared(recipe({"path": str(write(tmp_path, suffix, SHAPES["alpaca"]))}, name="file"))
    assert made.fingerprint == prepared(recipe(SHAPES["alpaca"])).fingerprint
    assert not made.dropped


def test_data_sets_of_different_formats_with_mapped_columns_stand_side_by_side(recipe, tmp_path):
    other = [{"question": f"Q{i}?", "reply": f"R{i}", "output": "wrong", "category": "x"} for i in range(10)]
    path = write(tmp_path, ".csv", other)
    mapped = {"path": str(path), "columns": {"instruction": "question", "output": "reply"}}
    others = [
        {"messages": [{"role": "user", "content": f"{q}!"}, {"role": "assistant", "content": f"{a}, sir"}]}
        for q, a in PAIRS
    ]
    mixed = recipe(SHAPES["hh"], mapped, others, {"name": "quickstart", "rows": 30})
    parts = load_parts(mixed)
    assert [part.format for part in parts] == ["hh", "alpaca", "messages", "alpaca"]
    made = prepared(mixed)
    assert made.rows == {"train": 14 + 7 + 14 + 21, "validation": 2 + 1 + 2 + 3, "test": 4 + 2 + 4 + 6}
    assert sum(made.groups.values()) == 8  # validation rows are told apart, so that each set has a loss of its own
    assert len(made.groups) == 4
    tokenizer = instructft.load_tokenizer(mixed)
    assert sorted(
        a for name in made.splits for a in answers(made.splits[name], tokenizer) if a[:1] == "R" and a[1:].isdigit()
    ) == [f"R{i}" for i in range(10)]
    assert not any("wrong" in answer for name in made.splits for answer in answers(made.splits[name], tokenizer))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the folder `tmp_path / "web"` on 127.0.0.1; its address comes back."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path != "/broken.jsonl":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"instruction": "a", "output": "b"}\n')  # and no more

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".parquet"])
def test_a_file_at_a_url_gives_the_same_ids(recipe, tmp_path, server, suffix):
    path = write(tmp_path / "web", suffix, SHAPES["alpaca"])
    made = prepared(recipe({"url": f"{server}/{path.name}?download=true"}, name="url"))
    assert made.fingerprint == prepared(recipe(SHAPES["alpaca"])).fingerprint


def test_a_url_that_gives_nothing_or_nonsense_is_a_data_error(recipe, tmp_path, server):
    with pytest.raises(
        DataError, match=r"data\.datasets\[0\]: http://.*/none\.json could not be fetched from its URL: "
    ):
        load_parts(recipe({"url": f"{server}/none.json"}))
    with pytest.raises(DataError, match="the connection broke after 36 of 1,000 bytes"):
        load_parts(recipe({"url": f"{server}/broken.jsonl"}))
    (tmp_path / "web" / "page.json").write_text("<html>", encoding="utf-8")
    with pytest.raises(DataError, match=r"/page\.json, line 1, column 1: not JSON"):
        load_parts(recipe({"url": f"{server}/page.json"}))


def test_a_file_at_a_url_is_fetched_anew_and_its_copy_serves_when_offline(recipe, tmp_path, server, monkeypatch):
    import datasets

    mine = recipe({"url": f"{server}/rows.jsonl"})

    def count():
        return len(load_parts(mine)[0].raw)

    path = write(tmp_path / "web", ".jsonl", SHAPES["alpaca"])
    assert count() == 20
    write(tmp_path / "web", ".jsonl", SHAPES["alpaca"][:5])
    assert count() == 5
    path.unlink()
    with pytest.raises(DataError, match="HTTP Error 404"):
        load_parts(mine)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert count() == 5
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        load_parts(recipe({"url": f"{server}/other.jsonl"}))


# --------------------------------------------------------------------------------------------------------------------
# The account
# --------------------------------------------------------------------------------------------------------------------

FAULTS = [
    ({"messages": [{"role": "user", "content": "a"}]}, "no_assistant_turn"),
    ({"messages": []}, "no_assistant_turn"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "empty_answer"),
    ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}, "empty_prompt"),
    ({"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "b"}]}, "not_text"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "unknown_role"),
    ({"messages": "a"}, "not_a_dialogue"),
    ({"other": "a"}, "not_a_dialogue"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}, "no_loss"),
]


def test_every_planted_fault_is_found_and_nothing_else(recipe):
    good = SHAPES["messages"]
    rows = [row for i, (fault, _) in enumerate(FAULTS * 2) for row in (fault, good[i % len(good)])]
    mine = recipe([*good[:1], *rows])
    made = prepared(mine)
    assert made.dropped == Counter(reason for _, reason in FAULTS * 2)
    assert sum(made.rows.values()) + sum(made.dropped.values()) == len(rows) + 1
    tokenizer = instructft.load_tokenizer(mine)
    found = [answer for split in made.splits.values() for answer in answers(split, tokenizer)]
    expected = [good[0], *(good[i % len(good)] for i in range(len(FAULTS) * 2))]
    assert sorted(found) == sorted(row["messages"][1]["content"] for row in expected)


def lengths(recipe):
    """Tokens in each row of a recipe's first part, encoded one by one: independent of `prepare`."""
    tokenizer = instructft.load_tokenizer(recipe)
    part = load_parts(recipe)[0]
    return [encode_conversation(part.conversation(row), tokenizer) for row in part.raw]


LONG = [{"instruction": "Count.", "output": " ".join(["one", "two", "three"] * (i % 9))} for i in range(1, 45)]
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
    with pytest.raises(TemplateError, match=r"data\.datasets\[0\]: row 14 of .*rows0\.jsonl: .*no system turns here"):
        prepared(recipe(rows, overrides=[f"data.template={strict}"]))


# --------------------------------------------------------------------------------------------------------------------
# Fingerprint and cache
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Rows as text
# --------------------------------------------------------------------------------------------------------------------


def test_conversations_are_exactly_the_rows_of_the_split(recipe):
    rows = made_up(30)
    rows[5]["category"] = "sums"
    mine = recipe([{"instruction": "bad", "output": ""}, *rows], {"name": "quickstart", "rows": 20})
    tokenizer = instructft.load_tokenizer(mine)
    made = prepare(mine, tokenizer)
    for name, split in made.splits.items():
        found = conversations(mine, name)
        assert [encode_conversation(row["messages"], tokenizer) for row in found] == list(split)
        assert conversations(mine, name, limit=3) == found[:3]
    everything = [row for name in made.splits for row in conversations(mine, name)]
    assert {row["dataset"] for row in everything} == {mine.data.datasets[0].path, "quickstart"}
    assert [r["category"] for r in everything if r["messages"][0]["content"] == "Question 5?"] == ["sums"]


def test_file_conversations_reads_a_file_whole_and_says_when_nothing_is_in_it(tmp_path):
    path = write(tmp_path, ".csv", [*SHAPES["alpaca"], {"instruction": "a", "output": ""}])
    found = file_conversations(str(path))
    assert [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in found] == PAIRS
    assert file_conversations(str(path), limit=2) == found[:2]
    useless = write(tmp_path, ".jsonl", [{"instruction": "a", "output": ""}])
    with pytest.raises(DataError, match=r"--data: no row of .*rows\.jsonl has a question and an answer"):
        file_conversations(str(useless))
    (tmp_path / "broken.json").write_text("[{]", encoding="utf-8")
    with pytest.raises(DataError, match=r"--data: .*broken\.json, line 1, column 3: not JSON"):
        file_conversations(str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match=r"--data: there is no file nowhere\.json"):
        file_conversations("nowhere.json")


# --------------------------------------------------------------------------------------------------------------------
# Near-duplicates, and mixing by weight
# --------------------------------------------------------------------------------------------------------------------

STORY = (
    "Once upon a time there was a fox who lived at the edge of a wood, {a}, and every morning it walked down to the "
    "river to look at the fish, which it never caught, because it was {b} and did not like cold water at all."
)


def long_rows(count):
    kinds = ["old", "young", "tired", "clever", "shy", "proud", "lazy", "quick"]
    words = [f"w{i}x{j}" for i in range(count) for j in range(30)]
    return [
        {"instruction": f"Write {kinds[i % 8]} text {i}.", "output": " ".join(words[30 * i : 30 * i + 30])}
        for i in range(count)
    ]


def test_rows_nearly_the_same_as_held_out_ones_leave_training_and_are_counted(recipe):
    rows = long_rows(40)
    asked = recipe(rows, overrides=["data.max_length=1000", "model.config.n_positions=1024"])
    where = held(asked)
    planted = where["train"][:5]
    for train_row, test_row in zip(planted[:3], where["test"], strict=False):
        copied = dict(rows[test_row])
        first, *rest = copied["output"].split(" ")
        copied["output"] = " ".join([first + "!", *rest])  # nearly, not exactly
        rows[train_row] = copied
    rows[planted[3]] = dict(rows[where["validation"][0]])  # exactly
    rows[planted[4]] = {**rows[planted[4]], "instruction": rows[where["test"][0]]["instruction"]}  # the question only
    made = prepared(recipe(rows, name="planted", overrides=["data.max_length=1000", "model.config.n_positions=1024"]))
    assert made.dropped == {"near_duplicate_of_held_out": 4}
    assert made.rows["train"] == len(where["train"]) - 4
    left = answers(made.splits["train"], instructft.load_tokenizer(asked))
    assert left == [rows[i]["output"] for i in where["train"] if i not in planted[:4]]


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


def test_several_processes_give_what_one_gives(recipe, monkeypatch):
    from instructft.data import tokenize

    one = prepared(recipe(made_up(60), name="one"))
    monkeypatch.setattr(tokenize, "_ROWS_PER_PROCESS", 20)
    monkeypatch.setattr(tokenize.os, "cpu_count", lambda: 3)
    many = prepared(recipe(made_up(60), name="many", overrides=["data.max_length=127"]))
    assert many.fingerprint == one.fingerprint
    assert "TOKENIZERS_PARALLELISM" not in os.environ
