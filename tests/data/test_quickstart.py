"""The bundled data set says true things, is the same everywhere, and keeps its held-out rows apart from training."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

import instructft
from instructft.data.load import load_parts
from instructft.data.sources import QUICKSTART
from scripts import quickstart_chat as chat
from scripts import quickstart_data as quickstart
from tests.helpers import quickstart as bundled

ROWS = 2822
# Changes only with the data set itself, on purpose: it is the same on every Python version and machine.
FINGERPRINT = "19f285f39fb78a0e98564ab961ea6629b8788f6202d924b62bc3072dd970801f"
CONVERSATIONS = 1190
CHAT_FINGERPRINT = "53a7390958923e2ffda23fdafd298c2bf6393d0e5050059662f5b7d13045e51a"
KINDS = {
    "capitals",
    "opposites",
    "past_tense",
    "young_animals",
    "sums",
    "reviews",
    "people",
    "lists",
    "notes",
}
# instruction, input, output: written by hand, one to four of each kind
TRUE_ROWS = [
    ("What is the capital of Norway?", "", "The capital of Norway is Oslo."),
    ("Canberra is the capital of which country?", "", "Canberra is the capital of Australia."),
    ("Name the capital. Answer with one word.", "Country: Turkey", "Ankara"),
    ("What is the opposite of full?", "", "The opposite of full is empty."),
    ("Turn the word into its opposite.", "Word: early", "late"),
    ("What is the past tense of teach?", "", "The past tense of teach is taught."),
    ("Rewrite the sentence in the past tense.", "They begin.", "They began."),
    ("What is a baby owl called?", "", "A baby owl is called an owlet."),
    ("I saw an elephant with its baby. What is the baby called?", "", "The baby is called a calf."),
    ("What is 3 + 4?", "", "3 + 4 = 7"),
    ("Add the two numbers. Answer with the number only.", "7 and 7", "14"),
]


def fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def squeezed(text: str) -> str:
    return " ".join(text.lower().split())


def split(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training rows and the test rows of a seeded split with the recipe's shares."""
    rows = quickstart.rows()
    random.Random(seed).shuffle(rows)
    test, validation = round(0.1 * len(rows)), round(0.02 * len(rows))
    return rows[test + validation :], rows[:test]


@pytest.fixture(scope="module")
def tokenizer():
    return bundled.tokenizer()


def test_rows_are_the_same_at_every_call_and_have_the_expected_columns():
    rows = quickstart.rows()
    assert len(rows) == ROWS
    assert fingerprint(rows) == FINGERPRINT
    assert all(list(row) == ["instruction", "input", "output", "category"] for row in rows)
    assert all(isinstance(value, str) for row in rows for value in row.values())
    rows[0]["output"] = "changed by a caller"
    assert fingerprint(quickstart.rows()) == FINGERPRINT


def test_every_kind_has_enough_rows_and_wordings():
    rows = quickstart.rows()
    count = Counter(row["category"] for row in rows)
    assert set(count) == KINDS
    assert min(count.values()) >= 200
    wordings = defaultdict(set)
    for row in rows:
        wordings[row["category"]].add(quickstart.origin(row).wording)
    assert all(8 <= len(found) <= 15 for found in wordings.values())


def test_no_two_rows_ask_the_same():
    prompts = [squeezed(row["instruction"] + " | " + row["input"]) for row in quickstart.rows()]
    assert len(set(prompts)) == len(prompts)
    assert len({quickstart.origin(row) for row in quickstart.rows()}) == ROWS


def test_rows_are_clean_text():
    for row in quickstart.rows():
        for text in row.values():
            assert text == text.strip()
            assert not set("{}|#<>") & set(text)
            assert text.isascii()
        assert row["instruction"]
        assert row["output"]
        assert row["instruction"][-1] in ".?:!", row


def test_a_sample_of_rows_is_true():
    found = {(row["instruction"], row["input"]): row["output"] for row in quickstart.rows()}
    for instruction, given, output in TRUE_ROWS:
        assert found[instruction, given] == output


def test_articles_agree_with_their_nouns():
    for row in quickstart.rows():
        words = " ".join((row["instruction"], row["input"], row["output"])).replace("\n", " ").split()
        for article, noun in pairwise(words):
            if article.lower() in ("a", "an"):
                assert (article.lower() == "an") == (noun[0].lower() in "aeiou"), row


def test_answers_of_the_tasks_with_an_input_follow_from_it():
    checked = Counter()
    for row in quickstart.rows():
        entity = quickstart.origin(row).entity
        text = row["instruction"] + " " + row["input"]
        if row["category"] in ("people", "lists", "notes"):
            assert all(part in text for part in entity)
            assert any(part in row["output"] for part in entity)
        elif row["category"] == "sums":
            a, b = (int(number) for number in entity[0].split(" + "))
            assert str(a + b) in row["output"]
        elif row["category"] == "reviews":
            good = entity[0] in quickstart.LIKED.split()
            assert good != (entity[0] in quickstart.DISLIKED.split())
            said_good = row["output"].startswith("Yes") or "positive" in row["output"].lower()
            assert said_good == good
        else:
            continue
        checked[row["category"]] += 1
    assert set(checked) == {"people", "lists", "notes", "sums", "reviews"}


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 42])
def test_held_out_rows_were_never_trained_but_their_parts_were(seed):
    train, test = split(seed)
    assert len(test) >= 200
    assert {row["category"] for row in test} == {row["category"] for row in train} == KINDS

    trained = {quickstart.origin(row) for row in train}
    wordings = {(o.kind, o.wording) for o in trained}
    combinations = {(o.kind, o.entity) for o in trained}
    parts = {(o.kind, part) for o in trained for part in o.entity}
    for row in test:
        held_out = quickstart.origin(row)
        assert held_out not in trained
        assert (held_out.kind, held_out.wording) in wordings
        assert all((held_out.kind, part) in parts for part in held_out.entity)
        if held_out.kind in quickstart.COMBINED:  # not only the wording: these names and things were never together
            assert (held_out.kind, held_out.entity) not in combinations


def test_origin_knows_only_its_own_rows():
    row = {"instruction": "What is the capital of France?", "input": ""}
    assert quickstart.origin(row) == ("capitals", 0, ("France",))
    with pytest.raises(KeyError):
        quickstart.origin({"instruction": "What is the capital of Atlantis?", "input": ""})


def test_tokenizer_keeps_any_text(tokenizer):
    texts = [
        "What is the capital of France?",
        "Grüße aus Köln, 你好, שלום, नमस्ते, 🎉👩‍🚀",
        "  two  spaces, a\ttab\r\nand\n\n\nlines  ",
        "it 's , a . don't ' s test !",
        "x = 1234567890; y[0] -= 3.14",
        "\x00\x7f\u200b\ufeff",
        "",
    ]
    for text in [*texts, *(row["output"] for row in quickstart.rows()[:200])]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_is_small_plain_and_complete(tokenizer):
    assert 1000 <= len(tokenizer) <= quickstart.VOCAB_SIZE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|endoftext|>",
        "<|endoftext|>",
        "<|pad|>",
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.model_max_length == 52
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    ids = tokenizer("What is the capital of France?").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["What", "Ġis", "Ġthe", "Ġcapital", "Ġof", "ĠFrance", "?"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 + 34").input_ids) == ["1", "2", "Ġ+", "Ġ", "3", "4"]


def test_no_special_token_in_the_rows_and_all_rows_fit(tokenizer):
    for row in quickstart.rows():
        ids = tokenizer("\n\n".join((row["instruction"], row["input"], row["output"]))).input_ids
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert len(ids) <= 64


def test_the_bundled_files_are_those_that_the_script_writes(tmp_path):
    quickstart.write(tmp_path)
    chat.write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in QUICKSTART.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes(), name


def test_a_recipe_reads_the_bundled_rows_and_tokenizer():
    recipe = instructft.load_recipe("quickstart")
    for part, rows in zip(load_parts(recipe), (quickstart.rows(), chat.rows()), strict=True):
        assert [part.row(raw) for raw in part.raw] == rows
    assert instructft.load_tokenizer(recipe).get_vocab() == quickstart.tokenizer().get_vocab()


def test_conversations_are_the_same_at_every_call_alternate_and_are_all_different():
    rows = chat.rows()
    assert len(rows) == CONVERSATIONS
    assert fingerprint(rows) == fingerprint(chat.rows()) == CHAT_FINGERPRINT
    assert len({fingerprint(row["messages"]) for row in rows}) == len(rows)
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert row["category"] == f"turn {len(roles) // 2}"
        assert all(m["content"] == m["content"].strip() and m["content"].isascii() for m in row["messages"])
    count = Counter(row["category"] for row in rows)
    assert count["turn 2"] >= 500
    assert count["turn 3"] >= 450
    assert set(count) == {"turn 2", "turn 3", "turn 6"}


def test_what_a_conversation_asks_is_no_single_row_so_that_none_that_is_held_out_is_trained():
    singles = {squeezed(row["instruction"] + " " + row["input"]) for row in quickstart.rows()}
    asked = [m["content"] for row in chat.rows() for m in row["messages"] if m["role"] == "user"]
    assert not singles & set(map(squeezed, asked))


def test_later_answers_follow_from_what_was_said_before():
    """What an answer names was said in the conversation, or is the true answer about what was asked last."""
    said = {}
    for row in chat.rows():
        questions, answers = ([m["content"] for m in row["messages"][i::2]] for i in (0, 1))
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            before = " ".join([*questions[:i], *answers[:i]])
            if question in chat.SHORTER:
                assert answers[i - 1].removesuffix(".").split()[-1] == answer
            elif question == "What is my name?":
                assert answer.removeprefix("Your name is ").removesuffix(".") in before
            elif question == "Which word comes last?":
                assert (
                    answer.removeprefix("The last word is ").removesuffix(".")
                    == questions[0].removesuffix(".").removesuffix(" with dashes").split()[-1]
                )
            else:
                continue
            said[question] = said.get(question, 0) + 1
    assert set(said) == {*chat.SHORTER, "What is my name?", "Which word comes last?"}
